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


@dataclasses.dataclass(frozen=True)
class CropStyle:
    """How much crops of one photograph differ: the smallest as a share of the largest square, how much of the way
    from one edge to the other their places cover, and whether half of them are mirrored."""

    smallest: float
    spread: float
    mirror: bool


VARIED = CropStyle(smallest=0.85, spread=0.5, mirror=True)
# The tokens of one scale are drawn independently of each other: where crops differ much and the scales before do not
# tell which one it is, the draw mixes them to nonsense.
ALIKE = CropStyle(smallest=0.95, spread=0.1, mirror=False)


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


def random_crop(image: Image.Image, side: int, rng: np.random.Generator, style: CropStyle = VARIED) -> NDArray[Any]:
    """A random square around the middle: uint8 [side, side, 3]."""
    length = round(min(image.size) * rng.uniform(style.smallest, 1.0))
    low, high = 0.5 - style.spread / 2, 0.5 + style.spread / 2
    left, top = (round((extent - length) * rng.uniform(low, high)) for extent in image.size)
    crop = image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + length, top + length))
    pixels = np.asarray(crop)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 and style.mirror else pixels.copy()


def random_crops(
    images: list[Image.Image],
    labels: NDArray[Any],
    side: int,
    rng: np.random.Generator,
    style: CropStyle = VARIED,
) -> NDArray[Any]:
    """One crop per label, as the VQVAE reads them: fp32 [N, 3, side, side] in [-1, 1]."""
    crops = np.stack([random_crop(images[label], side, rng, style) for label in labels])
    return crops.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
