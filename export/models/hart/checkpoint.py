"""Official HART checkpoints: their keys, and the deployment tensors made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.export.models.base import MAX_Q_SCALE
from fastvar_trt.export.models.checkpoint import check_keys, key_problems, load_folder, load_state_dict
from fastvar_trt.export.models.hart.config import HARTConfig
from fastvar_trt.export.models.hart.diffusion import FREQUENCIES, diffusion_steps, sinusoids
from fastvar_trt.export.models.matrix import write_linear, write_matrix
from fastvar_trt.export.models.vqvae import VQVAEConfig, check_book, vae_problems, vqvae_tensors
from fastvar_trt.runtime.precision import Precision

_EMA_FILE = "ema_model.bin"
ROPE_BASE = 10000.0
# Buffers that training leaves in a checkpoint and inference does not read.
_UNUSED = ("attn_bias_for_masking", "lvl_1L", ".attn.zero_k_bias")


def expected_keys(config: HARTConfig) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of a HART transformer, without the buffers."""
    c, m, t, w = config.width, config.mlp_width, config.text_width, config.diffusion_width
    keys: dict[str, tuple[int, ...]] = {"context_norm.weight": (t,)} if config.has_context_norm else {}
    if config.has_timestep_embed:
        keys |= _linear("lvl_embed.mlp.0", c, FREQUENCIES) | _linear("lvl_embed.mlp.2", c, c)
    else:
        keys["lvl_embed.weight"] = (len(config.patch_nums), c)
    keys |= {"decoder_norm.weight": (c,), "head_nm.ln_wo_grad.weight": (c,)}
    keys |= _linear("word_embed", c, config.code_channels) | _linear("context_embed", c, t)
    keys |= _linear("head_nm.ada_lin.1", 2 * c, c) | _linear("head", config.vocab_size, c)
    block = {
        "attn.q_bias": (c,),
        "attn.v_bias": (c,),
        "attn.qkv_proj.weight": (3 * c, c),
        **_linear("attn.proj", c, c),
        "ffn.gate_proj.weight": (m, c),
        "ffn.up_proj.weight": (m, c),
        "ffn.down_proj.weight": (c, m),
        "ln_wo_grad.weight": (c,),
    }
    if config.attn_l2_norm:
        block["attn.scale_mul_1H11"] = (1, config.num_heads, 1, 1)
    for i in range(config.depth):
        keys |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    net = {
        **_linear("time_embed.mlp.0", w, FREQUENCIES),
        **_linear("time_embed.mlp.2", w, w),
        **_linear("cond_embed", w, c),
        **_linear("input_proj", w, config.code_channels),
        **_linear("final_layer.linear", 2 * config.code_channels, w),
        **_linear("final_layer.adaLN_modulation.1", 2 * w, w),
    }
    for j in range(config.diffusion_depth):
        of_block = {"in_ln.weight": (w,), "in_ln.bias": (w,), **_linear("adaLN_modulation.1", 3 * w, w)}
        of_block |= _linear("mlp.0", w, w) | _linear("mlp.2", w, w)
        net |= {f"res_blocks.{j}.{key}": shape for key, shape in of_block.items()}
    return keys | {f"diffloss.net.{key}": shape for key, shape in net.items()}


def _linear(name: str, num_out: int, num_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


def load_transformer(llm: Path) -> Mapping[str, Tensor]:
    """The state dict of the official folder: `ema_model.bin`, else its safetensors files.

    Raises:
        CheckpointError: neither, or damaged.
    """
    ema = llm / _EMA_FILE
    return load_state_dict(ema) if ema.is_file() else load_folder(llm)


def transformer_problems(config: HARTConfig, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from being that of such a HART: `key_problems`."""
    return key_problems(state, expected_keys(config), _UNUSED)


def check_checkpoints(
    config: HARTConfig, vae_config: VQVAEConfig, state: Mapping[str, Tensor], vae_state: Mapping[str, Tensor]
) -> None:
    """That both state dicts are complete and belong together.

    Raises:
        CheckpointError: one error that names the keys at fault in both, or the size in which the two models differ.
    """
    check_keys(
        {
            "--checkpoint": transformer_problems(config, state),
            "--vae": vae_problems(vae_config, vae_state),
        }
    )
    check_book(vae_config, config.vocab_size, config.code_channels)


def deployment_tensors(
    config: HARTConfig,
    vae_config: VQVAEConfig,
    state: Mapping[str, Tensor],
    vae_state: Mapping[str, Tensor],
    precision: Precision,
    max_top_k: int,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bundle, one at a time, in the names of `models.hart.model`."""
    yield "sampling.rank", torch.arange(max_top_k)
    yield "sampling.narrow_rank", torch.arange((max_top_k + 1) // 2)
    yield from transformer_tensors(config, state, precision)
    yield from vqvae_tensors(vae_config, config.patch_nums, vae_state, precision)


def transformer_tensors(
    config: HARTConfig, state: Mapping[str, Tensor], precision: Precision
) -> Iterator[tuple[str, Tensor]]:
    """Those of transformer and residual diffusion.

    What is fp32 whatever the precision: as for VAR (`models.var.checkpoint.transformer_tensors`).
    """
    c = config.width

    def linear(name: str, source: str) -> Iterator[tuple[str, Tensor]]:
        return write_linear(precision, name, state[f"{source}.weight"], state[f"{source}.bias"])

    def modulation(name: str, source: str, ones: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One whose users take 1 + scale: the one joins the bias, in fp32."""
        yield from write_matrix(precision, name, state[f"{source}.weight"])
        yield f"{name}.bias", state[f"{source}.bias"].float() + ones

    if config.has_context_norm:
        yield "context.norm.weight", state["context_norm.weight"].float()
    yield from linear("context.embed", "context_embed")
    yield "context.position", torch.arange(config.context_tokens).float()
    yield "word_embed.weight", state["word_embed.weight"].float()
    yield "word_embed.bias", state["word_embed.bias"].float()
    for k, level in enumerate(_level_embeddings(config, state)):
        yield f"pos.{k}", level

    for i in range(config.depth):
        source = block = f"blocks.{i}."
        yield block + "norm.weight", state[source + "ln_wo_grad.weight"].float()
        q_bias, v_bias = state[source + "attn.q_bias"], state[source + "attn.v_bias"]
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        yield from write_linear(precision, block + "attn.mat_qkv", state[source + "attn.qkv_proj.weight"], qkv_bias)
        if config.attn_l2_norm:
            scale = state[source + "attn.scale_mul_1H11"].float().exp().clamp_max(MAX_Q_SCALE)
            yield block + "attn.q_scale", scale.view(config.num_heads, 1)
        yield from linear(block + "attn.proj", source + "attn.proj")
        gate_up = torch.cat([state[f"{source}ffn.{part}_proj.weight"] for part in ("gate", "up")])
        yield from write_matrix(precision, block + "ffn.gate_up", gate_up)
        yield from write_matrix(precision, block + "ffn.down", state[source + "ffn.down_proj.weight"])
    yield "head.norm.weight", state["head_nm.ln_wo_grad.weight"].float()
    yield from modulation("head_modulation", "head_nm.ada_lin.1", torch.cat([torch.ones(c), torch.zeros(c)]))
    yield from linear("head", "head")

    half = config.head_dim // 2
    yield "rope.context", ROPE_BASE ** -(torch.arange(half).float() / half)
    yield "rope.map", ROPE_BASE ** -(torch.arange(half // 2).float() / (half // 2))
    last = config.patch_nums[-1]
    for k, side in enumerate(config.patch_nums[1:], 1):
        yield f"rope.{k}", torch.arange(side).float() / side * last

    yield "diffusion.norm.weight", state["decoder_norm.weight"].float()
    yield from _diffusion(config, state, linear, modulation)


def _diffusion(
    config: HARTConfig,
    state: Mapping[str, Tensor],
    linear: Callable[[str, str], Iterator[tuple[str, Tensor]]],
    modulation: Callable[[str, str, Tensor], Iterator[tuple[str, Tensor]]],
) -> Iterator[tuple[str, Tensor]]:
    """Those of the network of the residual diffusion (`SimpleMLPAdaLN`); its steps' times are embedded here."""
    net, w = "diffloss.net.", config.diffusion_width
    times = torch.stack([sinusoids(step.time) for step in diffusion_steps(config.diffusion_steps)])
    for i, embedded in enumerate(_embedded(state, f"{net}time_embed.mlp", times)):
        yield f"diffusion.time.{i}", embedded
    yield from linear("diffusion.cond", f"{net}cond_embed")
    yield from linear("diffusion.input", f"{net}input_proj")
    zeros, ones = torch.zeros(w), torch.ones(w)
    for j in range(config.diffusion_depth):
        source, block = f"{net}res_blocks.{j}.", f"diffusion.blocks.{j}."
        for part in ("weight", "bias"):
            yield f"{block}norm.{part}", state[f"{source}in_ln.{part}"].float()
        # shift, 1 + scale, gate
        yield from modulation(f"{block}modulation", f"{source}adaLN_modulation.1", torch.cat([zeros, ones, zeros]))
        yield from linear(f"{block}fc1", f"{source}mlp.0")
        yield from linear(f"{block}fc2", f"{source}mlp.2")
    yield "diffusion.ones", ones
    final = f"{net}final_layer."
    yield from modulation("diffusion.final.modulation", f"{final}adaLN_modulation.1", torch.cat([zeros, ones]))
    yield from linear("diffusion.final", f"{final}linear")


def _level_embeddings(config: HARTConfig, state: Mapping[str, Tensor]) -> Tensor:
    """fp32 [K, C], from a table or from sinusoids of the scale's number."""
    count = len(config.patch_nums)
    if not config.has_timestep_embed:
        return state["lvl_embed.weight"].float()
    return _embedded(state, "lvl_embed.mlp", torch.stack([sinusoids(scale) for scale in range(count)]))


def _embedded(state: Mapping[str, Tensor], source: str, inputs: Tensor) -> Tensor:
    """`TimestepEmbedder.mlp`: fp32 [N, 256] -> [N, C]."""
    first, second = ((state[f"{source}.{i}.weight"].float(), state[f"{source}.{i}.bias"].float()) for i in (0, 2))
    return F.linear(F.silu(F.linear(inputs.to(first[0].device), *first)), *second)
