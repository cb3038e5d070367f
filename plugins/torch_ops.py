"""The operators in torch: they compute in eager mode, and are one custom node each in a traced graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.plugins import (
    DOMAIN,
    GATHER_TOKENS,
    GROUP_NORM,
    PIVOTAL_TOKENS,
    RESTORE_TOKENS,
    UPSAMPLE_CONV,
    VERSION,
)
from fastvar_trt.plugins.oracle import area_weights

Selector = Callable[[Tensor, int], Tensor]  # (x [B, L, C], K) -> int64 [B, K], ascending positions
_SCORE_NOISE = 1e-6  # relative to the token's own sum of squares


def pivotal_tokens(x: Tensor, keep: int) -> Tensor:
    """The `keep` tokens farthest from the mean token: [B, L, C] -> int64 [B, keep], ascending positions.

    See `fastvar_trt.plugins.oracle.pivotal_tokens`.
    """
    batch, length, _ = x.shape
    if not 1 <= keep <= length:
        raise ValueError(f"keep: got {keep}, expected 1..{length} (the number of tokens)")
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{PIVOTAL_TOKENS}",
            (x,),
            {"keep": keep},
            dtype=torch.int64,
            shape=(batch, keep),
            version=VERSION,
        )
    order = torch.argsort(_scores(x.float()), dim=1, descending=True, stable=True)
    return order[:, :keep].sort(dim=1).values


def _scores(x: Tensor) -> Tensor:
    """fp32 [B, L, C] -> [B, L], the squared distance to the mean token."""
    return (x - x.mean(dim=1, keepdim=True)).square().sum(dim=-1)


class GivenSelections:
    """A selector that returns selections made elsewhere, call by call, and judges each.

    Rounding lets near-ties fall differently in two implementations, and what follows differs altogether: outputs can
    be compared only where both have computed the same tokens.

    Attributes:
        shortfalls: per selection, what the sum of its scores lacks to the largest one possible, as a share of it: 0
            where tokens were swapped whose scores are the same.
    """

    def __init__(self, selections: Sequence[Tensor]) -> None:
        self._left = list(selections)
        self.shortfalls: list[float] = []

    def __call__(self, x: Tensor, keep: int) -> Tensor:
        """The next selection int64 [B, K], for x [B, L, C]."""
        given, chosen = self._left.pop(0), pivotal_tokens(x, keep)
        x = x.float()
        score = _scores(x)
        noise = _SCORE_NOISE * x.square().sum(dim=-1)  # what a score may be by rounding alone
        best, ours = score.gather(1, chosen).sum(1), score.gather(1, given).sum(1)
        self.shortfalls.append(float(((best - ours) / (best + noise.gather(1, chosen).sum(1))).max()))
        return given


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of `x` [B, L, C] at `indices` int64 [B, K]: [B, K, C]."""
    batch, _, channels = x.shape
    keep = indices.shape[1]
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{GATHER_TOKENS}",
            (x, indices),
            dtype=x.dtype,
            shape=(batch, keep, channels),
            version=VERSION,
        )
    return x.gather(1, indices.unsqueeze(-1).expand(batch, keep, channels))


def restore_tokens(
    computed: Tensor, indices: Tensor, cached: Tensor, *, h: int, w: int, cached_h: int, cached_w: int
) -> Tensor:
    """`computed` [B, K, C] scattered over the area-interpolated `cached` [B, T, C]: [B, h*w, C].

    See `fastvar_trt.plugins.oracle.restore_tokens`.
    """
    batch, keep, channels = computed.shape
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{RESTORE_TOKENS}",
            (computed, indices, cached),
            {"h": h, "w": w, "cached_h": cached_h, "cached_w": cached_w},
            dtype=computed.dtype,
            shape=(batch, h * w, channels),
            version=VERSION,
        )
    rows, columns = (_area_weights(*sizes, cached.device) for sizes in ((h, cached_h), (w, cached_w)))
    grid = cached.float().view(batch, cached_h, cached_w * channels)
    full = (rows @ grid).view(batch * h, cached_w, channels)
    out = (columns @ full).view(batch, h * w, channels).to(computed.dtype)
    return out.scatter(1, indices.unsqueeze(-1).expand(batch, keep, channels), computed)


def _area_weights(size_out: int, size_in: int, device: torch.device) -> Tensor:
    """`oracle.area_weights` on a device."""
    if device.type == "cpu":  # not kept: it may be made while shapes are traced, as a tensor without data
        return torch.from_numpy(area_weights(size_out, size_in))
    return _area_weights_there(size_out, size_in, device)


@torch.compiler.assume_constant_result
@functools.cache
def _area_weights_there(size_out: int, size_in: int, device: torch.device) -> Tensor:
    """Copied to the device once."""
    return torch.from_numpy(area_weights(size_out, size_in)).to(device)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, epsilon: float) -> Tensor:
    """Group normalisation of [B, C, h, w] by fp32 [C], computed in fp32: the dtype of `x`."""
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{GROUP_NORM}",
            (x, weight, bias),
            {"num_groups": num_groups, "epsilon": epsilon},
            dtype=x.dtype,
            shape=x.shape,
            version=VERSION,
        )
    return F.group_norm(x.float(), num_groups, weight, bias, epsilon).to(x.dtype)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, C, h, w] doubled by the nearest neighbour, then convolved with [C', C, 3, 3]: [B, C', 2h, 2w]."""
    if torch.onnx.is_in_onnx_export():
        batch, _, height, width = x.shape
        shape = (batch, weight.shape[0], 2 * height, 2 * width)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{UPSAMPLE_CONV}", (x, weight, bias), dtype=x.dtype, shape=shape, version=VERSION
        )
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
