"""Uniform noise for sampling, the same on every machine, backend and batch composition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**64 - 1


def uniform_noise(seed: int, scale: int, shape: int | tuple[int, ...]) -> NDArray[Any]:
    """Draws from U[0, 1) for one image at one scale: float32 of that shape, multiples of 2^-24.

    The counter-based generator Philox is keyed by (seed, scale), so a draw depends on nothing else. Its raw
    output is stable by numpy's compatibility policy; the conversion to float is ours, so that it is too.
    """
    raw = np.random.Philox(key=np.array([seed, scale], dtype=np.uint64)).random_raw(math.prod(np.atleast_1d(shape)))
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).astype(np.float32).reshape(shape)
