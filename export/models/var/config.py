"""Sizes of a VAR model, read from its state dict. No I/O here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastvar_trt.export.models.checkpoint import count_indices, tensor_of
from fastvar_trt.runtime.errors import CheckpointError

HEAD_DIM = 64  # official VAR models: width = 64 * depth, heads = depth


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
        word_embed = tensor_of(state, "word_embed.weight", kind, num_axes=2)
        width = word_embed.shape[0]
        # Any block tells, so that a key that is missing in one of them is named as missing.
        scale_mul = next((key for key in state if key.endswith(".attn.scale_mul_1H11")), None)
        official = width // HEAD_DIM if scale_mul is None else tensor_of(state, scale_mul, kind, num_axes=4).shape[1]
        num_heads = overrides.get("num_heads", official)
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
        length, expected = tensor_of(state, "pos_1LC", kind, num_axes=3).shape[1], sum(n * n for n in patch_nums)
        if length != expected:
            raise CheckpointError(f"pos_1LC: got {length} positions, but patch_nums {list(patch_nums)} need {expected}")
        return cls(
            depth=count_indices(state, r"blocks\.(\d+)\."),
            width=width,
            num_heads=num_heads,
            mlp_width=tensor_of(state, "blocks.0.ffn.fc1.weight", kind, num_axes=2).shape[0],
            num_classes=tensor_of(state, "class_emb.weight", kind, num_axes=2).shape[0] - 1,
            vocab_size=tensor_of(state, "head.weight", kind, num_axes=2).shape[0],
            code_channels=word_embed.shape[1],
            patch_nums=tuple(patch_nums),
            shared_aln=any(key.startswith("shared_ada_lin.") or key.endswith(".ada_gss") for key in state),
            attn_l2_norm=scale_mul is not None,
        )


def _patch_nums(levels: Tensor) -> tuple[int, ...]:
    """Map sides from the buffer `lvl_1L` [1, L], the scale that each position belongs to."""
    flat = levels.flatten().long()
    if len(flat) == 0 or int(flat.min()) < 0:
        raise CheckpointError("lvl_1L: expected the scale of every position, 0 or more")
    counts = flat.bincount().tolist()
    sides = tuple(math.isqrt(count) for count in counts)
    if any(side * side != count or side == 0 for side, count in zip(sides, counts, strict=True)):
        raise CheckpointError(f"lvl_1L: got {counts} positions per scale, expected squares")
    return sides
