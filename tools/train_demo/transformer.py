"""VAR's transformer for training: all scales at once, with teacher forcing and a block-causal mask.

Parameter names are the official ones (`var.py`, `basic_var.py` of VAR). The step functions of `export.models.var`
compute the same, one scale at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.base import MAX_Q_SCALE
from fastvar_trt.export.models.var.config import VARConfig
from fastvar_trt.tools.train_demo.vqvae import Quantizer


class HeadProjections(nn.Module):
    """The projections of `SelfAttention` with L2-normalised queries and keys, of VAR and of Infinity."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), 4.0).log())
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, C] -> queries, which carry the learnt scale, keys and values [B, H, L, D]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.scale_mul_1H11.clamp_max(math.log(MAX_Q_SCALE)).exp()
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v


class Attention(HeadProjections):
    """`SelfAttention` of all scales at once."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """`FFN`, of VAR and of Infinity."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """`AdaLNSelfAttn` with shared adaptive norms."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.width = config.width
        self.attn = Attention(config.width, config.num_heads)
        self.ffn = FeedForward(config.width, config.mlp_width)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.ada_gss + condition).unbind(2)
        x = x + gamma1 * self.attn(F.layer_norm(x, (self.width,), eps=1e-6) * (1 + scale1) + shift1, mask)
        return x + gamma2 * self.ffn(F.layer_norm(x, (self.width,), eps=1e-6) * (1 + scale2) + shift2)


class AdaLNBeforeHead(nn.Module):
    """`AdaLNBeforeHead`, of VAR and of Infinity; the head's owner applies it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class Transformer(nn.Module):
    """`VAR`: class labels and token maps to logits of every token."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        assert config.shared_aln
        assert config.attn_l2_norm
        c, lengths = config.width, [n * n for n in config.patch_nums]
        self.config = config
        self.class_emb = nn.Embedding(config.num_classes + 1, c)
        self.pos_start = nn.Parameter(torch.zeros(1, lengths[0], c))
        self.pos_1LC = nn.Parameter(torch.zeros(1, sum(lengths), c))
        self.lvl_embed = nn.Embedding(len(lengths), c)
        self.word_embed = nn.Linear(config.code_channels, c)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(c)
        self.head = nn.Linear(c, config.vocab_size)
        levels = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.lvl_1L: Tensor
        self.register_buffer("lvl_1L", levels.unsqueeze(0))
        self._initialise()

    def _initialise(self) -> None:
        std = (1 / self.config.width / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=std)
        for block in self.blocks:
            assert isinstance(block, Block)
            with torch.no_grad():
                block.attn.proj.weight /= (2 * self.config.depth) ** 0.5
                block.ffn.fc2.weight /= (2 * self.config.depth) ** 0.5
                block.ada_gss[:, :, 2:] *= 0.5
                block.ada_gss[:, :, :2] *= 1e-5
                block.ada_gss[:, :, :2] += 1.0

    def forward(self, labels: Tensor, maps: Tensor) -> Tensor:
        """Logits of all scales.

        Args:
            labels: int64 [B]; `num_classes` stands for no class.
            maps: `teacher_maps`, [B, L - 1, C_vae].

        Returns:
            [B, L, V].
        """
        condition = self.class_emb(labels)  # [B, C]
        first = condition.unsqueeze(1) + self.pos_start
        x = torch.cat([first, self.word_embed(maps)], dim=1)
        x = x + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        mask = self.lvl_1L[0][:, None] >= self.lvl_1L[0][None, :]  # a scale sees itself and what came before
        shared = self.shared_ada_lin(condition).view(-1, 1, 6, self.config.width)
        for block in self.blocks:
            x = block(x, shared, mask)
        scale, shift = self.head_nm.ada_lin(condition).view(-1, 1, 2, self.config.width).unbind(2)
        return self.head(F.layer_norm(x, (self.config.width,), eps=1e-6) * (1 + scale) + shift)


@torch.no_grad()
def teacher_maps(quantizer: Quantizer, tokens: list[Tensor]) -> Tensor:
    """`idxBl_to_var_input`: what every scale but the first embeds, from the true tokens: fp32 [B, L - 1, C_vae]."""
    side = quantizer.patch_nums[-1]
    f_hat = torch.zeros(())
    maps = []
    for scale, next_side in enumerate(quantizer.patch_nums[1:]):
        f_hat = f_hat + quantizer.lookup(tokens[scale], scale, side)
        maps.append(F.interpolate(f_hat, size=(next_side, next_side), mode="area").flatten(2).transpose(1, 2))
    return torch.cat(maps, dim=1)
