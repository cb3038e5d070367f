"""The photographs inside scikit-image's wheel, one class each, as random crops."""

from __future__ import annotations

import dataclasses
import importlib.resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvar_trt.runtime.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One class: what it shows, its file in `skimage/data`, and who holds which rights."""

    name: str
    file: str
    licence: str


# Only photographs whose licence scikit-image states (which leaves out the stereo pair of the motorcycle).
PHOTOGRAPHS = (
    Photograph("astronaut", "astronaut.png", "NASA, public domain"),
    Photograph("cat", "chelsea.png", "Stefan van der Walt, CC0"),
    Photograph("coffee", "coffee.png", "Rachel Michetti, CC0"),
    Photograph("rocket", "rocket.jpg", "SpaceX, public domain"),
    Photograph("galaxies", "hubble_deep_field.jpg", "NASA, public domain"),
    Photograph("retina", "retina.jpg", "Mikael Haeggstroem, CC0"),
    Photograph("coins", "coins.png", "Brooklyn Museum, no known restrictions"),
    Photograph("cameraman", "camera.png", "Lav Varshney, CC0"),
)
_SMALLEST_CROP = 0.85  # of the largest square


def load_photographs(folder: Path | None = None) -> list[Image.Image]:
    """All photographs as RGB, in the order of the classes.

    Args:
        folder: where the files lie; default: scikit-image's data folder.

    Raises:
        CheckpointError: scikit-image is not installed, or a photograph is missing or damaged.
    """
    root: Any = folder
    if root is None:
        try:
            root = importlib.resources.files("skimage.data")
        except ImportError as error:
            raise CheckpointError(
                "scikit-image is not installed, and the photographs come with it; pip install 'fastvar-trt[train]'"
            ) from error
    images = []
    for photograph in PHOTOGRAPHS:
        path = root / photograph.file
        try:
            with path.open("rb") as file:
                images.append(Image.open(file).convert("RGB"))
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some damaged PNG files
            raise CheckpointError(
                f"photograph {path}: cannot be read ({error}); reinstall scikit-image, or give --photographs"
            ) from error
    return images


def random_crop(image: Image.Image, side: int, rng: np.random.Generator) -> NDArray[Any]:
    """A random square of at least 85 % of the largest, mirrored half of the time: uint8 [side, side, 3]."""
    largest = min(image.size)
    length = round(largest * rng.uniform(_SMALLEST_CROP, 1.0))
    # Wide photographs keep their subject: offsets come from the middle half of the range.
    left, top = (round((extent - length) * rng.uniform(0.25, 0.75)) for extent in image.size)
    crop = image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + length, top + length))
    pixels = np.asarray(crop)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels.copy()


def random_crops(images: list[Image.Image], labels: NDArray[Any], side: int, rng: np.random.Generator) -> NDArray[Any]:
    """One crop per label, as the VQVAE reads them: fp32 [N, 3, side, side] in [-1, 1]."""
    crops = np.stack([random_crop(images[label], side, rng) for label in labels])
    return crops.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
