"""Official Infinity checkpoints: their keys, and the deployment tensors made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastvar_trt.export.models.base import MAX_Q_SCALE
from fastvar_trt.export.models.checkpoint import check_keys, key_problems
from fastvar_trt.export.models.infinity.config import BSQVAEConfig, InfinityConfig
from fastvar_trt.export.models.infinity.vae import official_keys
from fastvar_trt.export.models.matrix import torch_dtype, write_linear, write_matrix
from fastvar_trt.export.models.resize import area_matrix, bilinear_matrix
from fastvar_trt.runtime.precision import Precision

NESTED = ("trainer", "gpt_fsdp")  # where Infinity's trainer keeps the model in a training checkpoint
ROPE_BASE = 10000.0
# Constants and training-time buffers that inference does not read.
_UNUSED = ("attn_bias_for_masking", "lvl_1L", "Infinity_", "rope2d_freqs_grid", ".zero_k_bias")


def expected_keys(config: InfinityConfig) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of an Infinity transformer, without the buffers."""
    c, m, t = config.width, config.mlp_width, config.text_width
    pool = config.pool_heads * config.pool_head_dim
    keys: dict[str, tuple[int, ...]] = {
        "pos_start": (1, 1, c),
        "text_norm.weight": (t,),
        "text_proj_for_sos.ca.mat_q": (1, config.pool_heads, config.pool_head_dim),
        "text_proj_for_sos.ca.v_bias": (pool,),
        "text_proj_for_sos.ca.mat_kv.weight": (2 * pool, t),
        "text_proj_for_sos.ca.proj.weight": (c, pool),
        "text_proj_for_sos.ca.proj.bias": (c,),
        "text_proj_for_ca.0.weight": (c, t),
        "text_proj_for_ca.0.bias": (c,),
        "text_proj_for_ca.2.weight": (c, c),
        "text_proj_for_ca.2.bias": (c,),
        "lvl_embed.weight": (config.num_levels, c),
        "word_embed.weight": (c, config.bits),
        "word_embed.bias": (c,),
        "shared_ada_lin.1.weight": (6 * c, c),
        "shared_ada_lin.1.bias": (6 * c,),
        "head_nm.ada_lin.1.weight": (2 * c, c),
        "head_nm.ada_lin.1.bias": (2 * c,),
        "head.weight": (2 * config.bits, c),
        "head.bias": (2 * config.bits,),
    }
    block = {
        "ada_gss": (1, 1, 6, c),
        "sa.q_bias": (c,),
        "sa.v_bias": (c,),
        "sa.mat_qkv.weight": (3 * c, c),
        "sa.proj.weight": (c, c),
        "sa.proj.bias": (c,),
        "ca.v_bias": (c,),
        "ca.mat_q.weight": (c, c),
        "ca.mat_q.bias": (c,),
        "ca.mat_kv.weight": (2 * c, c),
        "ca.proj.weight": (c, c),
        "ca.proj.bias": (c,),
        "ca_norm.weight": (c,),
        "ca_norm.bias": (c,),
        "ffn.fc1.weight": (m, c),
        "ffn.fc1.bias": (m,),
        "ffn.fc2.weight": (c, m),
        "ffn.fc2.bias": (c,),
    }
    if config.has_cross_gain:
        block["ca_gamma"] = (c,)
    for prefix in config.block_prefixes:
        keys |= {prefix + key: shape for key, shape in block.items()}
    return keys


def check_checkpoints(
    config: InfinityConfig, vae: BSQVAEConfig, state: Mapping[str, Tensor], vae_state: Mapping[str, Tensor]
) -> None:
    """That both state dicts are complete.

    Raises:
        CheckpointError: one error that names the keys at fault in both.
    """
    problems = {"--checkpoint": _transformer_problems(config, state)}
    expected = {_present(vae_state, keys): shape for keys, shape in official_keys(vae).values()}
    known = {key.split(".")[0] for key in expected}
    others = tuple({f"{part}." for part in (key.split(".")[0] for key in vae_state) if part not in known})
    problems["--vae"] = key_problems(vae_state, expected, others)
    check_keys(problems)


def check_transformer(config: InfinityConfig, state: Mapping[str, Tensor]) -> None:
    """That a transformer's state dict is complete and of these sizes.

    Raises:
        CheckpointError: one error that names the keys at fault.
    """
    check_keys({"--checkpoint": _transformer_problems(config, state)})


def _transformer_problems(config: InfinityConfig, state: Mapping[str, Tensor]) -> list[str]:
    # Of two shapes: cfg_uncond has as many rows as the longest text, the q scale one or the other axis of heads.
    problems = key_problems(state, expected_keys(config), (*_UNUSED, "cfg_uncond", ".scale_mul_1H11"))
    scales = [f"{prefix}sa.scale_mul_1H11" for prefix in config.block_prefixes]
    missing = [key for key in scales if key not in state or state[key].numel() != config.num_heads]
    shape = (config.text_length, config.text_width)
    if "cfg_uncond" in state and (
        state["cfg_uncond"].shape[0] < shape[0] or state["cfg_uncond"].shape[1:] != shape[1:]
    ):
        missing.append("cfg_uncond")
    return [*problems, *([f"{len(missing)} missing or mis-shaped: {', '.join(missing)}"] if missing else [])]


def _present(state: Mapping[str, Tensor], keys: tuple[str, str]) -> str:
    """The one of two names that a checkpoint uses."""
    return keys[1] if keys[1] in state else keys[0]


def deployment_tensors(
    config: InfinityConfig,
    vae: BSQVAEConfig,
    state: Mapping[str, Tensor],
    vae_state: Mapping[str, Tensor],
    precision: Precision,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bundle, one at a time, in the names of `models.infinity.model`."""
    yield from transformer_tensors(config, state, precision)
    yield from size_tensors(config, vae, state)
    dtype = torch_dtype(precision.computed)
    for name, (keys, _) in official_keys(vae).items():
        yield name, vae_state[_present(vae_state, keys)].to(torch.float32 if "norm" in name else dtype)


def transformer_tensors(
    config: InfinityConfig, state: Mapping[str, Tensor], precision: Precision
) -> Iterator[tuple[str, Tensor]]:
    """Those of the transformer that do not depend on the size of the pictures.

    What is fp32 whatever the precision: as for VAR (`models.var.checkpoint.transformer_tensors`), and all that
    normalises the text.
    """
    c = config.width

    def linear(name: str, weight: Tensor, bias: Tensor) -> Iterator[tuple[str, Tensor]]:
        return write_linear(precision, name, weight, bias)

    yield "norm.weight", torch.ones(c)
    yield "text.position", torch.arange(config.text_length)
    yield "text.uncond", state["cfg_uncond"][: config.text_length].float()
    yield "text.norm.weight", state["text_norm.weight"].float()
    pool = "text_proj_for_sos.ca."
    yield "text.pool.q", state[pool + "mat_q"][0].float().unsqueeze(-1)
    yield from linear("text.pool.mat_kv", state[pool + "mat_kv.weight"], _kv_bias(state[pool + "v_bias"]))
    yield from linear("text.pool.proj", state[pool + "proj.weight"], state[pool + "proj.bias"])
    for layer in (0, 2):
        source = f"text_proj_for_ca.{layer}"
        yield from linear(f"text.proj.{layer}", state[f"{source}.weight"], state[f"{source}.bias"])

    levels = state["lvl_embed.weight"].float()
    yield "pos.0", state["pos_start"][0].float() + levels[0]
    yield "word_embed.weight", state["word_embed.weight"].float()
    plus_one = torch.zeros(6, c)  # the blocks use 1 + scale: the one is added to the bias here, once
    plus_one[2:4] = 1.0
    yield from write_matrix(precision, "shared_modulation", state["shared_ada_lin.1.weight"])
    yield "shared_modulation.bias", state["shared_ada_lin.1.bias"].float()
    for i, source in enumerate(config.block_prefixes):
        block = f"blocks.{i}."
        yield block + "modulation.bias", state[source + "ada_gss"].view(6, c).float() + plus_one
        q_bias, v_bias = state[source + "sa.q_bias"], state[source + "sa.v_bias"]
        q_bias = _halves(config, q_bias, 1)
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        yield from linear(block + "attn.mat_qkv", _halves(config, state[source + "sa.mat_qkv.weight"], 3), qkv_bias)
        scale = state[source + "sa.scale_mul_1H11"].float().clamp_max(math.log(MAX_Q_SCALE)).exp()
        yield block + "attn.q_scale", scale.view(config.num_heads, 1)
        yield block + "cross.norm.weight", state[source + "ca_norm.weight"].float()
        yield block + "cross.norm.bias", state[source + "ca_norm.bias"].float()
        kv_bias = _kv_bias(state[source + "ca.v_bias"])
        yield from linear(block + "cross.mat_kv", state[source + "ca.mat_kv.weight"], kv_bias)
        yield from linear(block + "cross.mat_q", state[source + "ca.mat_q.weight"], state[source + "ca.mat_q.bias"])
        # A learnt gain on the sublayer's output, in some models, is one on the rows of its last matrix.
        gain = state.get(source + "ca_gamma", torch.ones(1)).float()
        weight, bias = (state[f"{source}ca.proj.{part}"].float() for part in ("weight", "bias"))
        yield from linear(block + "cross.proj", weight * gain[:, None], bias * gain)
        for name, key in (("attn.proj", "sa.proj"), ("ffn.fc1", "ffn.fc1"), ("ffn.fc2", "ffn.fc2")):
            yield from linear(block + name, state[f"{source}{key}.weight"], state[f"{source}{key}.bias"])
    head_plus_one = torch.cat([torch.ones(c), torch.zeros(c)])  # scale, shift
    yield from write_matrix(precision, "head_modulation", state["head_nm.ada_lin.1.weight"])
    yield "head_modulation.bias", state["head_nm.ada_lin.1.bias"].float() + head_plus_one
    yield from linear("head", state["head.weight"], state["head.bias"])


def size_tensors(
    config: InfinityConfig, vae: BSQVAEConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Those that depend on the size of the pictures; equal ones of several sizes have equal names."""
    for k in range(1, len(config.schedule)):
        # Not the bias of the product: TensorRT for RTX 1.7 builds no engine where that is an input of the network.
        yield f"pos.{k}", state["word_embed.bias"].float() + state["lvl_embed.weight"][k].float()
    for k in range(len(config.schedule)):
        cos, sin = rope_tables(config, k)
        yield f"{config.rope_name(k)}.cos", cos
        yield f"{config.rope_name(k)}.sin", sin
    yield from _resizes(config)
    if vae.encoder_channels:
        yield from _shrinks(config)


def _kv_bias(v_bias: Tensor) -> Tensor:
    """Bias of keys (none) and values."""
    return torch.cat([torch.zeros_like(v_bias), v_bias])


def _halves(config: InfinityConfig, rows: Tensor, parts: int) -> Tensor:
    """Reorder the rows of q and k (not v) within each head: even channels first.

    The reference rotates neighbouring channels. q·k does not change when both are permuted alike, and so the two
    channels of a pair lie half a head apart, where a rotation needs no interleaving.
    """
    order = torch.arange(config.head_dim, device=rows.device).view(-1, 2).T.flatten()
    split = rows.view(parts, config.num_heads, config.head_dim, *rows.shape[1:])
    rotated = split[:2, :, order]
    return torch.cat([rotated, split[2:]]).reshape(rows.shape)


def rope_tables(config: InfinityConfig, scale: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a scale's positions: fp32 [L, D/2] each, the row's angles first, then the column's.

    `precompute_rope2d_freqs_grid` with `rope2d_normalized_by_hw=2`: positions are those of the last scale's map. Of a
    map that is larger than the span, which the public code does not have, they lie between these.
    """
    frequencies = 1.0 / ROPE_BASE ** (torch.arange(0, config.head_dim // 2, 2).float() / (config.head_dim // 2))
    (height, width), (span_h, span_w) = config.schedule[scale], config.rope_span
    rows, columns = _positions(height, span_h), _positions(width, span_w)
    angles = torch.cat(
        [
            torch.outer(rows, frequencies)[:, None].expand(-1, width, -1),
            torch.outer(columns, frequencies)[None].expand(height, -1, -1),
        ],
        dim=-1,
    ).reshape(height * width, -1)
    return angles.cos(), angles.sin()


def _positions(length: int, span: int) -> Tensor:
    positions = torch.arange(length) * (span / length)
    return positions.round() if length <= span else positions


def _shrinks(config: InfinityConfig) -> Iterator[tuple[str, Tensor]]:
    """Area matrices from the last scale's feature map to every other one's, each once, for the encoder."""
    full_h, full_w = config.code_schedule[-1]
    matrices: dict[str, Tensor] = {}
    for height, width in config.code_schedule[:-1]:
        if (height, width) != (full_h, full_w):
            matrices[f"resize.area_{height}_{full_h}"] = area_matrix(height, full_h)
            matrices[f"resize.area_{width}_{full_w}_t"] = area_matrix(width, full_w).T.contiguous()
    yield from matrices.items()


def _resizes(config: InfinityConfig) -> Iterator[tuple[str, Tensor]]:
    """Bilinear matrices between every scale's feature map and the last one's, each once."""
    full_h, full_w = config.code_schedule[-1]
    matrices: dict[str, Tensor] = {}
    for height, width in config.code_schedule[:-1]:
        if (height, width) == (full_h, full_w):
            continue
        matrices |= {f"resize.bilinear_{full_h}_{height}": bilinear_matrix(full_h, height)}
        matrices |= {f"resize.bilinear_{full_w}_{width}_t": bilinear_matrix(full_w, width).T.contiguous()}
    for height, width in config.code_schedule[1:-1]:
        if (height, width) == (full_h, full_w):
            continue
        matrices |= {f"resize.bilinear_{height}_{full_h}": bilinear_matrix(height, full_h)}
        matrices |= {f"resize.bilinear_{width}_{full_w}_t": bilinear_matrix(width, full_w).T.contiguous()}
    yield from matrices.items()
