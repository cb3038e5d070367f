"""Pictures as files in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from PIL import Image

MEDIA_TYPES: Mapping[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode_image(image: NDArray[Any], kind: str, quality: int) -> bytes:
    """A picture as a file.

    Args:
        image: uint8 [H, W, 3], RGB.
        kind: of `MEDIA_TYPES`.
        quality: 1 to 100, of JPEG and WebP; PNG is lossless.
    """
    file = io.BytesIO()
    options = {} if kind == "png" else {"quality": quality}
    Image.fromarray(image).save(file, format=kind, **options)
    return file.getvalue()
