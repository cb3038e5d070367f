"""Infinity's VAE: bits are codes, so there is nothing but a decoder and an encoder.

Layers are those of VAR's without attention; `official_keys` maps the official names (`flux_vqgan.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.decoder import Decoder, to_image
from fastvar_trt.export.models.encoder import Encoder, from_pixels
from fastvar_trt.export.models.infinity.config import BSQVAEConfig


class BSQDecoder(nn.Module):
    """`AutoEncoder.decode`: summed codes to an image."""

    def __init__(self, config: BSQVAEConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config.code_bits, config.level_channels, config.num_blocks, attention=False)

    def forward(self, f_hat: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [B, d, h, w] -> image fp32 [B, 3, s*h, s*w] in [0, 1], pixels uint8 [B, s*h, s*w, 3]; both RGB."""
        return to_image(self.decoder(f_hat.to(self.decoder.conv_in.weight.dtype)))


class BSQEncoder(nn.Module):
    """`AutoEncoder.encode` as far as the features."""

    def __init__(self, config: BSQVAEConfig) -> None:
        super().__init__()
        channels, num_blocks = config.encoder_channels, config.encoder_blocks
        self.encoder: nn.Module
        if config.encoder_blocks:
            self.encoder = Encoder(config.code_bits, channels, num_blocks, attention=False)
        else:
            self.encoder = LightEncoder(config.code_bits, (channels[0], channels[1]))

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, s*h, s*w, 3], RGB -> fp32 [B, d, h, w]."""
        dtype = next(self.encoder.parameters()).dtype
        x = from_pixels(pixels)
        if isinstance(self.encoder, LightEncoder):
            x = F.avg_pool2d(x, 2)
        return self.encoder(x.to(dtype)).float()


class Residual(nn.Module):
    """Two convolutions beside the identity. No norm: a part of a picture is encoded as it is in the whole."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class LightEncoder(nn.Module):
    """The scene model's own, which looks at pictures of half the size: [B, 3, 8h, 8w] in [-1, 1] -> [B, d, h, w]."""

    def __init__(self, code_bits: int, channels: tuple[int, int]) -> None:
        super().__init__()
        fine, coarse = channels
        self.layers = nn.Sequential(
            nn.Conv2d(3, fine, 4, stride=4),
            Residual(fine),
            nn.Conv2d(fine, coarse, 2, stride=2),
            Residual(coarse),
            Residual(coarse),
            nn.SiLU(),
            nn.Conv2d(coarse, code_bits, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def official_keys(config: BSQVAEConfig) -> dict[str, tuple[tuple[str, str], tuple[int, ...]]]:
    """Parameter -> its official key (wrapped in `Conv` or `Normalize`, or not), and its shape."""
    with torch.device("meta"):
        parameters = BSQDecoder(config).state_dict()
        if config.encoder_channels:
            parameters |= BSQEncoder(config).state_dict()
    keys = {}
    for name, tensor in parameters.items():
        stem, _, leaf = name.rpartition(".")
        wrapper = "norm" if "norm" in stem.rpartition(".")[2] else "conv"
        keys[name] = ((f"{stem}.{wrapper}.{leaf}", name), tuple(tensor.shape))
    return keys
