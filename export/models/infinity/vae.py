"""The decoding half of Infinity's VAE: bits are codes, so there is nothing but a decoder.

Layers are those of VAR's decoder without attention; `official_key` maps the official names (`flux_vqgan.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvar_trt.export.models.decoder import Decoder, to_image
from fastvar_trt.export.models.infinity.config import BSQVAEConfig


class BSQDecoder(nn.Module):
    """`AutoEncoder.decode`: summed codes to an image."""

    def __init__(self, config: BSQVAEConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config.code_bits, config.level_channels, config.num_blocks, attention=False)

    def forward(self, f_hat: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [B, d, h, w] -> image fp32 [B, 3, s*h, s*w] in [0, 1], pixels uint8 [B, s*h, s*w, 3]; both RGB."""
        return to_image(self.decoder(f_hat.to(self.decoder.conv_in.weight.dtype)))


def official_keys(config: BSQVAEConfig) -> dict[str, tuple[tuple[str, str], tuple[int, ...]]]:
    """Parameter of `BSQDecoder` -> its official key (wrapped in `Conv` or `Normalize`, or not), and its shape."""
    with torch.device("meta"):
        parameters = BSQDecoder(config).state_dict()
    keys = {}
    for name, tensor in parameters.items():
        stem, _, leaf = name.rpartition(".")
        wrapper = "norm" if "norm" in stem.rpartition(".")[2] else "conv"
        keys[name] = ((f"{stem}.{wrapper}.{leaf}", name), tuple(tensor.shape))
    return keys
