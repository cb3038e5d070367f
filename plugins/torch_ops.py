"""The cache operator in torch: computes in eager mode, and is one custom node each in a traced graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastvar_trt.plugins import DOMAIN, GATHER_TOKENS, PIVOTAL_TOKENS, RESTORE_TOKENS, VERSION
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
    rows = torch.from_numpy(area_weights(h, cached_h)).to(cached.device)
    columns = torch.from_numpy(area_weights(w, cached_w)).to(cached.device)
    grid = cached.float().view(batch, cached_h, cached_w * channels)
    full = (rows @ grid).view(batch * h, cached_w, channels)
    out = (columns @ full).view(batch, h * w, channels).to(computed.dtype)
    return out.scatter(1, indices.unsqueeze(-1).expand(batch, keep, channels), computed)
