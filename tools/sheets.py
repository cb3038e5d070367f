"""Contact sheets: pictures in rows and columns with captions, and error maps; and plots as files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fastvar_trt.tools.files import replacing

_MARGIN, _LINE = 8, 18  # pixels
_GAIN = 4  # of error maps: an error of 64 of 255 is white


def error_map(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """The largest error of the three channels, four times as bright, in greys: uint8 [H, W, 3]."""
    error = np.abs(a.astype(np.int16) - b.astype(np.int16)).max(axis=-1, keepdims=True)
    return np.repeat(np.minimum(error * _GAIN, 255).astype(np.uint8), 3, axis=-1)


def contact_sheet(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[NDArray[Any]]]], side: int = 256
) -> Image.Image:
    """Pictures under column titles, one caption over each row.

    Args:
        columns: titles.
        rows: caption and pictures (uint8 [H, W, 3]) of each row.
        side: width of a picture on the sheet, pixels.
    """
    font = ImageFont.load_default(14)
    width = (side + _MARGIN) * len(columns) - _MARGIN
    captions = [_wrapped(caption, font, width) for caption, _ in rows]
    caption_height = 4 + _LINE * max(map(len, captions))
    height = max(round(side * picture.shape[0] / picture.shape[1]) for _, pictures in rows for picture in pictures)
    step_x, step_y = side + _MARGIN, height + caption_height + _MARGIN
    top = _LINE + _MARGIN
    size = (width + 2 * _MARGIN, top + step_y * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(columns):
        pen.text((_MARGIN + i * step_x, _MARGIN // 2), title, "black", font)
    for j, (_, pictures) in enumerate(rows):
        y = top + j * step_y
        for line, text in enumerate(captions[j]):
            pen.text((_MARGIN, y + line * _LINE), text, "black", font)
        for i, picture in enumerate(pictures):
            scaled = Image.fromarray(picture).resize((side, height), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (_MARGIN + i * step_x, y + caption_height))
    return sheet


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines of whole words, none wider than that many pixels where a word is not."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def save_image(image: Image.Image, path: Path, text: PngInfo | None = None) -> None:
    """Write a PNG beside its place, with what it says of itself, then move it there.

    Raises:
        RequestError: it cannot be written.
    """
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=text)


@contextlib.contextmanager
def saved_figure(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure of matplotlib, `size` in inches, that is written as a PNG when the block ends well.

    Raises:
        RequestError: it cannot be written.
    """
    from matplotlib.figure import Figure  # comes with the extra `quality`

    figure = Figure(size, layout="constrained")
    yield figure
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
