"""Infinity: text to image, tokens of bits (github.com/FoundationVision/Infinity).

Differences from the reference, all exact up to rounding: modulations and the cross-attention's keys and values are
computed once per prompt instead of once per scale; prompts are padded and masked instead of packed, so that prompts of
different lengths share a batch; guidance is applied to the hidden state before the head, which is linear; the two
channels that a rotation mixes lie half a head apart; interpolations are constant matrices; a bit is drawn from one
uniform number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.base import (
    MASKED,
    BlockSpec,
    Request,
    block_geometry,
    config_from_json,
    l2_normalised,
    rms_norm,
)
from fastvar_trt.export.models.checkpoint import load_state_dict
from fastvar_trt.export.models.infinity import checkpoint as checkpoints
from fastvar_trt.export.models.infinity.config import BSQVAEConfig, InfinityConfig
from fastvar_trt.export.models.infinity.vae import BSQDecoder, BSQEncoder
from fastvar_trt.export.models.matrix import linear_names
from fastvar_trt.export.models.resize import resize_map
from fastvar_trt.export.models.t5 import T5Config
from fastvar_trt.export.models.text import TextModel
from fastvar_trt.plugins.torch_ops import Selector
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.manifest import Condition, ModelSpec, Role, SamplingSpec, TensorSpec, Tokens
from fastvar_trt.runtime.plan import ResolvedPlan
from fastvar_trt.runtime.precision import Precision
from fastvar_trt.runtime.request import GRAPH_INPUTS

DEFAULT_TAU = 0.5  # scripts/infer.sh
DEFAULT_TOP_P = 0.97  # gen_one_img


@dataclasses.dataclass(frozen=True)
class InfinityBlockSpec(BlockSpec):
    """A layer of Infinity (`CrossAttnBlock`)."""

    rope: str  # its rotary table
    text_length: int  # T
    cross_scale: float

    sublayers = ("attn", "cross", "ffn")

    @property
    def activations(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what the block takes besides weights."""
        text = (self.rows, self.num_heads, self.text_length, self.channels // self.num_heads)
        return super().activations | {
            "text_k": (text, self.dtype),
            "text_v": (text, self.dtype),
            "text_mask": ((self.rows, 1, 1, self.text_length), self.dtype),
        }

    @property
    def shared_weights(self) -> tuple[str, ...]:
        """Names of the weights that are not the layer's own."""
        return (*super().shared_weights, f"{self.rope}.cos", f"{self.rope}.sin")

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the layer's weights, below `blocks.<layer>.`."""
        linears = ("attn.mat_qkv", "attn.proj", "cross.mat_q", "cross.proj", "ffn.fc1", "ffn.fc2")
        return ("attn.q_scale", "cross.norm.weight", "cross.norm.bias", *linear_names(self.precision, *linears))

    def run(self, tensors: Mapping[str, Tensor], select: Selector) -> tuple[Tensor, ...]:
        """See `BlockSpec.run`; text_k, text_v [B2, H, T, D], text_mask [B2, 1, 1, T]."""
        x, modulation, ones = tensors["x"], tensors["modulation"], tensors["norm.weight"]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (modulation[:, i : i + 1] for i in range(6))  # [B2, 1, C]
        full = (self.rows, self.num_computed, self.channels)

        computed, indices = self.selected(x, select)
        hidden = self.modulated(computed, ones, scale1, shift1)
        attended, new_k, new_v = self._self_attention(tensors, hidden, indices)
        y_attn = (self.linear(tensors, "attn.proj", attended).view(full).float() * gamma1).to(self.dtype)
        y_attn = self.restored(y_attn, indices, tensors.get("cached_attn"))
        x = x + y_attn.float()

        computed, indices = self.selected(x, select)
        hidden = F.layer_norm(
            computed, (self.channels,), tensors["cross.norm.weight"], tensors["cross.norm.bias"], self.norm_eps
        )
        attended = self._cross_attention(tensors, hidden.flatten(0, 1).to(self.dtype))
        y_cross = self.linear(tensors, "cross.proj", attended).view(full)
        y_cross = self.restored(y_cross, indices, tensors.get("cached_cross"))
        x = x + y_cross.float()

        computed, indices = self.selected(x, select)
        hidden = self.modulated(computed, ones, scale2, shift2)
        hidden = F.gelu(self.linear(tensors, "ffn.fc1", hidden), approximate="tanh")
        y_ffn = (self.linear(tensors, "ffn.fc2", hidden).view(full).float() * gamma2).to(self.dtype)
        y_ffn = self.restored(y_ffn, indices, tensors.get("cached_ffn"))
        x = x + y_ffn.float()
        return self.collect(x, new_k, new_v, (y_attn, y_cross, y_ffn))

    def _self_attention(
        self, tensors: Mapping[str, Tensor], hidden: Tensor, indices: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of [B2*K, C] with rotary positions: the result [B2*K, C], new keys and values [K, B2, H, D]."""
        heads = (self.num_heads, self.channels // self.num_heads)
        qkv = self.linear(tensors, "attn.mat_qkv", hidden)  # [B2*K, 3C]
        q, k, v = qkv.view(self.rows, self.num_computed, 3, *heads).unbind(2)  # [B2, K, H, D]
        tables = [tensors[f"{self.rope}.{part}"] for part in ("cos", "sin")]  # [L, D/2]
        if indices is not None:
            tables = [F.embedding(indices, table) for table in tables]  # [B2, K, D/2]
        cos, sin = (table.unsqueeze(-2) for table in tables)  # [(B2,) K, 1, D/2]

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(self.dtype)

        q = rotated(l2_normalised(q) * tensors["attn.q_scale"])
        return self.attend(tensors, q, rotated(l2_normalised(k)), v)

    def _cross_attention(self, tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Attention of [B2*K, C] over the text: [B2*K, C]."""
        q = self.linear(tensors, "cross.mat_q", hidden)
        q = q.view(self.rows, self.num_computed, self.num_heads, -1).transpose(1, 2)  # [B2, H, K, D]
        # ONNX Runtime wants the mask's rows spelt out; one copy serves all layers of a step.
        mask = tensors["text_mask"].expand(-1, -1, self.num_computed, -1)
        attended = F.scaled_dot_product_attention(
            q, tensors["text_k"], tensors["text_v"], attn_mask=mask, scale=self.cross_scale
        )
        return attended.transpose(1, 2).reshape(self.rows * self.num_computed, self.channels)


class Infinity(TextModel):
    """An Infinity with its decoder, over the deployment tensors of `models.infinity.checkpoint`."""

    sublayers = InfinityBlockSpec.sublayers

    def __init__(
        self, config: InfinityConfig, vae_config: BSQVAEConfig, text_config: T5Config | None, precision: Precision
    ) -> None:
        super().__init__(config.schedule, config.depth, precision)
        self.config = config
        self.vae_config = vae_config
        self.text_config = text_config

    def load_transformer(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """An official file or folder of shards, checked."""
        state = load_state_dict(checkpoint, checkpoints.NESTED)
        checkpoints.check_transformer(self.config, state)
        return state

    def transformer_tensors(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All of the transformer's, but for `size_tensors`."""
        return checkpoints.transformer_tensors(self.config, state, self.precision)

    def size_tensors(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Positions and interpolations."""
        return checkpoints.size_tensors(self.config, self.vae_config, state)

    def model_spec(self) -> ModelSpec:
        """Text, bits, and sizes."""
        config = self.config
        return ModelSpec(
            family="infinity",
            condition=Condition.TEXT,
            tokens=Tokens.BITS,
            depth=config.depth,
            width=config.width,
            num_heads=config.num_heads,
            mlp_width=config.mlp_width,
            vocab_size=2 * config.bits,
            code_channels=config.bits,
            text_width=config.text_width,
            text_length=config.text_length,
        )

    def image_size(self) -> tuple[int, int]:
        """Of the schedule's last map."""
        height, width = self.config.code_schedule[-1]
        return height * self.vae_config.pixels_per_code, width * self.vae_config.pixels_per_code

    def sampling_spec(self) -> SamplingSpec:
        """Sampling defaults for the manifest; a bit has two values."""
        return SamplingSpec(2, self.config.cfg, 2, DEFAULT_TOP_P, DEFAULT_TAU)

    def configs(self) -> dict[str, Any]:
        """The configurations of transformer, VAE and text encoder."""
        text = {} if self.text_config is None else {"text_encoder": dataclasses.asdict(self.text_config)}
        return {"infinity": dataclasses.asdict(self.config), "vae": dataclasses.asdict(self.vae_config), **text}

    @classmethod
    def from_configs(cls, configs: Mapping[str, Any], precision: Precision) -> Infinity:
        """The model of `configs`, without weights.

        Raises:
            KeyError, TypeError: they are not complete.
        """
        config, vae_config = (
            config_from_json(InfinityConfig, configs["infinity"]),
            config_from_json(BSQVAEConfig, configs["vae"]),
        )
        text = configs.get("text_encoder")
        return cls(config, vae_config, None if text is None else config_from_json(T5Config, text), precision)

    def condition_outputs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Start token, modulations, keys and values of the text."""
        rows, config = 2 * batch, self.config
        dtype = self.precision.computed
        text = (rows, config.num_heads, config.text_length, config.head_dim)
        return (
            TensorSpec(names.START, (rows, config.width), "float32"),
            *(
                TensorSpec(names.modulation(i), (rows, 6, config.width), "float32", Role.MODULATION, layer=i)
                for i in range(self.depth)
            ),
            TensorSpec(names.HEAD_MODULATION, (rows, 2, config.width), "float32", Role.MODULATION),
            TensorSpec(names.TEXT_MASK, (rows, 1, 1, config.text_length), dtype, Role.TEXT),
            *(
                TensorSpec(name(i), text, dtype, Role.TEXT, layer=i)
                for i in range(self.depth)
                for name in (names.text_k, names.text_v)
            ),
        )

    def example_condition(self, batch: int) -> dict[str, Tensor]:
        """Random features of several tokens each; every second image, the first among them, has negative ones."""
        config = self.config
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(2 * batch, config.text_length, config.text_width, generator=generator)
        longest = config.text_length
        lengths = (longest // 3 + 5 * torch.arange(2 * batch)) % longest + 1
        lengths = lengths.clamp(min(2, longest))
        negative = torch.arange(batch) % 2 == 0
        lengths[batch:] = torch.where(negative, lengths[batch:], lengths[:batch])
        return {names.TEXT_FEATURES: features, names.TEXT_LENGTHS: lengths, names.NEGATIVE: negative}

    def f_hat_shape(self) -> tuple[int, int, int]:
        """[d, h_K, w_K]."""
        return (self.vae_config.code_bits, *self.config.code_schedule[-1])

    def token_spec(self, scale: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Bits per position."""
        height, width = self.schedule[scale]
        return (height * width, self.config.bits), torch.uint8

    def logits_shape(self, scale: int) -> tuple[int, ...]:
        """[L, bits, 2]."""
        return (*self.token_spec(scale)[0], 2)

    def request_inputs(self, scale: int) -> tuple[str, ...]:
        """All but top-k."""
        return tuple(name for name in GRAPH_INPUTS if name != "top_k")

    def new_decoder(self) -> nn.Module:
        """`AutoEncoder.decode`."""
        return BSQDecoder(self.vae_config)

    def new_encoder(self) -> nn.Module | None:
        """`AutoEncoder.encode` as far as the features, where it was asked for."""
        return BSQEncoder(self.vae_config) if self.vae_config.encoder_channels else None

    def condition(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Text features to start token, modulations, and the cross-attention's keys, values and mask."""
        config = self.config
        features, lengths = inputs[names.TEXT_FEATURES], inputs[names.TEXT_LENGTHS]
        batch = features.shape[0] // 2
        learnt = self.weight("text.uncond")  # [T, C_text]
        unconditional = torch.where(inputs[names.NEGATIVE][:, None, None], features[batch:], learnt)
        text = torch.cat([features[:batch], unconditional])  # [B2, T, C_text]
        text = rms_norm(text, self.weight("text.norm.weight"), config.norm_eps)
        text = text.to(self.dtype).flatten(0, 1)  # [B2*T, C_text]
        padding = self.weight("text.position") >= lengths[:, None]  # [B2, T]
        mask = (padding.float() * MASKED)[:, None, None]  # [B2, 1, 1, T]

        start = self._pool(text, mask)  # [B2, C]
        activated = F.silu(start).to(self.dtype)

        shared = self.project("shared_modulation", activated).view(-1, 6, config.width)
        outputs = {
            names.START: start,
            names.HEAD_MODULATION: self.project("head_modulation", activated).view(-1, 2, config.width),
            names.TEXT_MASK: mask.to(self.dtype),
        }
        text = F.gelu(self.linear("text.proj.0", text), approximate="tanh")
        text = self.linear("text.proj.2", text)  # [B2*T, C]
        for i in range(self.depth):
            outputs[names.modulation(i)] = shared + self.weight(f"blocks.{i}.modulation.bias")
            kv = self.linear(f"blocks.{i}.cross.mat_kv", text)
            kv = kv.view(2 * batch, config.text_length, 2, config.num_heads, config.head_dim)
            outputs[names.text_k(i)], outputs[names.text_v(i)] = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return outputs

    def _pool(self, text: Tensor, mask: Tensor) -> Tensor:
        """`TextAttentivePool`: one learnt query over the text [B2*T, C_text]: fp32 [B2, C]."""
        config = self.config
        kv = self.linear("text.pool.mat_kv", text).float()
        kv = kv.view(-1, config.text_length, 2, config.pool_heads, config.pool_head_dim)
        keys, values = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [B2, H', T, D']
        scores = (keys @ self.weight("text.pool.q")).transpose(-1, -2)  # [B2, H', 1, T]
        scores = scores / math.sqrt(config.pool_head_dim) + mask
        pooled = (scores.softmax(-1) @ values).flatten(1)
        return self.linear("text.pool.proj", pooled.to(self.dtype)).float()

    def block_spec(self, plan: ResolvedPlan, scale: int, layer: int, batch: int) -> InfinityBlockSpec:
        """The static part of one layer of one step."""
        config = self.config
        return InfinityBlockSpec(
            **block_geometry(plan, scale, layer, batch),
            channels=config.width,
            num_heads=config.num_heads,
            attn_scale=config.attn_scale,
            norm_eps=config.norm_eps,
            precision=self.precision,
            rope=config.rope_name(scale),
            text_length=config.text_length,
            cross_scale=config.cross_scale,
        )

    def block_condition(self, condition: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
        """What a block takes of the condition."""
        return super().block_condition(condition, layer) | {
            "text_k": condition[names.text_k(layer)],
            "text_v": condition[names.text_v(layer)],
            "text_mask": condition[names.TEXT_MASK],
        }

    def embed(self, condition: Mapping[str, Tensor], f_hat: Tensor | None, scale: int) -> Tensor:
        """The start token, or f_hat resized to the scale's map and embedded: see the base class."""
        config = self.config
        if f_hat is None:
            return condition[names.START].unsqueeze(1) + self.weight("pos.0")
        codes = self._resized(f_hat, config.code_schedule[-1], config.code_schedule[scale])
        if config.patchify:
            codes = F.pixel_unshuffle(codes, 2)  # [B, 4d, h, w]
        batch = f_hat.shape[0]
        tokens = codes.flatten(2).transpose(1, 2).reshape(-1, config.bits)  # [B*L, bits]
        embedded = F.linear(tokens, self.weight("word_embed.weight")).view(batch, -1, config.width)
        return embedded + self.weight(f"pos.{scale}")

    def _resized(self, codes: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
        if source == target:
            return codes
        rows = self.weight(f"resize.bilinear_{target[0]}_{source[0]}")
        return resize_map(codes, rows, self.weight(f"resize.bilinear_{target[1]}_{source[1]}_t"))

    def logits(self, x: Tensor, condition: Mapping[str, Tensor], scale: int, cfg: Tensor | None) -> Tensor:
        """Logits fp32 [B, L, bits, 2], guided by `cfg cond + (1 - cfg) uncond`.

        The head is affine and the two factors sum to 1, so the guidance is applied to its input.
        """
        rows, length, channels = x.shape
        head_modulation = condition[names.HEAD_MODULATION]
        hidden = F.layer_norm(x, (channels,), self.weight("norm.weight"), eps=self.config.norm_eps)
        hidden = hidden * head_modulation[:, 0:1] + head_modulation[:, 1:2]
        if cfg is not None:
            strength, batch = cfg[:, None, None], rows // 2
            hidden = strength * hidden[:batch] + (1 - strength) * hidden[batch:]
        logits = self.linear("head", hidden.reshape(-1, channels).to(self.dtype))
        return logits.float().view(-1, length, self.config.bits, 2)

    def draw(self, logits: Tensor, uniform: Tensor, request: Request, scale: int) -> Tensor:
        """One value per bit, 0 or 1: fp32 [B, L, bits].

        Top-p over two values (`sample_with_top_k_top_p_also_inplace_modifying_logits_`): the less likely one is out
        where its probability is at most 1 - top_p.
        """
        margin = (logits[..., 1] - logits[..., 0]) / request.temperature[:, None, None]
        least = 1 - request.top_p[:, None, None]
        zero, one = torch.sigmoid(-margin), torch.sigmoid(margin)
        # From which uniform number on the bit is 1. The likelier value always stays.
        threshold = zero.masked_fill((one <= least) & (margin <= 0), 1.0).masked_fill(
            (zero <= least) & (margin > 0), 0.0
        )
        threshold = torch.where(request.greedy[:, None, None], (margin <= 0).float(), threshold)
        return (uniform >= threshold).float()

    def nearest(self, left: Tensor, scale: int) -> Tensor:
        """The signs of what is left (`MultiScaleBSQ`): bool [B, L, bits]."""
        size, full = self.config.code_schedule[scale], self.config.code_schedule[-1]
        if size != full:
            rows, columns = (f"resize.area_{size[0]}_{full[0]}", f"resize.area_{size[1]}_{full[1]}_t")
            left = resize_map(left, self.weight(rows), self.weight(columns))
        signs = (left > 0).float()
        if self.config.patchify:
            signs = F.pixel_unshuffle(signs, 2)  # [B, 4d, h, w]
        return signs.flatten(2).transpose(1, 2)

    def accumulate(self, drawn: Tensor, f_hat: Tensor | None, scale: int) -> Tensor:
        """f_hat with this scale's codes added: bits are +-1/sqrt(d) (`BSQ.indices_to_codes`)."""
        config = self.config
        height, width = self.schedule[scale]
        codes = (2 * drawn.float() - 1) * self.vae_config.code_bits**-0.5  # [B, L, bits]
        codes = codes.transpose(1, 2).reshape(drawn.shape[0], config.bits, height, width)
        if config.patchify:
            codes = F.pixel_shuffle(codes, 2)  # [B, d, 2h, 2w]
        codes = self._resized(codes, config.code_schedule[scale], config.code_schedule[-1])
        return codes if f_hat is None else f_hat + codes
