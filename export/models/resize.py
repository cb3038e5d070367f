"""Interpolation along one axis as a constant matrix: exact, and one MatMul on every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.plugins.oracle import area_weights


def area_matrix(size_out: int, size_in: int) -> Tensor:
    """`F.interpolate(mode="area")` along one axis: fp32 [size_out, size_in]."""
    return torch.from_numpy(area_weights(size_out, size_in))


def bicubic_matrix(size_out: int, size_in: int) -> Tensor:
    """`F.interpolate(mode="bicubic")` along one axis: fp32 [size_out, size_in]."""
    return _interpolation_matrix(size_out, size_in, "bicubic")


def bilinear_matrix(size_out: int, size_in: int) -> Tensor:
    """`F.interpolate(mode="bilinear")` along one axis: fp32 [size_out, size_in]."""
    return _interpolation_matrix(size_out, size_in, "bilinear")


def _interpolation_matrix(size_out: int, size_in: int, mode: str) -> Tensor:
    # Interpolation is linear in its input, so interpolating the unit vectors gives the matrix, with the kernel and
    # the border handling of torch itself.
    unit = torch.eye(size_in).view(size_in, 1, size_in, 1)
    # The other axis has one cell, which every tap reads: their weights sum to 1.
    resized = F.interpolate(unit, size=(size_out, 1), mode=mode)
    return resized.view(size_in, size_out).T.contiguous()


def resize_map(x: Tensor, rows: Tensor, columns_t: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, h', w'] by `rows` [h', h] and `columns_t` [w, w'].

    The second is taken transposed: a transpose of a constant would be folded into a copy in every graph.
    """
    return rows @ (x @ columns_t)
