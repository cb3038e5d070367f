"""Infinity's VAE for training: bits of a residual pyramid between an encoder and a decoder.

The decoder, the quantization and the key names are Infinity's (`flux_vqgan.py`, `bsq_vae/multiscale_bsq.py`). The
encoder is a light one that looks at pictures of half the size, so that rendering and encoding them costs a quarter. The
bits are learnt with a light decoder, too: Infinity's, which works on every pixel at full width, costs ten times as
much, and learns from bits that do not change any more.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.infinity.schedules import Schedule
from fastvar_trt.export.models.infinity.vae import LightEncoder, Residual


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """A feature map as bits, coarse to fine.

    Attributes:
        bits: bool [B, d, h, w] per scale: the signs of what is left.
        f_hat: the sum of their codes [B, d, h_K, w_K].
        inputs: the sum before each scale but the first, resized to it: what the transformer embeds.
    """

    bits: list[Tensor]
    f_hat: Tensor
    inputs: list[Tensor]


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`z_interplote_up` of the reference: [B, d, h, w] -> [B, d, *size]."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear")


@torch.no_grad()
def quantize(
    features: Tensor, schedule: Schedule, flips: Tensor | None = None, num_scales: int | None = None
) -> Pyramid:
    """`MultiScaleBSQ`: every scale codes the sign of what the ones before left.

    Args:
        features: fp32 [B, d, h_K, w_K].
        schedule: (height, width) per scale.
        flips: share of the bits that are drawn wrongly, per picture: [B, 1, 1, 1]. What follows corrects them
            (bitwise self-correction, section 3.4 of the paper); `bits` are the right ones.
        num_scales: of which the bits are wanted; default: all.
    """
    size = schedule[-1]
    value = features.shape[1] ** -0.5
    f_hat = torch.zeros_like(features)
    bits, inputs = [], []
    for scale, map_size in enumerate(schedule[:num_scales]):
        if scale:
            inputs.append(resized(f_hat, map_size))
        left = features - f_hat
        if map_size != size:
            left = F.interpolate(left, size=map_size, mode="area")
        drawn = left > 0
        bits.append(drawn)
        if flips is not None:
            # By the CPU's generator, whose state is kept with the training's.
            drawn = drawn ^ (torch.rand(left.shape).to(left.device) < flips)
        f_hat = f_hat + resized(torch.where(drawn, value, -value), size)
    return Pyramid(bits, f_hat, inputs)


class SketchDecoder(nn.Module):
    """[B, d, h, w] -> [B, 3, 8h, 8w]: pictures of half the size, good enough to learn bits by."""

    def __init__(self, code_bits: int, channels: tuple[int, int]) -> None:
        super().__init__()
        fine, coarse = channels
        self.layers = nn.Sequential(
            nn.Conv2d(code_bits, coarse, 3, padding=1),
            Residual(coarse),
            Residual(coarse),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            Residual(fine),
            nn.SiLU(),
            nn.Conv2d(fine, 3 * 4 * 4, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def forward(self, f_hat: Tensor) -> Tensor:
        return self.layers(f_hat)


class BitAutoEncoder(nn.Module):
    """The encoder, with the light decoder."""

    def __init__(self, code_bits: int, channels: tuple[int, int]) -> None:
        super().__init__()
        self.encoder = LightEncoder(code_bits, channels)
        self.decoder = SketchDecoder(code_bits, channels)
