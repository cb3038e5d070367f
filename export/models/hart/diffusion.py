"""HART's residual diffusion: what of the last scale's token features no code says (`diffloss.py`, `respace.py`).

All that depends on the schedule only is computed here, in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import torch
from torch import Tensor

_TRAINED_STEPS = 1000
_MAX_BETA = 0.999
FREQUENCIES = 256  # of `TimestepEmbedder`


@dataclasses.dataclass(frozen=True)
class DiffusionStep:
    """The constants of one step of `GaussianDiffusion.p_sample`, with x0 clamped to [-1, 1].

    Attributes:
        time: of the schedule that was trained.
        x0_of_x, x0_of_noise: x0 = x0_of_x x - x0_of_noise eps.
        mean_of_x0, mean_of_x: the posterior's mean.
        min_log, max_log: its log variance, at v = -1 and at v = 1.
    """

    time: int
    x0_of_x: float
    x0_of_noise: float
    mean_of_x0: float
    mean_of_x: float
    min_log: float
    max_log: float


def diffusion_steps(count: int) -> list[DiffusionStep]:
    """The steps in the order in which they are taken: from noise to picture (`SpacedDiffusion`, cosine schedule)."""
    edges = [math.cos((i / _TRAINED_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(_TRAINED_STEPS + 1)]
    betas = np.array([min(1 - after / before, _MAX_BETA) for before, after in itertools.pairwise(edges)])
    times = _spaced(count)
    abar = np.cumprod(1 - betas)[times]
    before = np.concatenate([[1.0], abar[:-1]])
    beta = 1 - abar / before
    variance = beta * (1 - before) / (1 - abar)
    log_variance = np.log(np.concatenate([variance[1:2], variance[1:]]) if count > 1 else variance.clip(1e-20))
    steps = [
        DiffusionStep(
            time=times[i],
            x0_of_x=math.sqrt(1 / abar[i]),
            x0_of_noise=math.sqrt(1 / abar[i] - 1),
            mean_of_x0=beta[i] * math.sqrt(before[i]) / (1 - abar[i]),
            mean_of_x=(1 - before[i]) * math.sqrt(1 - beta[i]) / (1 - abar[i]),
            min_log=log_variance[i],
            max_log=math.log(beta[i]),
        )
        for i in range(count)
    ]
    return steps[::-1]


def _spaced(count: int) -> list[int]:
    """`space_timesteps` of one section."""
    stride = 1.0 if count == 1 else (_TRAINED_STEPS - 1) / (count - 1)
    return [round(stride * i) for i in range(count)]


def sinusoids(time: float) -> Tensor:
    """`TimestepEmbedder.timestep_embedding`: fp32 [256], cosines first."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = time * frequencies
    return torch.cat([angles.cos(), angles.sin()])
