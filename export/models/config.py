"""Sizes of a VAR model and of its VQVAE, read from their state dicts. No I/O here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastvar_trt.runtime.errors import CheckpointError

HEAD_DIM = 64  # official VAR models: width = 64 * depth, heads = depth


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """The decoding half of VAR's multi-scale VQVAE."""

    vocab_size: int  # V
    code_channels: int  # C_vae
    level_channels: tuple[int, ...]  # `ch * ch_mult`, finest level first
    num_blocks: int  # residual blocks per decoder level (`num_res_blocks + 1`)
    phi: str  # `shared`, `partially_shared` or `non_shared`: how scales share the residual convolutions
    num_phi: int
    phi_ratio: float = 0.5  # `quant_resi`: share of the convolution in phi; not in the state dict

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> VQVAEConfig:
        """Sizes from `vae_ch160v4096z32.pth` or a checkpoint of the same keys."""
        embedding = _tensor(state, "quantize.embedding.weight", "a VAR VQVAE")
        _tensor(state, "decoder.conv_in.weight", "a VAR VQVAE")
        if "quantize.quant_resi.qresi.weight" in state:
            phi, num_phi = "shared", 1
        elif "quantize.quant_resi.qresi_ls.0.weight" in state:
            phi, num_phi = "partially_shared", _count(state, "quantize.quant_resi.qresi_ls.{}.weight")
        else:
            phi, num_phi = "non_shared", _count(state, "quantize.quant_resi.{}.weight")
            if num_phi == 0:
                raise CheckpointError("not a VAR VQVAE: key quantize.quant_resi.* is missing")
        return cls(
            vocab_size=embedding.shape[0],
            code_channels=embedding.shape[1],
            level_channels=tuple(
                state[f"decoder.up.{level}.block.0.norm2.weight"].shape[0]
                for level in range(_count(state, "decoder.up.{}.block.0.norm2.weight"))
            ),
            num_blocks=_count(state, "decoder.up.0.block.{}.norm1.weight"),
            phi=phi,
            num_phi=num_phi,
        )

    @property
    def pixels_per_token(self) -> int:
        """Side of the image patch behind one token of the last scale."""
        return int(2 ** (len(self.level_channels) - 1))

    def phi_index(self, scale: int, num_scales: int) -> int:
        """Which residual convolution a scale uses (`PhiPartiallyShared.ticks`)."""
        if self.phi == "shared":
            return 0
        n = self.num_phi
        margin = 1 / 3 / n if n == 4 else 1 / 2 / n
        # Two ticks can be equally far but for rounding (scale 2 of 10), so the reference's own arithmetic decides.
        ticks = np.linspace(margin, 1 - margin, n)
        return int(np.argmin(np.abs(ticks - scale / max(num_scales - 1, 1))))


@dataclasses.dataclass(frozen=True)
class VARConfig:
    """A VAR transformer."""

    depth: int
    width: int  # C
    num_heads: int  # H
    mlp_width: int
    num_classes: int
    vocab_size: int  # V
    code_channels: int  # C_vae
    patch_nums: tuple[int, ...]  # side of the token map per scale
    shared_aln: bool  # one adaptive-norm layer for all blocks (VAR-d36), or one each
    attn_l2_norm: bool
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.num_heads

    @property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the token map per scale."""
        return tuple((n, n) for n in self.patch_nums)

    @property
    def attn_scale(self) -> float:
        """Factor on q·k: with L2-normalised q and k a learnt one per head replaces it."""
        return 1.0 if self.attn_l2_norm else 0.25 / math.sqrt(self.head_dim)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], overrides: Mapping[str, Any] | None = None) -> VARConfig:
        """Sizes from `var_d16.pth` .. `var_d36.pth` or a checkpoint of the same keys.

        Args:
            state: the flat state dict.
            overrides: what the state dict cannot tell: `num_heads` (without `attn_l2_norm` no tensor has it;
                the official width / 64 is then assumed) and `patch_nums` (where the buffer `lvl_1L` is missing).

        Raises:
            CheckpointError: keys that name no VAR, or sizes that contradict each other.
        """
        kind = "a VAR transformer"
        overrides = dict(overrides or {})
        unknown = set(overrides) - {"num_heads", "patch_nums"}
        if unknown:
            raise CheckpointError(
                f"--config: unknown key {sorted(unknown)[0]!r}; the keys are num_heads and patch_nums, everything "
                "else is read from the state dict"
            )
        word_embed = _tensor(state, "word_embed.weight", kind)
        width = word_embed.shape[0]
        scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
        num_heads = overrides.get("num_heads", scale_mul.shape[1] if scale_mul is not None else width // HEAD_DIM)
        if not isinstance(num_heads, int) or num_heads < 1 or width % num_heads:
            raise CheckpointError(f"num_heads: got {num_heads!r}, expected a divisor of the width {width} (--config)")
        patch_nums = overrides.get("patch_nums")
        if patch_nums is None:
            if "lvl_1L" not in state:
                raise CheckpointError(
                    "the state dict has no buffer lvl_1L to read the scales from; give "
                    "--config '{\"patch_nums\": [...]}'"
                )
            patch_nums = _patch_nums(state["lvl_1L"])
        if not isinstance(patch_nums, list | tuple) or not all(isinstance(n, int) and n > 0 for n in patch_nums):
            raise CheckpointError(f"patch_nums: got {patch_nums!r}, expected a list of positive whole numbers")
        length, expected = _tensor(state, "pos_1LC", kind).shape[1], sum(n * n for n in patch_nums)
        if length != expected:
            raise CheckpointError(f"pos_1LC: got {length} positions, but patch_nums {list(patch_nums)} need {expected}")
        return cls(
            depth=_count(state, "blocks.{}.attn.mat_qkv.weight"),
            width=width,
            num_heads=num_heads,
            mlp_width=_tensor(state, "blocks.0.ffn.fc1.weight", kind).shape[0],
            num_classes=_tensor(state, "class_emb.weight", kind).shape[0] - 1,
            vocab_size=_tensor(state, "head.weight", kind).shape[0],
            code_channels=word_embed.shape[1],
            patch_nums=tuple(patch_nums),
            shared_aln="shared_ada_lin.1.weight" in state,
            attn_l2_norm=scale_mul is not None,
        )


def _tensor(state: Mapping[str, Tensor], key: str, kind: str) -> Tensor:
    if key not in state:
        some = ", ".join(list(state)[:3])
        raise CheckpointError(f"not {kind}: key {key} is missing (the file has {some}, ...)")
    return state[key]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count


def _patch_nums(levels: Tensor) -> tuple[int, ...]:
    """Map sides from the buffer `lvl_1L` [1, L], the scale that each position belongs to."""
    counts = levels.flatten().long().bincount().tolist()
    sides = tuple(math.isqrt(count) for count in counts)
    if any(side * side != count or side == 0 for side, count in zip(sides, counts, strict=True)):
        raise CheckpointError(f"lvl_1L: got {counts} positions per scale, expected squares")
    return sides
