"""VAR: class-conditional, tokens from a code book (github.com/FoundationVision/VAR).

Differences from the reference, all exact up to rounding: adaptive-norm modulations are computed once per image
instead of once per scale; guidance is applied to the hidden state before the head, which is linear, instead of to the
logits; interpolations are constant matrices; sampling is by inverse CDF from one uniform number per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.export.models.base import BlockSpec, block_geometry, config_from_json, l2_normalised
from fastvar_trt.export.models.checkpoint import check_keys, load_state_dict
from fastvar_trt.export.models.codebook import CodeBookModel
from fastvar_trt.export.models.matrix import linear_names
from fastvar_trt.export.models.var.checkpoint import NESTED, transformer_tensors, var_problems
from fastvar_trt.export.models.var.config import VARConfig
from fastvar_trt.export.models.vqvae import VQVAEConfig
from fastvar_trt.plugins.torch_ops import Selector
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.manifest import Condition, ModelSpec, Role, SamplingSpec, TensorSpec, Tokens
from fastvar_trt.runtime.plan import ResolvedPlan
from fastvar_trt.runtime.precision import Precision
from fastvar_trt.runtime.request import GRAPH_INPUTS

DEFAULT_TOP_K = 900  # VAR's sampling settings: demo_sample.ipynb
DEFAULT_TOP_P = 0.96
DEFAULT_CFG = 1.5


@dataclasses.dataclass(frozen=True)
class VARBlockSpec(BlockSpec):
    """A layer of VAR (`AdaLNSelfAttn`)."""

    attn_l2_norm: bool

    sublayers = ("attn", "ffn")

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the layer's weights, below `blocks.<layer>.`."""
        q_scale = ("attn.q_scale",) if self.attn_l2_norm else ()
        return (*q_scale, *linear_names(self.precision, "attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2"))

    def run(self, tensors: Mapping[str, Tensor], select: Selector) -> tuple[Tensor, ...]:
        """See `BlockSpec.run`."""
        x, modulation, ones = tensors["x"], tensors["modulation"], tensors["norm.weight"]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (modulation[:, i : i + 1] for i in range(6))  # [B2, 1, C]

        computed, indices = self.selected(x, select)
        hidden = self.modulated(computed, ones, scale1, shift1)
        attended, new_k, new_v = self._attention(tensors, hidden)
        y_attn = self._gated(self.linear(tensors, "attn.proj", attended), gamma1)
        y_attn = self.restored(y_attn, indices, tensors.get("cached_attn"))
        x = x + y_attn.float()

        computed, indices = self.selected(x, select)
        hidden = self.modulated(computed, ones, scale2, shift2)
        hidden = F.gelu(self.linear(tensors, "ffn.fc1", hidden), approximate="tanh")
        y_ffn = self._gated(self.linear(tensors, "ffn.fc2", hidden), gamma2)
        y_ffn = self.restored(y_ffn, indices, tensors.get("cached_ffn"))
        x = x + y_ffn.float()
        return self.collect(x, new_k, new_v, (y_attn, y_ffn))

    def _gated(self, y: Tensor, gamma: Tensor) -> Tensor:
        """[B2*K, C] times gamma [B2, 1, C]: [B2, K, C] in the compute dtype."""
        return (y.view(self.rows, self.num_computed, self.channels).float() * gamma).to(self.dtype)

    def _attention(self, tensors: Mapping[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Self-attention of [B2*K, C]: the result [B2*K, C], new keys and values [K, B2, H, D]."""
        heads = (self.num_heads, self.channels // self.num_heads)
        qkv = self.linear(tensors, "attn.mat_qkv", hidden)  # [B2*K, 3C]
        q, k, v = qkv.view(self.rows, self.num_computed, 3, *heads).unbind(2)  # [B2, K, H, D]
        if self.attn_l2_norm:
            q = (l2_normalised(q) * tensors["attn.q_scale"]).to(self.dtype)
            k = l2_normalised(k).to(self.dtype)
        return self.attend(tensors, q, k, v)


class VAR(CodeBookModel):
    """A class-conditional VAR with its decoder, over the deployment tensors of `models.var.checkpoint`."""

    sublayers = VARBlockSpec.sublayers

    def __init__(self, config: VARConfig, vae_config: VQVAEConfig, precision: Precision) -> None:
        super().__init__(config.patch_nums, config.depth, vae_config, precision)
        self.config = config

    def load_transformer(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """An official file, checked."""
        state = load_state_dict(checkpoint, NESTED)
        check_keys({"--checkpoint": var_problems(self.config, state)})
        return state

    def transformer_tensors(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All of the transformer's."""
        return transformer_tensors(self.config, state, self.precision)

    def model_spec(self) -> ModelSpec:
        """Classes, an index into the code book per position, and sizes."""
        config = self.config
        return ModelSpec(
            family="var",
            condition=Condition.CLASS,
            tokens=Tokens.INDEX,
            depth=config.depth,
            width=config.width,
            num_heads=config.num_heads,
            mlp_width=config.mlp_width,
            vocab_size=config.vocab_size,
            code_channels=config.code_channels,
            num_classes=config.num_classes,
        )

    def sampling_spec(self) -> SamplingSpec:
        """Sampling limits and defaults for the manifest."""
        max_top_k = len(self.weight("sampling.rank"))
        return SamplingSpec(max_top_k, DEFAULT_CFG, min(DEFAULT_TOP_K, max_top_k), DEFAULT_TOP_P, neutral_cfg=0.0)

    def configs(self) -> dict[str, Any]:
        """The configurations of transformer and VQVAE."""
        return {"var": dataclasses.asdict(self.config), "vae": dataclasses.asdict(self.vae_config)}

    @classmethod
    def from_configs(cls, configs: Mapping[str, Any], precision: Precision) -> VAR:
        """The model of `configs`, without weights.

        Raises:
            KeyError, TypeError: they are not complete.
        """
        return cls(
            config_from_json(VARConfig, configs["var"]), config_from_json(VQVAEConfig, configs["vae"]), precision
        )

    def condition_inputs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Class indices."""
        return (TensorSpec(names.LABELS, (batch,), "int64", Role.CONDITION),)

    def condition_outputs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Start token and modulations."""
        rows, width = 2 * batch, self.config.width
        return (
            TensorSpec(names.START, (rows, width), "float32"),
            *(
                TensorSpec(names.modulation(i), (rows, 6, width), "float32", Role.MODULATION, layer=i)
                for i in range(self.depth)
            ),
            TensorSpec(names.HEAD_MODULATION, (rows, 2, width), "float32", Role.MODULATION),
        )

    def example_condition(self, batch: int) -> dict[str, Tensor]:
        """The first classes."""
        return {names.LABELS: torch.arange(batch) % self.config.num_classes}

    def request_inputs(self, scale: int) -> tuple[str, ...]:
        """All; the guidance ramp starts at 0."""
        return tuple(name for name in GRAPH_INPUTS if scale != 0 or name != "cfg")

    def condition(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """labels int64 [B] -> start [B2, C], per layer the modulation [B2, 6, C], head modulation [B2, 2, C]; fp32."""
        labels = inputs[names.LABELS]
        width = self.config.width
        unconditional = torch.full_like(labels, self.config.num_classes)
        start = F.embedding(torch.cat([labels, unconditional]), self.weight("class_emb.weight"))  # [B2, C]
        activated = F.silu(start).to(self.dtype)

        if self.config.shared_aln:
            shared = self.project("shared_modulation", activated).view(-1, 6, width)
            modulations = [shared + self.weight(f"blocks.{i}.modulation.bias") for i in range(self.depth)]
        else:
            projected = [self.project(f"blocks.{i}.modulation", activated) for i in range(self.depth)]
            modulations = [modulation.view(-1, 6, width) for modulation in projected]
        head = self.project("head_modulation", activated)
        by_layer = {names.modulation(i): modulation for i, modulation in enumerate(modulations)}
        return {names.START: start, **by_layer, names.HEAD_MODULATION: head.view(-1, 2, width)}

    def block_spec(self, plan: ResolvedPlan, scale: int, layer: int, batch: int) -> VARBlockSpec:
        """The static part of one layer of one step."""
        config = self.config
        return VARBlockSpec(
            **block_geometry(plan, scale, layer, batch),
            channels=config.width,
            num_heads=config.num_heads,
            attn_scale=config.attn_scale,
            norm_eps=config.norm_eps,
            precision=self.precision,
            attn_l2_norm=config.attn_l2_norm,
        )

    def embed(self, condition: Mapping[str, Tensor], f_hat: Tensor | None, scale: int) -> Tensor:
        """The start token, or f_hat area-resized to the scale's map and embedded: see the base class."""
        if f_hat is None:
            return condition[names.START].unsqueeze(1) + self.weight("pos.0")
        return self.embed_map(self.at_scale(f_hat, scale), scale)

    def embed_map(self, own: Tensor, scale: int) -> Tensor:
        """f_hat at a scale's map [B, C_vae, h, w] as tokens with their positions, fp32 [B, L, C]."""
        return self.embedded(own) + self.weight(f"pos.{scale}")

    def logits(self, x: Tensor, condition: Mapping[str, Tensor], scale: int, cfg: Tensor | None) -> Tensor:
        """Logits fp32 [B, L, V], guided by `(1 + t) cond - t uncond` with t = cfg * scale / (K - 1).

        The head is affine and the two factors sum to 1, so the guidance is applied to its input: half the
        rows go through the head.
        """
        rows, length, channels = x.shape
        head_modulation = condition[names.HEAD_MODULATION]
        hidden = F.layer_norm(x, (channels,), self.weight("norm.weight"), eps=self.config.norm_eps)
        hidden = hidden * head_modulation[:, 0:1] + head_modulation[:, 1:2]
        if cfg is not None:
            t, batch = (cfg * (scale / (len(self.config.patch_nums) - 1)))[:, None, None], rows // 2
            hidden = (1 + t) * hidden[:batch] - t * hidden[batch:]
        hidden = hidden.reshape(-1, channels).to(self.dtype)
        return self.linear("head", hidden).float().view(-1, length, self.config.vocab_size)
