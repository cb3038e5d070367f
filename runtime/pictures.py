"""Pictures as files, and as what a bundle takes of them."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.manifest import Manifest, Variant

MAX_PIXELS = 40_000_000  # of a file: beyond, it is taken for one that is there to fill the memory
# Not all that Pillow reads: some of its readers are rarely looked at, one starts Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_FINEST = 3  # halvings after which differences of colour are looked at: what is finer is detail
_EDGES = 128  # soft edges of what is pasted, in the shorter side of a picture
_BACKGROUND = (255, 255, 255)  # behind what is transparent


def read_picture(source: Path | bytes, name: str = "image") -> Image.Image:
    """A picture from a file, upright; not yet of the size that is drawn.

    Args:
        source: the file, or its content: PNG, JPEG, WebP, GIF, BMP or TIFF.
        name: of the value, for errors.

    Raises:
        RequestError: it is no picture, or has more than `MAX_PIXELS`.
    """
    where = f"{name} {source}" if isinstance(source, Path) else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `MAX_PIXELS` is lower
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
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
    if is_transparent(image):
        own = _cut(image.convert("RGBA"), width, height, Image.Resampling.LANCZOS)
        return np.array(Image.alpha_composite(Image.new("RGBA", own.size, (*_BACKGROUND, 255)), own).convert("RGB"))
    return np.array(_cut(_eight_bits(image).convert("RGB"), width, height, Image.Resampling.LANCZOS))


def is_transparent(image: Image.Image) -> bool:
    """Whether any of it is; canvases of browsers write files that could be and are not."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of greys with 16 bits the upper 8; Pillow would clip them."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))


def fitted_mask(mask: Image.Image, width: int, height: int) -> NDArray[np.bool_]:
    """A mask, laid over a picture as `fitted` lays it: bool [height, width], True where it is drawn anew.

    Of a mask with transparency these are its transparent parts, as OpenAI's API has it; of others the light ones.
    """
    if is_transparent(mask):
        values, is_drawn = mask.convert("RGBA").getchannel("A"), lambda x: x < 128
    else:
        values, is_drawn = _eight_bits(mask).convert("L"), lambda x: x >= 128
    return is_drawn(np.asarray(_cut(values, width, height, Image.Resampling.BILINEAR)))


def pasted(drawn: NDArray[np.uint8], image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """What was drawn, in a picture: outside of the mask the picture's own pixels.

    What was decoded from tokens is a little off in its colours: inside, it is moved by what it is off by around the
    mask, and has a soft edge.

    Args:
        drawn: uint8 [H, W, 3].
        image: the picture, likewise.
        mask: bool [H, W], where it was drawn.
    """
    width = max(min(mask.shape) // _EDGES, 1)
    eroded = Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
    share = np.zeros(mask.shape, dtype=np.float32)  # from the edge inwards: 1 / width, 2 / width, ... 1
    for _ in range(width):
        share += np.asarray(eroded, dtype=np.float32) / (255 * width)
        eroded = eroded.filter(ImageFilter.MinFilter(3))
    off = _continued(image.astype(np.float32) - drawn, ~mask)
    mixed = image + share[..., None] * (drawn + off - image)
    return np.where(mask[..., None], mixed.clip(0, 255) + 0.5, image).astype(np.uint8)


def _continued(values: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[Any]:
    """A map fp32 [H, W, 3], smoothed where it is known, continued where it is not: coarser means fill what finer ones
    leave (pull-push, Gortler et al. 1996)."""
    weights = known.astype(np.float32)[..., None]
    levels = []
    sums, counts = _halved(values * weights), _halved(weights)
    while True:
        levels.append((sums / np.maximum(counts, 1e-6), np.minimum(counts, 1)))
        if max(counts.shape[:2]) == 1:
            break
        sums, counts = _halved(levels[-1][0] * levels[-1][1]), _halved(levels[-1][1])
    smooth = levels[-1][0]
    for mean, weight in reversed(levels[_FINEST:-1]):
        smooth = weight * mean + (1 - weight) * _stretched(smooth, mean.shape[:2])
    return _stretched(smooth, values.shape[:2])


def _halved(values: NDArray[Any]) -> NDArray[Any]:
    """Sums over 2x2 of fp32 [H, W, C]; odd sides are padded."""
    height, width, channels = values.shape
    padded = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    return padded.reshape((height + 1) // 2, 2, (width + 1) // 2, 2, channels).sum((1, 3))


def _stretched(values: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """fp32 [h, w, 3] to [*shape, 3], bilinearly."""
    bilinear = Image.Resampling.BILINEAR
    planes = [Image.fromarray(np.ascontiguousarray(values[..., c])) for c in range(values.shape[2])]
    return np.stack([np.asarray(plane.resize((shape[1], shape[0]), bilinear)) for plane in planes], axis=-1)


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


def drawing_text(manifest: Manifest, variant: Variant, values: Mapping[str, Any]) -> dict[str, str]:
    """What a picture says of itself: what it was drawn of and with, and of which bundle.

    The bundle is named by the SHA-256 of its manifest, which has those of all files.
    """
    details = {
        **values,
        "size": variant.size,
        "plan": variant.plan.name,
        "precision": manifest.precision,
        "bundle_sha256": manifest.identity,
    }
    return {"Software": "fastvar-trt", "fastvar": json.dumps(details)}


def png_text(text: Mapping[str, str]) -> PngInfo:
    """Texts for a PNG."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    return info
