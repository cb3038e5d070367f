"""Infinity's transformer for training: scales with teacher forcing, attention causal from scale to scale.

Parameter names are the official ones (`infinity.py`, `basic.py`). The step functions of `export.models.infinity`
compute the same, one scale at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.base import MAX_Q_SCALE
from fastvar_trt.export.models.infinity.checkpoint import rope_tables
from fastvar_trt.export.models.infinity.config import InfinityConfig
from fastvar_trt.tools.train_scenes.text import RMSNorm, text_mask

_JOINT_SCALES = 5  # the first, small ones share one attention with a mask


class _SelfAttention(nn.Module):
    """`SelfAttention` with L2-normalised queries and keys and rotary positions, scale by scale."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), 4.0).log())
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, C] -> queries, which carry the learnt scale, keys and values [B, H, L, D]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.scale_mul_1H11.clamp_max(math.log(MAX_Q_SCALE)).exp()
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], groups: Sequence[Group]) -> Tensor:
        q, k, v = self._project(x)
        q, k = rotated(q, rope), rotated(k, rope)
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, group.start : group.end],
                k[:, :, : group.end],
                v[:, :, : group.end],
                attn_mask=group.mask,
                scale=1.0,
            )
            for group in groups
        ]
        return self.proj(torch.cat(parts, dim=2).transpose(1, 2).flatten(2))


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on neighbouring channels; the even ones come first afterwards, which q·k does not see."""
    cos, sin = rope
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


class _CrossAttention(nn.Module):
    """`CrossAttention`."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        c = config.width
        self.num_heads = config.num_heads
        self.mat_q = nn.Linear(c, c)
        self.mat_kv = nn.Linear(c, 2 * c, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(c))
        self.proj = nn.Linear(c, c)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        kv = F.linear(text, self.mat_kv.weight, bias).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        q = self.mat_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mask = mask.expand(-1, -1, q.shape[2], -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """`FFN`."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Block(nn.Module):
    """`CrossAttnBlock` with shared adaptive norms."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.width, self.eps = config.width, config.norm_eps
        self.sa = _SelfAttention(config.width, config.num_heads)
        self.ca = _CrossAttention(config)
        self.ca_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.ffn = _FeedForward(config.width, config.mlp_width)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        text: Tensor,
        mask: Tensor,
        rope: tuple[Tensor, Tensor],
        groups: Sequence[Group],
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.ada_gss + condition).unbind(2)
        x = x + gamma1 * self.sa(F.layer_norm(x, (self.width,), eps=self.eps) * (1 + scale1) + shift1, rope, groups)
        x = x + self.ca(self.ca_norm(x), text, mask)
        return x + gamma2 * self.ffn(F.layer_norm(x, (self.width,), eps=self.eps) * (1 + scale2) + shift2)


class _AdaLNBeforeHead(nn.Module):
    """`AdaLNBeforeHead`; the head's owner applies it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class _PoolAttention(nn.Module):
    """One learnt query over the text."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        inner = config.pool_heads * config.pool_head_dim
        self.mat_q = nn.Parameter(torch.randn(1, config.pool_heads, config.pool_head_dim))
        self.mat_kv = nn.Linear(config.text_width, 2 * inner, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.proj = nn.Linear(inner, config.width)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        heads, dim = self.mat_q.shape[1:]
        kv = F.linear(text, self.mat_kv.weight, bias).unflatten(-1, (2, heads, dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H', T, D']
        q = self.mat_q.unsqueeze(2).expand(len(text), -1, -1, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1))


class TextPool(nn.Module):
    """`TextAttentivePool`: features [B, T, C_text] -> [B, C]."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ca = _PoolAttention(config)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        return self.ca(text, mask)


@dataclasses.dataclass(frozen=True)
class Group:
    """Tokens that attend together: `start` to `end`, over all up to `end`, under a mask or not."""

    start: int
    end: int
    mask: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Which tokens of a pyramid are computed.

    Attributes:
        rows: per scale, positions in its map: int64 [N], or None for all.
    """

    rows: tuple[Tensor | None, ...]

    def of(self, scale: int, per_position: Tensor) -> Tensor:
        """Those of [..., L, C]."""
        rows = self.rows[scale]
        return per_position if rows is None else per_position[..., rows, :]


def window(schedule: Sequence[tuple[int, int]], num_whole: int, share: float, place: tuple[float, float]) -> Tokens:
    """All tokens of the first scales, and of the others those of one part of the picture.

    Args:
        schedule: (height, width) per scale.
        num_whole: how many scales are whole.
        share: side of the part, of the picture's.
        place: where it lies, 0 to 1 each.
    """
    rows: list[Tensor | None] = []
    for scale, (height, width) in enumerate(schedule):
        if scale < num_whole:
            rows.append(None)
            continue
        h, w = max(round(share * height), 1), max(round(share * width), 1)
        top, left = round(place[0] * (height - h)), round(place[1] * (width - w))
        grid = torch.arange(height * width).view(height, width)
        rows.append(grid[top : top + h, left : left + w].flatten())
    return Tokens(tuple(rows))


class Transformer(nn.Module):
    """`Infinity`: text features and maps of the scales before to the logits of every bit."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        c, t = config.width, config.text_width
        self.config = config
        self.pos_start = nn.Parameter(torch.zeros(1, 1, c))
        self.cfg_uncond = nn.Parameter(torch.randn(config.text_length, t) / t**0.5)
        self.text_norm = RMSNorm(config.text_width, config.norm_eps)
        self.text_proj_for_sos = TextPool(config)
        self.text_proj_for_ca = nn.Sequential(nn.Linear(t, c), nn.GELU("tanh"), nn.Linear(c, c))
        self.lvl_embed = nn.Embedding(config.num_levels, c)
        self.word_embed = nn.Linear(config.bits, c)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.head_nm = _AdaLNBeforeHead(c)
        self.head = nn.Linear(c, 2 * config.bits)
        self._ropes = [rope_tables(config, scale) for scale in range(len(config.schedule))]
        self._initialise()

    def _initialise(self) -> None:
        c = self.config.width
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=0.5)
        for linear in (self.shared_ada_lin[1], self.head_nm.ada_lin[1], self.head):
            with torch.no_grad():
                linear.weight.mul_(0.1)  # type: ignore[operator]
        for block in self.blocks:
            assert isinstance(block, _Block)
            with torch.no_grad():
                for linear in (block.sa.proj, block.ca.proj, block.ffn.fc2):
                    linear.weight /= (2 * self.config.depth) ** 0.5
                block.ada_gss.normal_(std=c**-0.5)
                block.ada_gss[:, :, :2] += 0.5

    def forward(
        self, features: Tensor, counts: Tensor, dropped: Tensor, inputs: Sequence[Tensor], tokens: Tokens
    ) -> list[Tensor]:
        """Logits per scale.

        Args:
            features: of the text, [B, T, C_text].
            counts: how many of them are tokens, [B].
            dropped: bool [B], which pictures are drawn without their text, for guidance.
            inputs: what the scales but the first embed, [B, d, h, w] each.
            tokens: which are computed; as many scales as there are inputs, and one.

        Returns:
            [B, L, bits] per scale: of 1 against 0.
        """
        config = self.config
        features = torch.where(dropped[:, None, None], self.cfg_uncond[: features.shape[1]], features)
        text, mask = self.text_norm(features), text_mask(counts, features.shape[1])
        start = self.text_proj_for_sos(text, mask)
        text = self.text_proj_for_ca(text)
        parts = [(start[:, None] + self.pos_start) + self.lvl_embed.weight[0]]
        for scale, codes in enumerate(inputs, 1):
            embedded = self.word_embed(tokens.of(scale, codes.flatten(2).transpose(1, 2)))
            parts.append(embedded + self.lvl_embed.weight[scale])
        x = torch.cat(parts, dim=1)
        ropes = zip(*([tokens.of(k, part) for part in self._ropes[k]] for k in range(len(parts))), strict=True)
        cos, sin = (torch.cat([part.to(x.device) for part in table]) for table in ropes)
        lengths = [part.shape[1] for part in parts]
        groups = _groups(lengths, x.device)
        condition = self.shared_ada_lin(start).view(-1, 1, 6, config.width)
        for block in self.blocks:
            x = block(x, condition, text, mask, (cos, sin), groups)
        scale_, shift = self.head_nm.ada_lin(start).view(-1, 1, 2, config.width).unbind(2)
        x = F.layer_norm(x, (config.width,), eps=config.norm_eps) * (1 + scale_) + shift
        both = self.head(x).unflatten(-1, (config.bits, 2))
        return list((both[..., 1] - both[..., 0]).split(lengths, dim=1))


def _groups(lengths: Sequence[int], device: torch.device) -> list[Group]:
    joint = min(_JOINT_SCALES, len(lengths))
    levels = torch.repeat_interleave(torch.arange(joint), torch.tensor(lengths[:joint])).to(device)
    groups = [Group(0, len(levels), levels[:, None] >= levels[None])]
    for length in lengths[joint:]:
        groups.append(Group(groups[-1].end, groups[-1].end + length))
    return groups
