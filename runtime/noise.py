"""Uniform noise for sampling, the same on every machine, backend and batch composition."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**64 - 1


def uniform_noise(seed: int, scale: int, count: int) -> NDArray[Any]:
    """`count` draws from U[0, 1) for one image at one scale: float32 [count], multiples of 2^-24.

    The counter-based generator Philox is keyed by (seed, scale), so a draw depends on nothing else. Its raw
    output is stable by numpy's compatibility policy; the conversion to float is ours, so that it is too.
    """
    raw = np.random.Philox(key=np.array([seed, scale], dtype=np.uint64)).random_raw(count)
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).astype(np.float32)
