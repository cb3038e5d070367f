"""Pictures as files, and as what a bundle takes of them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastvar_trt.runtime.errors import RequestError

MAX_PIXELS = 40_000_000  # of a file: beyond, it is taken for one that is there to fill the memory
_BACKGROUND = (255, 255, 255)  # behind what is transparent


def read_picture(source: Path | bytes, name: str = "image") -> Image.Image:
    """A picture from a file, upright; not yet of the size that is drawn.

    Args:
        source: the file, or its content: whatever Pillow reads.
        name: of the value, for errors.

    Raises:
        RequestError: it is no picture, or has more than `MAX_PIXELS`.
    """
    where = f"{name} {source}" if isinstance(source, Path) else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `MAX_PIXELS` is lower
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > MAX_PIXELS:
            raise RequestError(
                f"{where}: got {image.width}x{image.height}, expected at most {MAX_PIXELS / 1e6:g} megapixels"
            )
        return ImageOps.exif_transpose(image)
    except RequestError:
        raise
    except Exception as error:  # of Pillow's many readers
        raise RequestError(f"{where}: cannot be read as a picture: {error}") from error


def fitted(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """A picture as large as those that are drawn: uint8 [height, width, 3], RGB.

    It is scaled to cover them (Lanczos), and its middle is cut out; what is transparent becomes white.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*_BACKGROUND, 255)), image)
    return np.array(_cut(_eight_bits(image).convert("RGB"), width, height, Image.Resampling.LANCZOS))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of greys with 16 bits the upper 8; Pillow would clip them."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))


def fitted_mask(mask: Image.Image, width: int, height: int) -> NDArray[np.bool_]:
    """A mask, laid over a picture as `fitted` lays it: bool [height, width], True where it is drawn anew.

    Of a mask with transparency these are its transparent parts, as OpenAI's API has it; of others the light ones.
    """
    if mask.has_transparency_data:
        values, is_drawn = mask.convert("RGBA").getchannel("A"), lambda x: x < 128
    else:
        values, is_drawn = _eight_bits(mask).convert("L"), lambda x: x >= 128
    return is_drawn(np.asarray(_cut(values, width, height, Image.Resampling.BILINEAR)))


def check_same_size(image: Image.Image, mask: Image.Image) -> None:
    """That a mask is for a picture.

    Raises:
        RequestError: it has another size.
    """
    if mask.size != image.size:
        got, expected = (f"{each.width}x{each.height}" for each in (mask, image))
        raise RequestError(f"mask: got {got}, expected {expected}, the size of its image")


def _cut(image: Image.Image, width: int, height: int, resampling: Image.Resampling) -> Image.Image:
    scale = max(width / image.width, height / image.height)
    cut_width, cut_height = width / scale, height / scale
    left, top = (image.width - cut_width) / 2, (image.height - cut_height) / 2
    box: Any = (left, top, left + cut_width, top + cut_height)
    return image.resize((width, height), resampling, box)
