"""The encoder of T5 (flan-t5-xl is Infinity's), from a Hugging Face folder to one graph.

Written here and not taken from `transformers`, because its 3-D linear layers would put a transposed copy of every
weight into the graph. Parameter names are the official ones; `tests/test_text.py` compares with `transformers`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.export.models.base import MASKED, rms_norm
from fastvar_trt.export.models.checkpoint import key_problems, load_folder, read_config
from fastvar_trt.export.models.matrix import FORMATS, Cast, MatrixFormat, matrix_format, torch_dtype
from fastvar_trt.export.models.text import TEXT_PREFIX, TextEncoderConfig
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.manifest import TOKENIZER_FILE
from fastvar_trt.runtime.precision import Precision

_EMBEDDING = "shared.weight"
_ACTIVATIONS = {"gated-gelu": "tanh", "gated-gelu_new": "tanh"}  # Hugging Face maps the first to the second
_UNUSED = ("decoder.", "lm_head.", "encoder.embed_tokens.")


@dataclasses.dataclass(frozen=True)
class T5Config(TextEncoderConfig):
    """Sizes of the encoder."""

    width: int  # `d_model`
    head_dim: int  # `d_kv`
    num_heads: int
    mlp_width: int  # `d_ff`
    depth: int
    num_buckets: int  # of relative positions
    max_distance: int
    norm_eps: float
    text_length: int  # T, of the graph

    def encode(self, weights: Mapping[str, Tensor], ids: Tensor, length: Tensor, precision: Precision) -> Tensor:
        """See `TextEncoderConfig.encode`."""
        return encode(self, weights, ids, length, precision)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], text_length: int, where: str) -> T5Config:
        """Hugging Face's `config.json`.

        Raises:
            CheckpointError: not a T5 with gated GELU.
        """
        if data.get("model_type") != "t5" or data.get("feed_forward_proj") not in _ACTIVATIONS:
            raise CheckpointError(
                f"{where}: got model_type {data.get('model_type')!r} with feed_forward_proj "
                f"{data.get('feed_forward_proj')!r}, expected a T5 v1.1 (flan-t5) with gated-gelu"
            )
        try:
            return cls(
                width=int(data["d_model"]),
                head_dim=int(data["d_kv"]),
                num_heads=int(data["num_heads"]),
                mlp_width=int(data["d_ff"]),
                depth=int(data["num_layers"]),
                vocab_size=int(data["vocab_size"]),
                num_buckets=int(data["relative_attention_num_buckets"]),
                max_distance=int(data.get("relative_attention_max_distance", 128)),
                norm_eps=float(data["layer_norm_epsilon"]),
                text_length=text_length,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error} is missing or no number") from error


@dataclasses.dataclass(frozen=True)
class T5Source:
    """A text encoder to export."""

    config: T5Config
    state: Mapping[str, Tensor]
    tokenizer: Path

    @classmethod
    def from_folder(cls, folder: Path, text_length: int, text_width: int) -> T5Source:
        """A Hugging Face folder: `config.json`, safetensors (shards or not) or `pytorch_model.bin`, and the tokenizer.

        Args:
            folder: the folder.
            text_length: T, the longest prompt in tokens.
            text_width: what the image model takes.

        Raises:
            CheckpointError: a file that is missing or damaged, another kind of model, another width.
        """
        data = read_config(folder, "--text-encoder")
        if not (folder / TOKENIZER_FILE).is_file():
            raise CheckpointError(
                f"--text-encoder {folder}: {TOKENIZER_FILE} is missing; give a Hugging Face folder of T5"
            )
        config = T5Config.from_json(data, text_length, f"--text-encoder {folder / 'config.json'}")
        if config.width != text_width:
            raise CheckpointError(
                f"--text-encoder {folder}: its features are {config.width} wide, the model takes {text_width}; give "
                "the encoder that the model was trained with"
            )
        state = load_folder(folder)
        if "shared.weight" not in state and "encoder.embed_tokens.weight" in state:
            state["shared.weight"] = state["encoder.embed_tokens.weight"]
        problems = key_problems(state, expected_keys(config), _UNUSED)
        if problems:
            raise CheckpointError(f"--text-encoder {folder}: the keys are not those of T5: {'; '.join(problems)}")
        return cls(config, state, folder / TOKENIZER_FILE)

    def tensors(self, precision: Precision) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time; normalisation and position biases are fp32."""
        for key in expected_keys(self.config):
            if "relative_attention_bias" in key:
                yield f"{TEXT_PREFIX}position_bias", position_bias(self.config, self.state[key].float())
            elif "layer_norm" in key:
                yield TEXT_PREFIX + key, self.state[key].float()
            elif key == _EMBEDDING:
                yield TEXT_PREFIX + key, self.state[key].to(torch_dtype(precision.computed))
            else:
                linear = key.removesuffix(".weight")
                yield from _format(precision, linear).write(TEXT_PREFIX + linear, self.state[key])
        yield f"{TEXT_PREFIX}position", torch.arange(self.config.text_length)


def expected_keys(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of the encoder."""
    inner = config.num_heads * config.head_dim
    keys: dict[str, tuple[int, ...]] = {"shared.weight": (config.vocab_size, config.width)}
    for i in range(config.depth):
        attention, ffn = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        keys |= {f"{attention}SelfAttention.{name}.weight": (inner, config.width) for name in "qkv"}
        keys[f"{attention}SelfAttention.o.weight"] = (config.width, inner)
        if i == 0:
            keys[f"{attention}SelfAttention.relative_attention_bias.weight"] = (config.num_buckets, config.num_heads)
        keys[f"{attention}layer_norm.weight"] = (config.width,)
        keys |= {f"{ffn}DenseReluDense.{name}.weight": (config.mlp_width, config.width) for name in ("wi_0", "wi_1")}
        keys[f"{ffn}DenseReluDense.wo.weight"] = (config.width, config.mlp_width)
        keys[f"{ffn}layer_norm.weight"] = (config.width,)
    keys["encoder.final_layer_norm.weight"] = (config.width,)
    return keys


def position_bias(config: T5Config, table: Tensor) -> Tensor:
    """The bias of every pair of positions: fp32 [H, T, T] from the table [buckets, H] (`T5Attention.compute_bias`)."""
    positions = torch.arange(config.text_length, device=table.device)
    distance = positions[None] - positions[:, None]  # key minus query
    half = config.num_buckets // 2  # bidirectional: one half per sign
    exact = half // 2
    size = distance.abs()
    far = exact + (
        torch.log(size.clamp_min(1).float() / exact) / math.log(config.max_distance / exact) * (half - exact)
    ).long().clamp_max(half - exact - 1)
    buckets = (distance > 0).long() * half + torch.where(size < exact, size, far)
    return table[buckets].permute(2, 0, 1).contiguous()


def _format(precision: Precision, linear: str) -> MatrixFormat:
    """That of the precision; fp32 in place of fp16 for `wo`, whose products exceed it in T5."""
    own = matrix_format(precision, f"{TEXT_PREFIX}{linear}")
    return FORMATS["float32"] if isinstance(own, Cast) and _overflows(linear, precision) else own


def _overflows(linear: str, precision: Precision) -> bool:
    return linear.endswith(".wo") and precision.computed == "float16"


def encode(
    config: T5Config, weights: Mapping[str, Tensor], ids: Tensor, length: Tensor, precision: Precision
) -> Tensor:
    """The encoder's last hidden state.

    Args:
        config: sizes.
        weights: deployment tensors, by their official names.
        ids: int64 [1, T], padded.
        length: int64 [1], how many are tokens.
        precision: of the bundle.

    Returns:
        fp32 [1, T, width]; the rows of padding are zeros.
    """
    dtype = torch_dtype(precision.computed)
    heads = (config.num_heads, config.text_length, config.head_dim)
    padding = (weights["position"] >= length).float() * MASKED  # [T]
    bias = (weights["position_bias"] + padding).to(dtype).unsqueeze(0)  # [1, H, T, T]
    x = F.embedding(ids[0], weights[_EMBEDDING]).float()  # [T, C]

    def linear(name: str, x: Tensor) -> Tensor:
        return _format(precision, name).product(weights, name, x, None)

    def normed(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, weights[f"{name}.weight"], config.norm_eps)

    for i in range(config.depth):
        attention, ffn = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        hidden = normed(x, f"{attention}layer_norm").to(dtype)
        q, k, v = (
            linear(f"{attention}SelfAttention.{name}", hidden)
            .view(1, config.text_length, config.num_heads, config.head_dim)
            .transpose(1, 2)
            for name in "qkv"
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        attended = attended.view(heads).transpose(0, 1).reshape(config.text_length, -1)
        x = x + linear(f"{attention}SelfAttention.o", attended).float()
        hidden = normed(x, f"{ffn}layer_norm").to(dtype)
        gate = F.gelu(linear(f"{ffn}DenseReluDense.wi_0", hidden), approximate="tanh")
        up = linear(f"{ffn}DenseReluDense.wi_1", hidden)
        wide = torch.float32 if _overflows(f"{ffn}DenseReluDense.wo", precision) else dtype
        x = x + linear(f"{ffn}DenseReluDense.wo", gate.to(wide) * up.to(wide)).float()
    is_token = (weights["position"] < length).float().unsqueeze(-1)
    return (normed(x, "encoder.final_layer_norm") * is_token).unsqueeze(0)
