"""Noise for sampling, the same on every machine, backend and batch composition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**64 - 1
_NORMAL, _GUMBEL = 2**32, 2**33  # streams beyond those of the scales


def uniform_noise(seed: int, scale: int, shape: int | tuple[int, ...]) -> NDArray[Any]:
    """Draws from U[0, 1) for one image at one scale: float32 of that shape, multiples of 2^-24.

    The counter-based generator Philox is keyed by (seed, scale), so a draw depends on nothing else. Its raw
    output is stable by numpy's compatibility policy; the conversion to float is ours, so that it is too.
    """
    raw = _raw(seed, scale, math.prod(np.atleast_1d(shape)))
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).astype(np.float32).reshape(shape)


def normal_noise(seed: int, scale: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """Draws from N(0, 1) for one image at one scale: float32 of that shape; independent of `uniform_noise`.

    By Box and Muller from the same generator, in float64. Processors may differ in the last bit of a logarithm.
    """
    count = math.prod(shape)
    pairs = (_raw(seed, scale + _NORMAL, 2 * math.ceil(count / 2)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    first, second = pairs.reshape(2, -1)
    radius = np.sqrt(-2 * np.log1p(-first))  # of (0, 1]
    angle = 2 * np.pi * second
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return normal[:count].astype(np.float32).reshape(shape)


def gumbel_noise(seed: int, scale: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """Draws from Gumbel(0, 1), -log of Exp(1), for one image at one scale: float32; independent of the others."""
    uniform = (_raw(seed, scale + _GUMBEL, math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return -np.log(-np.log1p(-uniform) + np.finfo(np.float64).tiny).astype(np.float32).reshape(shape)


def _raw(seed: int, stream: int, count: int) -> NDArray[np.uint64]:
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(count)
