"""Pictures as files in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from fastvar_trt.runtime.manifest import Manifest
from fastvar_trt.runtime.pictures import drawing_text, png_text
from fastvar_trt.runtime.request import TABLE
from fastvar_trt.runtime.service import ImageRequest

MEDIA_TYPES: Mapping[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode_image(image: NDArray[Any], kind: str, quality: int, text: Mapping[str, str] | None = None) -> bytes:
    """A picture as a file.

    Args:
        image: uint8 [H, W, 3], RGB.
        kind: of `MEDIA_TYPES`.
        quality: 1 to 100, of JPEG and WebP; PNG is lossless.
        text: what a PNG says of itself.
    """
    file = io.BytesIO()
    options: dict[str, Any] = {"pnginfo": png_text(text or {})} if kind == "png" else {"quality": quality}
    Image.fromarray(image).save(file, format=kind, **options)
    return file.getvalue()


def picture_text(manifest: Manifest, request: ImageRequest) -> dict[str, str]:
    """What a picture says of itself: see `drawing_text`."""
    values = {name: getattr(request, name) for name in TABLE}
    drawn = {name: value for name, value in values.items() if isinstance(value, str | int | float) and value != ""}
    variant = next((own for own in manifest.variants if own.name == request.variant), manifest.default)
    return drawing_text(manifest, variant, {**drawn, "edited": request.image is not None})
