"""The convolutional decoder that the VAEs of all families share: layers of VQGAN.

Module and parameter names are the official ones (`basic_vae.py` of VAR), so official state dicts load as they are.
Normalisation and the attention's softmax run in fp32 whatever the precision: their sums overflow fp16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.plugins.torch_ops import group_norm, upsample_conv

NORM_GROUPS = 32  # of `Normalize` in basic_vae.py


class GroupNorm(nn.GroupNorm):
    """Group normalisation in fp32; the result has the input's dtype."""

    def __init__(self, channels: int) -> None:
        # Infinity's VAE takes 24 groups where 32 do not divide the channels.
        super().__init__(NORM_GROUPS if channels % NORM_GROUPS == 0 else 24, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight, self.bias, num_groups=self.num_groups, epsilon=self.eps)


class ResnetBlock(nn.Module):
    """`ResnetBlock`: [B, C_in, h, w] -> [B, C_out, h, w]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """`AttnBlock`: single-head self-attention over the positions of a [B, C, h, w] map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, channels, height * width)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]  # [B, C, hw]
        scores = (q.transpose(1, 2) @ k).float() * channels**-0.5  # [B, hw, hw]
        weights = scores.softmax(dim=-1).to(x.dtype)
        h = v @ weights.transpose(1, 2)
        return x + self.proj_out(h.view(batch, channels, height, width))


class Upsample2x(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        return upsample_conv(x, self.conv.weight, self.conv.bias)


class MidBlock(nn.Module):
    """The middle of the decoder."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class UpLevel(nn.Module):
    """One resolution of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(num_blocks if attention else 0))
        self.upsample = Upsample2x(out_channels) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(x)


class Decoder(nn.Module):
    """`Decoder`: [B, C_vae, h, w] -> [B, 3, s*h, s*w], the side doubled between levels."""

    def __init__(self, code_channels: int, level_channels: Sequence[int], num_blocks: int, *, attention: bool) -> None:
        super().__init__()
        channels = level_channels
        top = len(channels) - 1
        self.conv_in = nn.Conv2d(code_channels, channels[top], 3, padding=1)
        self.mid = MidBlock(channels[top], attention)
        self.up = nn.ModuleList(
            UpLevel(
                channels[min(level + 1, top)],
                channels[level],
                num_blocks,
                attention=attention and level == top,
                upsample=level != 0,
            )
            for level in range(len(channels))
        )
        self.norm_out = GroupNorm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def to_image(decoded: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, H, W] in [-1, 1] -> image fp32 [B, 3, H, W] in [0, 1], pixels uint8 [B, H, W, 3]."""
    image = decoded.float().clamp(-1, 1) * 0.5 + 0.5
    # Rounded to the nearest of 256 levels; the cast alone would truncate. It comes last: TensorRT knows uint8 as
    # the type of an input or output only.
    pixels = (image * 255 + 0.5).permute(0, 2, 3, 1).to(torch.uint8)
    return image, pixels
