"""The language model of Qwen2 as a text encoder (HART's is that of Qwen2-VL-1.5B), from a Hugging Face folder to one
graph.

Written here and not taken from `transformers` for the reason that `models.t5` gives. Parameter names are the official
ones without their prefix; `tests/test_hart.py` compares with `transformers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.export.models.base import MASKED, rms_norm
from fastvar_trt.export.models.checkpoint import key_problems, load_folder, read_config
from fastvar_trt.export.models.matrix import matrix_format, torch_dtype, write_linear, write_matrix
from fastvar_trt.export.models.text import TEXT_PREFIX, TextEncoderConfig
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.manifest import TOKENIZER_FILE
from fastvar_trt.runtime.precision import Precision

_TYPES = ("qwen2", "qwen2_vl")
# Where the language model lies in the layouts that there are, the deepest first.
_LAYOUTS = ("model.language_model.", "language_model.model.", "model.", "")
_UNUSED = ("visual.", "lm_head.", "rotary_emb.")


@dataclasses.dataclass(frozen=True)
class Qwen2Config(TextEncoderConfig):
    """Sizes of the language model, and how prompts are laid out before it."""

    width: int  # `hidden_size`
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    depth: int
    norm_eps: float
    rope_base: float
    text_length: int  # T, of the graph
    system_length: int  # tokens of the system prompt, which come first and are not given out
    pad_id: int
    pads_left: bool

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.num_heads

    @property
    def num_positions(self) -> int:
        """Of system prompt and prompt."""
        return self.system_length + self.text_length

    def encode(self, weights: Mapping[str, Tensor], ids: Tensor, length: Tensor, precision: Precision) -> Tensor:
        """See `TextEncoderConfig.encode`."""
        return encode(self, weights, ids, length, precision)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str, **layout: Any) -> Qwen2Config:
        """Hugging Face's `config.json`, of the language model or of Qwen2-VL.

        Args:
            data: the JSON object.
            where: for errors.
            layout: the other fields.

        Raises:
            CheckpointError: not a Qwen2.
        """
        if data.get("model_type") not in _TYPES:
            raise CheckpointError(f"{where}: got model_type {data.get('model_type')!r}, expected {' or '.join(_TYPES)}")
        data = data.get("text_config", data)
        try:
            num_heads = int(data["num_attention_heads"])
            rope = data.get("rope_parameters") or data
            config = cls(
                width=int(data["hidden_size"]),
                num_heads=num_heads,
                num_kv_heads=int(data.get("num_key_value_heads", num_heads)),
                mlp_width=int(data["intermediate_size"]),
                depth=int(data["num_hidden_layers"]),
                vocab_size=int(data["vocab_size"]),
                norm_eps=float(data["rms_norm_eps"]),
                rope_base=float(rope.get("rope_theta", 10000.0)),
                **layout,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where}: {error} is missing or no number") from error
        width, kv_heads = config.width, config.num_kv_heads
        if min(num_heads, kv_heads) < 1 or width % num_heads or num_heads % kv_heads:
            raise CheckpointError(
                f"{where}: got num_attention_heads {num_heads} and num_key_value_heads {kv_heads}, expected a divisor "
                f"of hidden_size {width}, and one of that"
            )
        return config


@dataclasses.dataclass(frozen=True)
class Qwen2Source:
    """A text encoder to export."""

    config: Qwen2Config
    state: Mapping[str, Tensor]
    tokenizer: Path
    system_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: Path, text_length: int, text_width: int, system_prompt: str) -> Qwen2Source:
        """A Hugging Face folder: `config.json`, weights, and the tokenizer with its configuration.

        Args:
            folder: the folder.
            text_length: T, the positions that the image model takes.
            text_width: what it takes of each.
            system_prompt: what comes before every prompt; may be empty.

        Raises:
            CheckpointError: a file that is missing or damaged, another kind of model, another width.
        """
        where = f"--text-encoder {folder}"
        data = read_config(folder, "--text-encoder")
        tokenizer = _tokenizer(folder)
        pad_id, pads_left = _padding(folder, tokenizer)
        system_ids = tuple(tokenizer.encode(system_prompt).ids) if system_prompt else ()
        layout = {
            "text_length": text_length,
            "system_length": len(system_ids),
            "pad_id": pad_id,
            "pads_left": pads_left,
        }
        config = Qwen2Config.from_json(data, f"{where}/config.json", **layout)
        if config.width != text_width:
            raise CheckpointError(
                f"{where}: its features are {config.width} wide, the model takes {text_width}; give the encoder that "
                "the model was trained with"
            )
        state = _language_model(load_folder(folder))
        problems = key_problems(state, expected_keys(config), _UNUSED)
        if problems:
            raise CheckpointError(f"{where}: the keys are not those of Qwen2: {'; '.join(problems)}")
        return cls(config, state, folder / TOKENIZER_FILE, system_ids)

    def tensors(self, precision: Precision) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time; normalisation and rotary tables are fp32."""
        config, state = self.config, self.state
        yield f"{TEXT_PREFIX}embed_tokens.weight", state["embed_tokens.weight"].to(torch_dtype(precision.computed))
        for i in range(config.depth):
            layer = f"layers.{i}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{TEXT_PREFIX}{layer}{norm}.weight", state[f"{layer}{norm}.weight"].float()
            weight, bias = (
                torch.cat([state[f"{layer}self_attn.{name}_proj.{part}"] for name in "qkv"])
                for part in ("weight", "bias")
            )
            yield from write_linear(precision, f"{TEXT_PREFIX}{layer}qkv", weight, bias)
            yield from write_matrix(precision, f"{TEXT_PREFIX}{layer}o", state[f"{layer}self_attn.o_proj.weight"])
            gate_up = torch.cat([state[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")])
            yield from write_matrix(precision, f"{TEXT_PREFIX}{layer}gate_up", gate_up)
            yield from write_matrix(precision, f"{TEXT_PREFIX}{layer}down", state[f"{layer}mlp.down_proj.weight"])
        yield f"{TEXT_PREFIX}norm.weight", state["norm.weight"].float()
        half = config.head_dim // 2
        frequencies = config.rope_base ** -(torch.arange(half).float() / half)
        angles = torch.outer(torch.arange(config.num_positions).float(), frequencies)
        # A reshape of a constant would be folded into a copy of it.
        yield f"{TEXT_PREFIX}rope.cos", angles.cos().unsqueeze(1)
        yield f"{TEXT_PREFIX}rope.sin", angles.sin().unsqueeze(1)
        yield f"{TEXT_PREFIX}system", torch.tensor(self.system_ids, dtype=torch.int64)
        yield f"{TEXT_PREFIX}position", torch.arange(config.num_positions)
        order = torch.arange(config.num_positions)
        yield f"{TEXT_PREFIX}causal", (order[None] > order[:, None]).float() * MASKED


def expected_keys(config: Qwen2Config) -> dict[str, tuple[int, ...]]:
    """Official key, without its prefix -> shape."""
    c, m = config.width, config.mlp_width
    kv = config.num_kv_heads * config.head_dim
    keys: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, c), "norm.weight": (c,)}
    for i in range(config.depth):
        layer = f"layers.{i}."
        for name, size in (("q", c), ("k", kv), ("v", kv)):
            keys |= {f"{layer}self_attn.{name}_proj.weight": (size, c), f"{layer}self_attn.{name}_proj.bias": (size,)}
        keys |= {f"{layer}self_attn.o_proj.weight": (c, c), f"{layer}mlp.down_proj.weight": (c, m)}
        keys |= {f"{layer}mlp.{name}_proj.weight": (m, c) for name in ("gate", "up")}
        keys |= {f"{layer}{norm}.weight": (c,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return keys


def _language_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that is the language model, without its prefix."""
    prefix = next((p for p in _LAYOUTS if f"{p}embed_tokens.weight" in state), "")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CheckpointError(
            "--text-encoder: needs the package tokenizers; pip install 'fastvar-trt[text]'"
        ) from error
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"--text-encoder {folder}: {TOKENIZER_FILE} is missing; give a Hugging Face folder")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"--text-encoder {path}: not a readable tokenizer: {error}") from error


def _padding(folder: Path, tokenizer: Any) -> tuple[int, bool]:
    """Id of the padding token, and whether it comes before the prompt, by `tokenizer_config.json`."""
    data = read_config(folder, "--text-encoder", "tokenizer_config.json")
    token = data.get("pad_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    pad_id = None if token is None else tokenizer.token_to_id(token)
    if pad_id is None:
        raise CheckpointError(
            f"--text-encoder {folder}: tokenizer_config.json: pad_token {token!r} is no token of the tokenizer"
        )
    side = data.get("padding_side", "right")
    if side not in ("left", "right"):
        raise CheckpointError(f"--text-encoder {folder}: padding_side: got {side!r}, expected left or right")
    return int(pad_id), side == "left"


def encode(
    config: Qwen2Config, weights: Mapping[str, Tensor], ids: Tensor, length: Tensor, precision: Precision
) -> Tensor:
    """The last hidden state of a prompt, after the final norm; rows of padding are what the model makes of it.

    Args:
        config: sizes.
        weights: deployment tensors, without their prefix.
        ids: int64 [1, T], the prompt's tokens first.
        length: int64 [1], how many are tokens.
        precision: of the bundle.

    Returns:
        fp32 [1, T, width], padding where the tokenizer puts it.
    """
    dtype = torch_dtype(precision.computed)
    place, count, system = weights["position"], config.num_positions, config.system_length  # [S + T]
    if config.pads_left:
        is_padding = (place >= system) & (place < count - length)
        prompt = ids[0].gather(0, (place + (length - system))[system:] % config.text_length)
    else:
        is_padding, prompt = place >= system + length, ids[0]
    tokens = torch.cat([weights["system"], prompt.masked_fill(is_padding[system:], config.pad_id)])
    bias = torch.clamp_min(weights["causal"] + is_padding.float() * MASKED, MASKED).to(dtype)[None, None]
    x = F.embedding(tokens, weights["embed_tokens.weight"]).float()
    cos, sin = (weights[f"rope.{part}"] for part in ("cos", "sin"))  # [S + T, 1, D/2]

    def product(name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return matrix_format(precision, f"{TEXT_PREFIX}{name}").product(weights, name, x, bias)

    def normed(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, weights[f"{name}.weight"], config.norm_eps)

    def turned(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(dtype)

    heads, kv_heads = config.num_heads, config.num_kv_heads
    for i in range(config.depth):
        layer = f"layers.{i}."
        hidden = normed(x, f"{layer}input_layernorm").to(dtype)
        qkv = product(f"{layer}qkv", hidden, weights[f"{layer}qkv.bias"])
        q, k, v = qkv.view(count, heads + 2 * kv_heads, config.head_dim).split([heads, kv_heads, kv_heads], dim=1)
        q, k = turned(q), turned(k)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)[0].transpose(0, 1).reshape(count, -1)
        x = x + product(f"{layer}o", attended).float()
        hidden = normed(x, f"{layer}post_attention_layernorm").to(dtype)
        gate, up = product(f"{layer}gate_up", hidden).chunk(2, dim=-1)
        x = x + product(f"{layer}down", F.silu(gate) * up).float()
    return normed(x, "norm")[config.system_length :].unsqueeze(0)
