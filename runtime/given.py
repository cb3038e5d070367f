"""Given tokens: what a chain takes of a picture in place of drawing it.

A mask says where a picture is drawn anew; elsewhere every scale takes the picture's own tokens, as VAR's demo of
zero-shot editing does (`demo_zero_shot_edit.ipynb`). Or the first scales are the picture's, everywhere, and the rest is
drawn: variations, and of a picture that was enlarged, its details. Tokens of scales that the plan skips are given as
their sum, which the decoder adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.auxiliary import AuxiliaryGraph
from fastvar_trt.runtime.backends import Backend
from fastvar_trt.runtime.manifest import Variant

_FIRST_TOKENS = 3  # a map of so few is kept whole: it says what the whole picture is like (VAR's demo)


@dataclasses.dataclass(frozen=True)
class EncodedPicture:
    """A picture as tokens.

    Attributes:
        tokens: per scale of the schedule, skipped ones included: int32 [L] or uint8 [L, bits].
        f_hat: fp32 [C_vae, h_K, w_K], the token features of all scales.
        detail: the same of the scales alone that the plan skips.
    """

    tokens: Sequence[NDArray[Any]]
    f_hat: NDArray[Any]
    detail: NDArray[Any]


class ImageEncoder(AuxiliaryGraph):
    """The image encoder of a variant, which has one."""

    def __init__(self, backend: Backend, variant: Variant) -> None:
        assert variant.encoder is not None
        super().__init__(backend, variant.encoder)
        self._num_scales = len(variant.schedule)

    def encode(self, image: NDArray[Any]) -> EncodedPicture:
        """The tokens of a picture uint8 [H, W, 3], RGB."""
        found = self.run({names.PIXELS: np.ascontiguousarray(image)[None]})
        tokens = [found[names.given(scale)][0] for scale in range(self._num_scales)]
        return EncodedPicture(tokens, found[names.F_HAT][0], found[names.DETAIL][0])


def given_tensors(
    variant: Variant, picture: EncodedPicture, mask: NDArray[Any] | None = None, keep_scales: int | None = None
) -> dict[str, NDArray[Any]]:
    """The inputs of the role `GIVEN` of one image.

    A token is drawn where the mask has a pixel of its patch at the last scale; at the scales before, where less than
    half of it is kept, bilinearly.

    Args:
        variant: which size.
        picture: its tokens.
        mask: bool [H, W], where it is drawn anew; None: everywhere.
        keep_scales: how many of the first scales are the picture's everywhere; None or 0: none.
    """
    rows, columns = variant.schedule[-1]
    kept: NDArray[Any] = np.zeros((rows, columns), dtype=np.float32)
    if mask is not None:
        patches = mask.astype(bool).reshape(rows, mask.shape[0] // rows, columns, mask.shape[1] // columns)
        kept = np.where(patches.any(axis=(1, 3)), 0, 1).astype(np.float32)
    found: dict[str, NDArray[Any]] = {}
    for scale in variant.computed_scales:
        height, width = variant.schedule[scale]
        is_first = height * width <= _FIRST_TOKENS and kept.any()
        whole = is_first or scale < (keep_scales or 0)
        own = np.ones((height, width), bool) if whole else resized(kept, height, width) > 0.5
        found[names.is_given(scale)] = own.ravel()
        found[names.given(scale)] = picture.tokens[scale]
    scaled = picture.detail.shape[1] // rows, picture.detail.shape[2] // columns  # tokens may be patches of codes
    found[names.DETAIL] = picture.detail * np.kron(kept, np.ones(scaled, np.float32))
    return found


def resized(values: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """`F.interpolate(mode="bilinear")` of a map [h, w]: fp32 [height, width]."""
    rows, columns = _bilinear(height, values.shape[0]), _bilinear(width, values.shape[1])
    return rows @ values @ columns.T


def _bilinear(size_out: int, size_in: int) -> NDArray[Any]:
    """The interpolation along one axis as a matrix: fp32 [size_out, size_in]."""
    centres = np.clip((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0, size_in - 1)
    low = np.floor(centres).astype(int)
    high = np.minimum(low + 1, size_in - 1)
    share = (centres - low).astype(np.float32)
    matrix = np.zeros((size_out, size_in), dtype=np.float32)
    np.add.at(matrix, (np.arange(size_out), low), 1 - share)
    np.add.at(matrix, (np.arange(size_out), high), share)
    return matrix
