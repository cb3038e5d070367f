"""HART: text to image, tokens from a code book and a residual diffusion (github.com/mit-han-lab/hart).

The text, padding included, is a prefix: the first step computes it in place of a token map, and its last position
gives the first token's logits. Differences from the reference, all exact up to rounding: guidance is applied to the
hidden state before the head, which is linear; gate and up projections are one matrix; interpolations are constant
matrices; embeddings of scales and diffusion steps are tables; sampling is by inverse CDF from one uniform number per
token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.export.models.base import BlockSpec, Request, block_geometry, config_from_json, l2_normalised, rms_norm
from fastvar_trt.export.models.checkpoint import check_keys
from fastvar_trt.export.models.codebook import CodeBookModel, top_k
from fastvar_trt.export.models.hart.checkpoint import load_transformer, transformer_problems, transformer_tensors
from fastvar_trt.export.models.hart.config import HARTConfig
from fastvar_trt.export.models.hart.diffusion import DiffusionStep, diffusion_steps
from fastvar_trt.export.models.matrix import linear_names, matrix_names, product
from fastvar_trt.export.models.qwen2 import Qwen2Config
from fastvar_trt.export.models.text import TextModel
from fastvar_trt.export.models.vqvae import VQVAEConfig
from fastvar_trt.plugins.torch_ops import Selector, gather_tokens
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import PlanError
from fastvar_trt.runtime.manifest import Condition, ModelSpec, Role, SamplingSpec, TensorSpec, Tokens
from fastvar_trt.runtime.plan import PruningPlan, ResolvedPlan
from fastvar_trt.runtime.precision import Precision
from fastvar_trt.runtime.request import GRAPH_INPUTS

DEFAULT_CFG = 4.5  # sample.py
# `sample_with_top_k_top_p_`: 600 at the first seven scales, 300 after; top-p is off.
DEFAULT_TOP_K = 600
_WIDE_SCALES = 7
_RESIDUAL_SHARE = 0.6  # of the diffusion's result in f_hat
_POSITIONS = "text_positions"  # fp32 [B2, T]: of the text's tokens, as the rotary embedding counts them


@dataclasses.dataclass(frozen=True)
class HARTBlockSpec(BlockSpec):
    """A layer of HART (`AdaLNSelfAttn` without adaptive norms)."""

    attn_l2_norm: bool

    sublayers = ("attn", "ffn")

    @property
    def activations(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what the block takes besides weights."""
        table = (self.rows, self.num_tokens, self.channels // self.num_heads)
        inputs = super().activations
        del inputs["modulation"]
        return inputs | {"cos": (table, torch.float32), "sin": (table, torch.float32)}

    @property
    def shared_weights(self) -> tuple[str, ...]:
        """None: norms have weights of their own."""
        return ()

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the layer's weights, below `blocks.<layer>.`."""
        q_scale = ("attn.q_scale",) if self.attn_l2_norm else ()
        without_bias = matrix_names(self.precision, "ffn.gate_up", "ffn.down")
        return ("norm.weight", *q_scale, *linear_names(self.precision, "attn.mat_qkv", "attn.proj"), *without_bias)

    def run(self, tensors: Mapping[str, Tensor], select: Selector) -> tuple[Tensor, ...]:
        """See `BlockSpec.run`; cos, sin fp32 [B2, L, D]."""
        x, norm = tensors["x"], tensors["norm.weight"]
        full = (self.rows, self.num_computed, self.channels)

        computed, indices = self.selected(x, select)
        hidden = rms_norm(computed, norm, self.norm_eps).flatten(0, 1).to(self.dtype)
        attended, new_k, new_v = self._attention(tensors, hidden, indices)
        y_attn = self.restored(
            self.linear(tensors, "attn.proj", attended).view(full), indices, tensors.get("cached_attn")
        )
        x = x + y_attn.float()

        computed, indices = self.selected(x, select)
        hidden = rms_norm(computed, norm, self.norm_eps).flatten(0, 1).to(self.dtype)
        gate, up = product(self.precision, tensors, "ffn.gate_up", hidden).chunk(2, dim=-1)
        y_ffn = product(self.precision, tensors, "ffn.down", F.silu(gate) * up).view(full)
        y_ffn = self.restored(y_ffn, indices, tensors.get("cached_ffn"))
        x = x + y_ffn.float()
        return self.collect(x, new_k, new_v, (y_attn, y_ffn))

    def _attention(
        self, tensors: Mapping[str, Tensor], hidden: Tensor, indices: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of [B2*K, C] with rotary positions: the result [B2*K, C], new keys and values [K, B2, H, D]."""
        heads = (self.num_heads, self.channels // self.num_heads)
        qkv = self.linear(tensors, "attn.mat_qkv", hidden)  # [B2*K, 3C]
        q, k, v = (part.float() for part in qkv.view(self.rows, self.num_computed, 3, *heads).unbind(2))
        if self.attn_l2_norm:
            q, k = l2_normalised(q) * tensors["attn.q_scale"], l2_normalised(k)
        tables = [tensors["cos"], tensors["sin"]]  # [B2, L, D]
        if indices is not None:
            tables = [gather_tokens(table, indices) for table in tables]
        cos, sin = (table.unsqueeze(2) for table in tables)  # [B2, K, 1, D]

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(self.dtype)

        return self.attend(tensors, turned(q), turned(k), v.to(self.dtype))


class HART(CodeBookModel, TextModel):
    """A HART with its decoder, over the deployment tensors of `models.hart.checkpoint`."""

    sublayers = HARTBlockSpec.sublayers

    def __init__(
        self, config: HARTConfig, vae_config: VQVAEConfig, text_config: Qwen2Config | None, precision: Precision
    ) -> None:
        super().__init__(config.patch_nums, config.depth, vae_config, precision, config.context_tokens)
        self.config = config
        self.text_config = text_config

    def resolve(self, plan: PruningPlan) -> ResolvedPlan:
        """A plan for this model.

        Raises:
            PlanError: it does not fit, or skips the last scale, from which the residual diffusion starts.
        """
        resolved = super().resolve(plan)
        last = len(self.patch_nums) - 1
        if resolved.steps[-1] != last:
            raise PlanError(
                f"plan {plan.name!r}: scale {last} is skipped, from which HART's residual diffusion starts; prune it "
                "instead"
            )
        return resolved

    def load_transformer(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """An official folder `llm`, checked."""
        state = load_transformer(checkpoint)
        check_keys({"--checkpoint": transformer_problems(self.config, state)})
        return state

    def transformer_tensors(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All of the transformer's."""
        return transformer_tensors(self.config, state, self.precision)

    def model_spec(self) -> ModelSpec:
        """Text, an index into the code book per position, and sizes."""
        config = self.config
        return ModelSpec(
            family="hart",
            condition=Condition.TEXT,
            tokens=Tokens.INDEX,
            depth=config.depth,
            width=config.width,
            num_heads=config.num_heads,
            mlp_width=config.mlp_width,
            vocab_size=config.vocab_size,
            code_channels=config.code_channels,
            text_width=config.text_width,
            text_length=config.context_tokens,
            is_gated=True,
            context_tokens=config.context_tokens,
        )

    def sampling_spec(self) -> SamplingSpec:
        """Sampling limits and defaults for the manifest."""
        max_top_k = len(self.weight("sampling.rank"))
        return SamplingSpec(max_top_k, DEFAULT_CFG, min(DEFAULT_TOP_K, max_top_k), 1.0, neutral_cfg=0.0)

    def configs(self) -> dict[str, Any]:
        """The configurations of transformer and VQVAE."""
        text = {} if self.text_config is None else {"text_encoder": dataclasses.asdict(self.text_config)}
        return {"hart": dataclasses.asdict(self.config), "vae": dataclasses.asdict(self.vae_config), **text}

    @classmethod
    def from_configs(cls, configs: Mapping[str, Any], precision: Precision) -> HART:
        """The model of `configs`, without weights.

        Raises:
            KeyError, TypeError: they are not complete.
        """
        config, vae_config = (
            config_from_json(HARTConfig, configs["hart"]),
            config_from_json(VQVAEConfig, configs["vae"]),
        )
        text = configs.get("text_encoder")
        return cls(config, vae_config, None if text is None else config_from_json(Qwen2Config, text), precision)

    def condition_outputs(self, batch: int) -> tuple[TensorSpec, ...]:
        """The embedded text, its positions, and the head's modulation."""
        rows, config = 2 * batch, self.config
        return (
            TensorSpec(names.START, (rows, config.context_tokens, config.width), "float32"),
            TensorSpec(_POSITIONS, (rows, config.context_tokens), "float32", Role.TEXT),
            TensorSpec(names.HEAD_MODULATION, (rows, 2, config.width), "float32", Role.MODULATION),
        )

    def example_condition(self, batch: int) -> dict[str, Tensor]:
        """Random features; every second image, the first among them, has negative ones."""
        config = self.config
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(2 * batch, config.context_tokens, config.text_width, generator=generator)
        lengths = (config.context_tokens // 3 + 5 * torch.arange(2 * batch)) % config.context_tokens + 1
        return {
            names.TEXT_FEATURES: features,
            names.TEXT_LENGTHS: lengths,
            names.NEGATIVE: torch.arange(batch) % 2 == 0,
        }

    def request_inputs(self, scale: int) -> tuple[str, ...]:
        """All; the guidance ramp starts at 0."""
        return tuple(name for name in GRAPH_INPUTS if scale != 0 or name != "cfg")

    def condition(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Text features to the embedded context, its positions, and the head's modulation."""
        config = self.config
        features, lengths = inputs[names.TEXT_FEATURES], inputs[names.TEXT_LENGTHS]
        rows, length = features.shape[:2]
        has_text = torch.cat([torch.ones_like(inputs[names.NEGATIVE]), inputs[names.NEGATIVE]]).float()  # [B2]
        features = features * has_text[:, None, None]
        if config.has_context_norm:
            features = rms_norm(features, self.weight("context.norm.weight"), config.norm_eps)
        context = self.linear("context.embed", features.flatten(0, 1).to(self.dtype)).float()
        context = context.view(rows, length, config.width)
        head = self.project("head_modulation", F.silu(context.amax(dim=1)).to(self.dtype))
        # Positions are counted up to the last token: `cumsum(mask) - 1`.
        place, counts = self.weight("context.position"), lengths.float()[:, None]
        places = (place + (counts - length)).clamp_min(-1) if config.pads_left else place
        positions = torch.minimum(places, counts - 1) * has_text[:, None]
        return {
            names.START: context + self.weight("pos.0"),
            _POSITIONS: positions,
            names.HEAD_MODULATION: head.view(rows, 2, config.width),
        }

    def step_condition(self, condition: Mapping[str, Tensor], scale: int) -> Mapping[str, Tensor]:
        """With the rotary tables cos, sin fp32 [B2, L, D] of the step's positions.

        At a map, the two halves of the head that are mixed have different angles, the row's and the column's: not a
        rotation, but what the model was trained with.
        """
        positions = condition[_POSITIONS]  # [B2, T]
        if scale == 0:
            angles = positions.unsqueeze(-1) * self.weight("rope.context")  # [B2, T, D/2]
            angles = torch.cat([angles, angles], dim=-1)
            return {**condition, "cos": angles.cos(), "sin": angles.sin()}
        side, rows = self.patch_nums[scale], positions.shape[0]
        along = self.weight(f"rope.{scale}") + positions[:, -1:]  # [B2, p]
        angles = along.unsqueeze(-1) * self.weight("rope.map")  # [B2, p, D/4]
        angles = torch.cat([angles, angles], dim=-1)

        def table(values: Tensor) -> Tensor:
            by_row, by_column = (values.unsqueeze(axis).expand(-1, side, side, -1) for axis in (2, 1))
            return torch.cat([by_row, by_column], dim=-1).reshape(rows, side * side, -1)

        return {**condition, "cos": table(angles.cos()), "sin": table(angles.sin())}

    def block_condition(self, condition: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
        """What a block takes of the condition."""
        return {"cos": condition["cos"], "sin": condition["sin"]}

    def block_spec(self, plan: ResolvedPlan, scale: int, layer: int, batch: int) -> HARTBlockSpec:
        """The static part of one layer of one step; the first step's map is the text."""
        config = self.config
        geometry = block_geometry(plan, scale, layer, batch)
        if scale == 0:
            geometry |= {"height": 1, "width": config.context_tokens}
        return HARTBlockSpec(
            **geometry,
            channels=config.width,
            num_heads=config.num_heads,
            attn_scale=config.attn_scale,
            norm_eps=config.norm_eps,
            precision=self.precision,
            attn_l2_norm=config.attn_l2_norm,
        )

    def embed(self, condition: Mapping[str, Tensor], f_hat: Tensor | None, scale: int) -> Tensor:
        """The text, or f_hat area-resized to the scale's map and embedded: see the base class."""
        if f_hat is None:
            return condition[names.START]
        return self.embedded(self.at_scale(f_hat, scale)) + self.weight(f"pos.{scale}")

    def logits(self, x: Tensor, condition: Mapping[str, Tensor], scale: int, cfg: Tensor | None) -> Tensor:
        """Logits fp32 [B, L, V], guided by `(1 + t) cond - t uncond` with t = cfg * `_ramp`.

        The head is affine and the two factors sum to 1, so the guidance is applied to its input.
        """
        if scale == 0:
            x = x[:, -1:]
        rows, length, channels = x.shape
        head_modulation = condition[names.HEAD_MODULATION]
        hidden = rms_norm(x, self.weight("head.norm.weight"), self.config.norm_eps)
        hidden = hidden * head_modulation[:, 0:1] + head_modulation[:, 1:2]
        if cfg is not None:
            t, batch = (cfg * self._ramp(scale))[:, None, None], rows // 2
            hidden = (1 + t) * hidden[:batch] - t * hidden[batch:]
        logits = self.linear("head", hidden.reshape(-1, channels).to(self.dtype))
        return logits.float().view(-1, length, self.config.vocab_size)

    def draw(self, logits: Tensor, uniform: Tensor, request: Request, scale: int) -> Tensor:
        """One code per position: int32 [B, L]; from the eighth scale on of half as many candidates (600 and 300)."""
        return super().draw(logits, uniform, self._narrowed(request, scale), scale)

    def rank(self, scale: int) -> Tensor:
        """See `CodeBookModel.rank`."""
        return super().rank(scale) if scale < _WIDE_SCALES else self.weight("sampling.narrow_rank")

    def _narrowed(self, request: Request, scale: int) -> Request:
        if scale < _WIDE_SCALES:
            return request
        return dataclasses.replace(request, top_k=(request.top_k + 1) // 2)

    def gumbel_shape(self, scale: int) -> tuple[int, ...] | None:
        """Per position and candidate."""
        return (self.patch_nums[scale] ** 2, len(self.rank(scale))) if self.config.more_smooth else None

    def blend(
        self,
        drawn: Tensor,
        logits: Tensor,
        gumbel: Tensor,
        f_hat: Tensor | None,
        scale: int,
        request: Request,
        is_given: Tensor | None,
    ) -> Tensor:
        """`gumbel_softmax_with_rng` over the candidates of top-k: the codes' mean, near the likeliest one's later on.

        Noise is by rank and not by code, which is the same distribution and a tenth of the numbers. Greedy requests
        take the drawn codes: near a tie a blend multiplies rounding, so no picture of it could be verified. Given
        tokens are taken as they are.
        """
        ratio = self._ramp(scale)
        warmth = max(0.27 * (1 - 0.95 * ratio), 0.005)
        rank = self.rank(scale)
        values, order = top_k(logits, len(rank))
        among_top_k = rank < self._narrowed(request, scale).top_k[:, None, None]
        noisy = ((values * (1 + ratio) + gumbel) / warmth).masked_fill(~among_top_k, float("-inf"))
        # Not zeros, which would be a constant of this size in the graph.
        weights = (logits * 0).scatter(-1, order, noisy.softmax(dim=-1))
        blended = (weights.flatten(0, 1) @ self.weight("quantize.embedding.weight")).view(*logits.shape[:2], -1)
        exact = request.greedy[:, None, None]
        if is_given is not None:
            exact = exact | is_given.unsqueeze(-1)
        codes = torch.where(exact, self.codes(drawn), blended)
        return self.add_codes(codes, f_hat, scale)

    def _ramp(self, scale: int) -> float:
        """Guidance grows linearly; the last scale has that of the one before."""
        last = len(self.patch_nums) - 1
        return min(scale, last - 1) / last

    def add_codes(self, codes: Tensor, f_hat: Tensor | None, scale: int) -> Tensor:
        """f_hat with codes added; those of the last scale as they are, without its convolution."""
        if scale != len(self.patch_nums) - 1:
            return super().add_codes(codes, f_hat, scale)
        codes = codes.transpose(1, 2).reshape(len(codes), *self.f_hat_shape())
        return codes if f_hat is None else f_hat + codes

    # The residual diffusion.

    def handed_on_specs(self, plan: ResolvedPlan, scale: int, batch: int) -> tuple[TensorSpec, ...]:
        """The condition of the diffusion, of the last step."""
        if scale != len(self.patch_nums) - 1:
            return ()
        shape = (plan.rows(scale, batch), self.patch_nums[-1] ** 2, self.config.width)
        return (TensorSpec(names.HIDDEN, shape, self.precision.computed),)

    def handed_on(self, x: Tensor, drawn: Tensor, f_hat: Tensor, scale: int) -> dict[str, Tensor]:
        """`decoder_norm` of the last block's output and the drawn codes, embedded."""
        if scale != len(self.patch_nums) - 1:
            return {}
        codes = self.codes(drawn)
        batch, length, channels = codes.shape
        embedded = F.linear(codes.view(-1, channels), self.weight("word_embed.weight"), self.weight("word_embed.bias"))
        z = x + embedded.view(batch, length, -1).repeat(x.shape[0] // batch, 1, 1)
        return {names.HIDDEN: rms_norm(z, self.weight("diffusion.norm.weight"), self.config.norm_eps).to(self.dtype)}

    def residual_specs(self, plan: ResolvedPlan, batch: int) -> tuple[TensorSpec, ...]:
        """The condition of the diffusion, noise and, where the last step has any, guidance."""
        last = len(self.patch_nums) - 1
        channels, height, width = self.f_hat_shape()
        noise = (batch, self.config.diffusion_steps, height * width, channels)
        guidance = TensorSpec("cfg", (batch,), GRAPH_INPUTS["cfg"].dtype, Role.REQUEST, scale=last)
        return (
            *self.handed_on_specs(plan, last, batch),
            TensorSpec(names.NORMAL, noise, "float32", Role.NORMAL, scale=last),
            *((guidance,) if plan.is_guided(last) else ()),
        )

    def residual(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """`DiffLoss.sample`, its state in fp32: f_hat with the residual added.

        The first of the noise [B, S, L, C_vae] is where it starts; every other is added after a step, none after the
        last.
        """
        f_hat, noise = inputs[names.F_HAT], inputs[names.NORMAL]
        batch, _, length, channels = noise.shape
        conditioned = self.linear("diffusion.cond", inputs[names.HIDDEN].flatten(0, 1))  # [B2*L, W]
        cfg = inputs.get("cfg")
        t = None if cfg is None else (cfg * self._ramp(len(self.patch_nums) - 1))[:, None, None]
        x = noise[:, 0]
        for i, step in enumerate(diffusion_steps(self.config.diffusion_steps)):
            rows = self._denoised(x, conditioned, i).view(-1, batch, length, 2 * channels)
            cond = rows[0]
            eps = cond[..., :channels]
            if t is not None:
                eps = (1 + t) * eps - t * rows[1, ..., :channels]
            x, deviation = _previous(step, x, eps, cond[..., channels:])
            if i + 1 < self.config.diffusion_steps:
                x = x + deviation * noise[:, i + 1]
        residual = x.transpose(1, 2).reshape(f_hat.shape)
        return f_hat + _RESIDUAL_SHARE * residual

    def _denoised(self, x: Tensor, conditioned: Tensor, step: int) -> Tensor:
        """`SimpleMLPAdaLN`: x fp32 [B, L, C_vae] for both halves of the guidance, or one: fp32 [B2*L, 2 C_vae]."""
        width, eps = self.config.diffusion_width, self.config.norm_eps
        h = self.linear("diffusion.input", x.flatten(0, 1).to(self.dtype)).float()
        h = h.repeat(conditioned.shape[0] // h.shape[0], 1)
        y = F.silu(conditioned.float() + self.weight(f"diffusion.time.{step}")).to(self.dtype)
        for j in range(self.config.diffusion_depth):
            block = f"diffusion.blocks.{j}"
            shift, scale, gate = self.project(f"{block}.modulation", y).chunk(3, dim=-1)
            weight, bias = (self.weight(f"{block}.norm.{part}") for part in ("weight", "bias"))
            hidden = F.layer_norm(h, (width,), weight, bias, eps) * scale + shift
            hidden = F.silu(self.linear(f"{block}.fc1", hidden.to(self.dtype)))
            h = h + gate * self.linear(f"{block}.fc2", hidden).float()
        shift, scale = self.project("diffusion.final.modulation", y).chunk(2, dim=-1)
        hidden = F.layer_norm(h, (width,), self.weight("diffusion.ones"), eps=eps) * scale + shift
        return self.linear("diffusion.final", hidden.to(self.dtype)).float()


def _previous(step: DiffusionStep, x: Tensor, eps: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the state before: fp32 [B, L, C_vae] each."""
    x0 = (step.x0_of_x * x - step.x0_of_noise * eps).clamp(-1, 1)
    mean = step.mean_of_x0 * x0 + step.mean_of_x * x
    log_variance = step.min_log + (v + 1) * (0.5 * (step.max_log - step.min_log))
    return mean, (0.5 * log_variance).exp()
