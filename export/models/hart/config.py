"""Sizes of a HART model, from its `config.json` and state dict. No I/O here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastvar_trt.export.models.checkpoint import count_indices, tensor_of
from fastvar_trt.runtime.errors import CheckpointError

_KIND = "a HART transformer"
# What `configuration.py` takes where config.json says nothing, of what no tensor tells.
_DEFAULTS: Mapping[str, Any] = {
    "num_heads": 16,
    "norm_eps": 1e-6,
    "num_sampling_steps": "8",
    "patch_nums": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "context_token": 77,
}
# The one architecture that HART's weights were published for, and that FastVAR prunes.
_REQUIRED: Mapping[str, Any] = {
    "attn_type": "llama",
    "mlp_type": "llama",
    "disable_aln": True,
    "use_cross_attn": False,
    "sampler": "iddpm",
}


@dataclasses.dataclass(frozen=True)
class HARTConfig:
    """A HART transformer with its residual diffusion."""

    depth: int
    width: int  # C
    num_heads: int  # H
    mlp_width: int
    vocab_size: int  # V
    code_channels: int  # C_vae
    patch_nums: tuple[int, ...]  # side of the token map per scale
    context_tokens: int  # T, of the text, padding included
    text_width: int  # C_text
    has_context_norm: bool
    has_timestep_embed: bool  # sinusoids and a network in place of a table of level embeddings
    attn_l2_norm: bool
    diffusion_width: int  # W
    diffusion_depth: int
    diffusion_steps: int
    norm_eps: float = 1e-6
    more_smooth: bool = False  # blend codes in place of drawn ones
    pads_left: bool = False  # the side of the tokenizer's padding

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.num_heads

    @property
    def attn_scale(self) -> float:
        """Factor on q·k, a quarter of the usual one; with L2-normalised q and k a learnt one per head replaces it."""
        return 1.0 if self.attn_l2_norm else 0.25 / math.sqrt(self.head_dim)

    @classmethod
    def from_files(cls, data: Mapping[str, Any], state: Mapping[str, Tensor]) -> HARTConfig:
        """Sizes from `llm/config.json` and the state dict.

        Args:
            data: the JSON object.
            state: the flat state dict.

        Raises:
            CheckpointError: another kind of model, or keys that name no HART.
        """
        for key, expected in _REQUIRED.items():
            if data.get(key) != expected:
                raise CheckpointError(
                    f"config.json: {key}: got {data.get(key)!r}, expected {expected!r}: no other HART was published"
                )
        word_embed = tensor_of(state, "word_embed.weight", _KIND, num_axes=2)
        context = tensor_of(state, "context_embed.weight", _KIND, num_axes=2)
        diffusion = tensor_of(state, "diffloss.net.input_proj.weight", _KIND, num_axes=2)
        told = {key: data.get(key, default) for key, default in _DEFAULTS.items()}
        config = cls(
            depth=count_indices(state, r"blocks\.(\d+)\."),
            width=word_embed.shape[0],
            num_heads=_positive(told, "num_heads"),
            mlp_width=tensor_of(state, "blocks.0.ffn.gate_proj.weight", _KIND, num_axes=2).shape[0],
            vocab_size=tensor_of(state, "head.weight", _KIND, num_axes=2).shape[0],
            code_channels=word_embed.shape[1],
            patch_nums=_patch_nums(told["patch_nums"]),
            context_tokens=_positive(told, "context_token"),
            text_width=context.shape[1],
            has_context_norm="context_norm.weight" in state,
            has_timestep_embed=any(key.startswith("lvl_embed.mlp.") for key in state),
            attn_l2_norm=any(key.endswith(".attn.scale_mul_1H11") for key in state),
            diffusion_width=diffusion.shape[0],
            diffusion_depth=count_indices(state, r"diffloss\.net\.res_blocks\.(\d+)\."),
            diffusion_steps=_steps(told["num_sampling_steps"]),
            norm_eps=_epsilon(told["norm_eps"]),
        )
        if config.width % config.num_heads or config.head_dim % 4:
            raise CheckpointError(
                f"config.json: num_heads: got {config.num_heads}, expected a divisor of the width {config.width} that "
                "leaves heads of a multiple of 4"
            )
        return config


def _positive(data: Mapping[str, Any], key: str) -> int:
    value = data[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key}: got {value!r}, expected a positive whole number")
    return value


def _epsilon(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise CheckpointError(f"config.json: norm_eps: got {value!r}, expected a number from 0 to 1")
    return float(value)


def _steps(value: Any) -> int:
    if not str(value).isdigit() or not 1 <= int(value) <= 1000:
        raise CheckpointError(f"config.json: num_sampling_steps: got {value!r}, expected a number of steps, 1 to 1000")
    return int(value)


def _patch_nums(value: Any) -> tuple[int, ...]:
    is_list = isinstance(value, list | tuple) and len(value) > 2 and all(isinstance(n, int) and n > 0 for n in value)
    if not is_list or value[0] != 1:
        raise CheckpointError(
            f"config.json: patch_nums: got {value!r}, expected the sides of three maps or more, from 1"
        )
    return tuple(value)
