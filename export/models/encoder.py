"""The convolutional encoder that the VAEs of all families share: layers of VQGAN, the mirror of `models.decoder`.

Module and parameter names are the official ones (`basic_vae.py` of VAR), so official state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.decoder import AttnBlock, GroupNorm, MidBlock, ResnetBlock


class Downsample2x(nn.Module):
    """A convolution with stride 2, padded at the right and at the bottom."""

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
    """`Encoder`: [B, 3, s*h, s*w] -> [B, C_vae, h, w], the side halved between levels."""

    def __init__(self, code_channels: int, level_channels: Sequence[int], num_blocks: int, *, attention: bool) -> None:
        super().__init__()
        channels = level_channels
        top = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(
                channels[max(level - 1, 0)],
                channels[level],
                num_blocks,
                attention=attention and level == top,
                downsample=level != top,
            )
            for level in range(len(channels))
        )
        self.mid = MidBlock(channels[top], attention)
        self.norm_out = GroupNorm(channels[top])
        self.conv_out = nn.Conv2d(channels[top], code_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


def from_pixels(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3], RGB -> fp32 [B, 3, H, W] in [-1, 1]."""
    # Contiguous: on the CPU, PyTorch's GroupNorm sums naively over channels that lie last, which is off by 4e-3.
    return (pixels.float() / 255 * 2 - 1).permute(0, 3, 1, 2).contiguous()
