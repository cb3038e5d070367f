"""How alike two sets of images are: pixels, structure, and what the eye sees. By scikit-image and sewar, not by us."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvar_trt.runtime.errors import BackendError, RequestError

_THUMBNAIL = 64  # pixels a side, for comparing pictures that are not aligned


@dataclasses.dataclass(frozen=True)
class ImageMetrics:
    """One image against another of the same size.

    Attributes:
        psnr_db: peak signal-to-noise ratio; infinite for equal images.
        ssim: structural similarity (Wang et al. 2004), 1 for equal images.
        vif: visual information fidelity in the pixel domain (Sheikh and Bovik 2006), 1 for equal images.
    """

    psnr_db: float
    ssim: float
    vif: float


def _libraries() -> tuple[Any, Any]:
    try:
        import sewar
        import skimage.metrics
    except ImportError as error:
        raise BackendError(f"{error.name} is not installed; pip install 'fastvar-trt[quality]'") from error
    return skimage.metrics, sewar


def image_metrics(reference: NDArray[Any], image: NDArray[Any]) -> ImageMetrics:
    """Compare two images, uint8 [H, W, 3].

    Raises:
        RequestError: the sizes differ.
        BackendError: the extra `quality` is not installed.
    """
    if reference.shape != image.shape:
        raise RequestError(f"images: got {image.shape}, expected {reference.shape}: bundles of one image size")
    metrics, sewar = _libraries()
    if np.array_equal(reference, image):
        return ImageMetrics(float("inf"), 1.0, 1.0)
    return ImageMetrics(
        psnr_db=float(metrics.peak_signal_noise_ratio(reference, image, data_range=255)),
        ssim=float(metrics.structural_similarity(reference, image, channel_axis=2, data_range=255)),
        vif=float(sewar.vifp(reference, image)),
    )


def thumbnails(images: NDArray[Any]) -> NDArray[Any]:
    """uint8 [N, H, W, 3] -> fp32 [N, 64, 64, 3] in [0, 1]: what is left when details and small shifts are not."""
    size = (_THUMBNAIL, _THUMBNAIL)
    small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images]
    return np.stack(small).astype(np.float32) / 255


def nearest_references(images: NDArray[Any], references: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The nearest reference picture of every image, by the root mean square difference of thumbnails.

    Args:
        images: uint8 [N, H, W, 3].
        references: uint8 [M, H', W', 3].

    Returns:
        index int64 [N] into the references, distance fp32 [N] in [0, 1].
    """
    ours, theirs = (thumbnails(x).reshape(len(x), -1) for x in (images, references))
    squared = (ours**2).sum(1)[:, None] + (theirs**2).sum(1)[None] - 2 * ours @ theirs.T
    distances = np.sqrt(np.maximum(squared, 0) / ours.shape[1])
    return distances.argmin(1), distances.min(1)


def mean_metrics(metrics: Sequence[ImageMetrics]) -> ImageMetrics:
    """The mean of each; of PSNR over the images that differ, infinite where none does."""
    finite = [m.psnr_db for m in metrics if np.isfinite(m.psnr_db)]
    return ImageMetrics(
        psnr_db=float(np.mean(finite)) if finite else float("inf"),
        ssim=float(np.mean([m.ssim for m in metrics])),
        vif=float(np.mean([m.vif for m in metrics])),
    )
