"""The decoding half of VAR's multi-scale VQVAE (`vqvae.py` of VAR); the official state dict loads as it is."""

from __future__ import annotations

from torch import Tensor, nn

from fastvar_trt.export.models.decoder import Decoder, to_image
from fastvar_trt.export.models.var.config import VQVAEConfig


class ImageDecoder(nn.Module):
    """`VQVAE.fhat_to_img`: token features to an image."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.code_channels, 3, padding=1)
        self.decoder = Decoder(config.code_channels, config.level_channels, config.num_blocks, attention=True)

    def forward(self, f_hat: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [B, C_vae, h, w] -> image fp32 [B, 3, 16h, 16w] in [0, 1], pixels uint8 [B, 16h, 16w, 3]."""
        return to_image(self.decoder(self.post_quant_conv(f_hat.to(self.post_quant_conv.weight.dtype))))
