"""How alike two sets of images are: pixels, structure, and what the eye sees. By scikit-image and sewar, not by us."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvar_trt.runtime.errors import RequestError, UnavailableError

_THUMBNAIL = 64  # pixels a side, for comparing pictures that are not aligned


@dataclasses.dataclass(frozen=True)
class ImageMetrics:
    """One image against another of the same size.

    Attributes:
        psnr_db: peak signal-to-noise ratio; infinite for equal images.
        ssim: structural similarity (Wang et al. 2004), 1 for equal images.
        vif: visual information fidelity in the pixel domain (Sheikh and Bovik 2006), 1 for equal images; NaN where
            the reference is flat.
    """

    psnr_db: float
    ssim: float
    vif: float

    def texts(self) -> tuple[str, str, str]:
        """For a table, under `PSNR dB`, `SSIM` and `VIF`."""
        return f"{self.psnr_db:.2f}", f"{self.ssim:.4f}", "-" if np.isnan(self.vif) else f"{self.vif:.4f}"

    def to_json(self) -> dict[str, float | None]:
        """A JSON object; null for what is not finite."""
        return {
            name: round(value, 4) if np.isfinite(value) else None for name, value in dataclasses.asdict(self).items()
        }


def require_libraries() -> tuple[Any, Any]:
    """The metric libraries, `skimage.metrics` and `sewar`.

    Raises:
        UnavailableError: the extra `quality` is not installed.
    """
    try:
        import sewar
        import skimage.metrics
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed; pip install 'fastvar-trt[quality]'") from error
    return skimage.metrics, sewar


def image_metrics(reference: NDArray[Any], image: NDArray[Any], *, vif: bool = True) -> ImageMetrics:
    """Compare two images, uint8 [H, W, 3].

    Args:
        reference: what the other is compared with.
        image: what is judged.
        vif: compute VIF, which takes twenty times as long as the others together; NaN without.

    Raises:
        RequestError: the sizes differ.
        UnavailableError: the extra `quality` is not installed.
    """
    if reference.shape != image.shape:
        raise RequestError(f"images: got {image.shape}, expected {reference.shape}: bundles of one image size")
    metrics, sewar = require_libraries()
    if np.array_equal(reference, image):
        return ImageMetrics(float("inf"), 1.0, 1.0 if vif else float("nan"))
    with np.errstate(invalid="ignore"):  # 0 / 0 for flat images
        fidelity = float(sewar.vifp(reference, image)) if vif else float("nan")
    return ImageMetrics(
        psnr_db=float(metrics.peak_signal_noise_ratio(reference, image, data_range=255)),
        ssim=float(metrics.structural_similarity(reference, image, channel_axis=2, data_range=255)),
        vif=fidelity,
    )


def thumbnails(images: NDArray[Any]) -> NDArray[Any]:
    """uint8 [N, H, W, 3] -> fp32 [N, 64, 64, 3] in [0, 1]: what is left when details and small shifts are not."""
    size = (_THUMBNAIL, _THUMBNAIL)
    small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images]
    return np.stack(small).astype(np.float32) / 255


@dataclasses.dataclass(frozen=True)
class ReferenceMetrics:
    """Images against photographs of their classes.

    Attributes:
        distance: mean distance to the nearest photograph of the image's own class (`nearest_distances`).
        accuracy: share of the images whose nearest photograph is one of their own class.
    """

    distance: float
    accuracy: float


def reference_metrics(
    images: NDArray[Any], labels: Sequence[int], references: Mapping[int, NDArray[Any]]
) -> ReferenceMetrics:
    """How near images are to photographs of what they shall show.

    Args:
        images: uint8 [N, H, W, 3].
        labels: class of each.
        references: class -> uint8 [M, H', W', 3].

    Raises:
        RequestError: a class without photographs.
    """
    missing = sorted(set(labels) - set(references))
    if missing:
        raise RequestError(f"references: none of class {missing[0]}; give some of every class that is drawn")
    distances = np.stack([nearest_distances(images, photographs) for photographs in references.values()], axis=1)
    own = np.array([list(references).index(label) for label in labels])
    return ReferenceMetrics(
        distance=float(distances[np.arange(len(own)), own].mean()),
        accuracy=float((distances.argmin(axis=1) == own).mean()),
    )


def nearest_distances(images: NDArray[Any], references: NDArray[Any]) -> NDArray[Any]:
    """The distance of every image to its nearest reference, as the root mean square difference of thumbnails.

    Args:
        images: uint8 [N, H, W, 3].
        references: uint8 [M, H', W', 3].

    Returns:
        fp64 [N] in [0, 1].
    """
    from scipy.spatial.distance import cdist

    ours, theirs = (thumbnails(x).reshape(len(x), -1) for x in (images, references))
    return cdist(ours, theirs).min(axis=1) / np.sqrt(ours.shape[1])


def mean_metrics(metrics: Sequence[ImageMetrics]) -> ImageMetrics:
    """The mean of each; of PSNR over the images that differ, infinite where none does."""
    finite = [m.psnr_db for m in metrics if np.isfinite(m.psnr_db)]
    return ImageMetrics(
        psnr_db=float(np.mean(finite)) if finite else float("inf"),
        ssim=float(np.mean([m.ssim for m in metrics])),
        vif=float(np.mean([m.vif for m in metrics if not np.isnan(m.vif)] or [np.nan])),
    )
