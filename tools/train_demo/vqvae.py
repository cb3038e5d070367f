"""VAR's multi-scale VQVAE for training: the encoder and the residual quantizer around the exporter's decoder.

Parameter names and arithmetic are the official ones (`vqvae.py`, `basic_vae.py`, `quant.py` of VAR), so that a trained
state dict is an official checkpoint of a small width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.decoder import AttnBlock, Decoder, GroupNorm, MidBlock, ResnetBlock
from fastvar_trt.export.models.var.config import VQVAEConfig


class Downsample2x(nn.Module):
    """`Downsample2x`: a strided convolution, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownLevel(nn.Module):
    """One resolution of the encoder."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, downsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(num_blocks if attention else 0))
        self.downsample = Downsample2x(out_channels) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.downsample(x)


class Encoder(nn.Module):
    """`Encoder`: [B, 3, 16h, 16w] -> [B, C_vae, h, w]."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        channels = config.level_channels
        top = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(
                channels[max(level - 1, 0)],
                channels[level],
                config.num_blocks - 1,  # `num_res_blocks`; the decoder has one more
                attention=level == top,
                downsample=level != top,
            )
            for level in range(len(channels))
        )
        self.mid = MidBlock(channels[top], attention=True)
        self.norm_out = GroupNorm(channels[top])
        self.conv_out = nn.Conv2d(channels[top], config.code_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class _Phis(nn.Module):
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(
            nn.Conv2d(config.code_channels, config.code_channels, 3, padding=1) for _ in range(config.num_phi)
        )


class Quantizer(nn.Module):
    """`VectorQuantizer2`: residual quantization of a feature map, coarse to fine, with one code book."""

    def __init__(self, config: VQVAEConfig, patch_nums: tuple[int, ...]) -> None:
        super().__init__()
        assert config.phi == "partially_shared"
        self.config, self.patch_nums = config, patch_nums
        self.embedding = nn.Embedding(config.vocab_size, config.code_channels)
        self.quant_resi = _Phis(config)

    def phi(self, h: Tensor, scale: int) -> Tensor:
        """The residual convolution of a scale."""
        ratio = self.config.phi_ratio
        conv = self.quant_resi.qresi_ls[self.config.phi_index(scale, len(self.patch_nums))]
        return h * (1 - ratio) + conv(h) * ratio

    def nearest(self, features: Tensor) -> Tensor:
        """Indices of the nearest codes: fp32 [N, C_vae] -> int64 [N]."""
        codes = self.embedding.weight.detach()
        distances = codes.square().sum(1) - 2 * features @ codes.T
        return distances.argmin(dim=1)

    def lookup(self, tokens: Tensor, scale: int, side: int) -> Tensor:
        """What one token map adds to f_hat: int64 [B, L] -> [B, C_vae, side, side]."""
        n = self.patch_nums[scale]
        h = self.embedding(tokens).transpose(1, 2).unflatten(2, (n, n))
        if n != side:
            h = F.interpolate(h, size=(side, side), mode="bicubic")
        return self.phi(h.contiguous(), scale)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Quantize with a straight-through gradient.

        Args:
            features: fp32 [B, C_vae, h, w].

        Returns:
            f_hat [B, C_vae, h, w], the quantization loss, tokens per scale (int64 [B, L]), and the residuals that were
            quantized per scale ([B * L, C_vae]).
        """
        batch, channels, side, _ = features.shape
        target = features.detach()
        rest, f_hat = target.clone(), torch.zeros_like(target)
        loss = target.new_zeros(())
        tokens, residuals = [], []
        for scale, n in enumerate(self.patch_nums):
            pooled = F.interpolate(rest, size=(n, n), mode="area") if n != side else rest
            rows = pooled.permute(0, 2, 3, 1).reshape(-1, channels)
            residuals.append(rows)
            tokens.append(self.nearest(rows).view(batch, n * n))
            h = self.lookup(tokens[-1], scale, side)
            f_hat = f_hat + h
            rest = rest - h.detach()
            loss = loss + _COMMITMENT * F.mse_loss(features, f_hat.detach()) + F.mse_loss(f_hat, target)
        return features + (f_hat - features).detach(), loss / len(self.patch_nums), tokens, residuals


_COMMITMENT = 0.25  # `beta` of VectorQuantizer2


class VQVAE(nn.Module):
    """`VQVAE`: encoder, quantizer and decoder with the official parameter names."""

    def __init__(self, config: VQVAEConfig, patch_nums: tuple[int, ...]) -> None:
        super().__init__()
        c = config.code_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(c, c, 3, padding=1)
        self.quantize = Quantizer(config, patch_nums)
        self.post_quant_conv = nn.Conv2d(c, c, 3, padding=1)
        self.decoder = Decoder(config.code_channels, config.level_channels, config.num_blocks, attention=True)

    def encode(self, images: Tensor) -> Tensor:
        """fp32 [B, 3, 16h, 16w] in [-1, 1] -> features fp32 [B, C_vae, h, w]."""
        return self.quant_conv(self.encoder(images)).float()

    def decode(self, f_hat: Tensor) -> Tensor:
        """Features -> images, not clamped: fp32 [B, 3, 16h, 16w]."""
        return self.decoder(self.post_quant_conv(f_hat)).float()
