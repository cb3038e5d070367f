"""The cache operator in numpy: the slow, plain definition that every other implementation is tested against."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def pivotal_tokens(x: Array, keep: int) -> Array:
    """The `keep` tokens of each row that lie farthest from the row's mean token.

    Args:
        x: [B, L, C], any float dtype; the score is computed in float32, because a sum of squares over C
            overflows float16 and bfloat16 has too few distinct values to rank tokens by.
        keep: K, 1 <= K <= L.

    Returns:
        int64 [B, K], in ascending position; ties in the score go to the lower position.

    Source: FastVAR's pivotal token selection, `s_i = ||x_i - mean(x)||^2`.
    """
    length = x.shape[1]
    if not 1 <= keep <= length:
        raise ValueError(f"keep: got {keep}, expected 1..{length} (the number of tokens)")
    x = x.astype(np.float32)
    deviation = x - x.mean(axis=1, keepdims=True)
    score = np.square(deviation).sum(axis=-1)  # [B, L]
    order = np.argsort(-score, axis=1, kind="stable")
    return np.sort(order[:, :keep], axis=1)


def gather_tokens(x: Array, indices: Array) -> Array:
    """Rows of `x` [B, L, C] at `indices` [B, K] (int64): [B, K, C], dtype of `x`."""
    return np.take_along_axis(x, indices[:, :, None], axis=1)


def area_weights(size_out: int, size_in: int) -> Array:
    """Area interpolation along one axis as a matrix: float32 [size_out, size_in], rows sum to 1.

    Output cell i averages the input cells floor(i*in/out) .. ceil((i+1)*in/out) - 1, as
    `torch.nn.functional.interpolate(mode="area")` does (adaptive average pooling).
    """
    weights = np.zeros((size_out, size_in), dtype=np.float32)
    for i in range(size_out):
        start, stop = i * size_in // size_out, math.ceil((i + 1) * size_in / size_out)
        weights[i, start:stop] = 1.0 / (stop - start)
    return weights


def restore_tokens(
    computed: Array, indices: Array, cached: Array, *, h: int, w: int, cached_h: int, cached_w: int
) -> Array:
    """A full token map from the computed tokens and the cache of an earlier scale.

    Args:
        computed: [B, K, C], the sublayer's output at the kept tokens.
        indices: int64 [B, K], their positions in the h*w map, no position twice.
        cached: [B, T, C] with T = cached_h*cached_w, the sublayer's output at the cache scale.

    Returns:
        [B, h*w, C], dtype of `computed`.

    Source: FastVAR's cached token restoration (area upsampling, then scatter).
    """
    batch, num_cached, channels = cached.shape
    if num_cached != cached_h * cached_w:
        raise ValueError(f"cached: got {num_cached} tokens, expected {cached_h} x {cached_w}")
    grid = cached.reshape(batch, cached_h, cached_w, channels).astype(np.float32)
    full = np.einsum("ij,bjkc->bikc", area_weights(h, cached_h), grid)
    full = np.einsum("ij,bkjc->bkic", area_weights(w, cached_w), full)
    out = full.reshape(batch, h * w, channels).astype(computed.dtype)
    np.put_along_axis(out, indices[:, :, None], computed, axis=1)
    return out
