"""Official VAR checkpoints: their keys, and the deployment tensors made of them.

Every rename and every precomputation between the official state dicts and the tensors of a bundle is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastvar_trt.export.models.base import MAX_Q_SCALE
from fastvar_trt.export.models.checkpoint import check_keys, key_problems
from fastvar_trt.export.models.matrix import write_linear, write_matrix
from fastvar_trt.export.models.var.config import VARConfig
from fastvar_trt.export.models.vqvae import VQVAEConfig, check_book, vae_problems, vqvae_tensors
from fastvar_trt.runtime.precision import Precision

NESTED = ("trainer", "var_wo_ddp")  # where VAR's trainer keeps the model in a training checkpoint
# Buffers that training leaves in a checkpoint and inference does not read.
_UNUSED = ("attn_bias_for_masking", "lvl_1L", ".attn.zero_k_bias")


def expected_var_keys(config: VARConfig) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of a VAR transformer (`VAR.state_dict()`), without the buffers."""
    c, m, first = config.width, config.mlp_width, config.patch_nums[0] ** 2
    keys: dict[str, tuple[int, ...]] = {
        "pos_start": (1, first, c),
        "pos_1LC": (1, sum(n * n for n in config.patch_nums), c),
        "word_embed.weight": (c, config.code_channels),
        "word_embed.bias": (c,),
        "class_emb.weight": (config.num_classes + 1, c),
        "lvl_embed.weight": (len(config.patch_nums), c),
        "head_nm.ada_lin.1.weight": (2 * c, c),
        "head_nm.ada_lin.1.bias": (2 * c,),
        "head.weight": (config.vocab_size, c),
        "head.bias": (config.vocab_size,),
    }
    if config.shared_aln:
        keys |= {"shared_ada_lin.1.weight": (6 * c, c), "shared_ada_lin.1.bias": (6 * c,)}
    for i in range(config.depth):
        block = {
            "attn.q_bias": (c,),
            "attn.v_bias": (c,),
            "attn.mat_qkv.weight": (3 * c, c),
            "attn.proj.weight": (c, c),
            "attn.proj.bias": (c,),
            "ffn.fc1.weight": (m, c),
            "ffn.fc1.bias": (m,),
            "ffn.fc2.weight": (c, m),
            "ffn.fc2.bias": (c,),
        }
        if config.attn_l2_norm:
            block["attn.scale_mul_1H11"] = (1, config.num_heads, 1, 1)
        if config.shared_aln:
            block["ada_gss"] = (1, 1, 6, c)
        else:
            block |= {"ada_lin.1.weight": (6 * c, c), "ada_lin.1.bias": (6 * c,)}
        keys |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return keys


def var_problems(config: VARConfig, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from being that of such a VAR: `key_problems`."""
    return key_problems(state, expected_var_keys(config), _UNUSED)


def check_checkpoints(
    config: VARConfig,
    vae_config: VQVAEConfig,
    state: Mapping[str, Tensor],
    vae_state: Mapping[str, Tensor],
    option: str = "--checkpoint",
) -> None:
    """That both state dicts are complete and belong together; `option` names the transformer's in errors.

    Raises:
        CheckpointError: one error that names the keys at fault in both, or the size in which the two models differ.
    """
    problems = {
        option: var_problems(config, state),
        "--vae": vae_problems(vae_config, vae_state),
    }
    check_keys(problems)
    check_book(vae_config, config.vocab_size, config.code_channels)


def deployment_tensors(
    config: VARConfig,
    vae_config: VQVAEConfig,
    state: Mapping[str, Tensor],
    vae_state: Mapping[str, Tensor],
    precision: Precision,
    max_top_k: int,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bundle, one at a time, in the names of `models.var.model`."""
    yield from transformer_tensors(config, state, precision)
    yield from shared_tensors(config, vae_config, vae_state, precision, max_top_k)


def shared_tensors(
    config: VARConfig, vae_config: VQVAEConfig, vae_state: Mapping[str, Tensor], precision: Precision, max_top_k: int
) -> Iterator[tuple[str, Tensor]]:
    """Those that are not the transformer's: see `vqvae_tensors`; `sampling.rank` is 0, 1, ... as far as top-k may
    reach: to `max_top_k`, where that is 0 or too large over the whole vocabulary."""
    yield "sampling.rank", torch.arange(min(max_top_k or config.vocab_size, config.vocab_size))
    yield from vqvae_tensors(vae_config, config.patch_nums, vae_state, precision)


def transformer_tensors(
    config: VARConfig, state: Mapping[str, Tensor], precision: Precision
) -> Iterator[tuple[str, Tensor]]:
    """Those of the transformer.

    Of the precision are the large matrices and their biases. fp32 stay: embeddings and positions (added to the
    residual stream), modulation biases (1 + scale would lose the scale's digits) and normalisation parameters.
    `norm.weight` (ones) is a constant that would otherwise be repeated in every graph.
    """
    c = config.width
    yield "norm.weight", torch.ones(c)
    yield "class_emb.weight", state["class_emb.weight"].float()
    yield "word_embed.weight", state["word_embed.weight"].float()
    yield "word_embed.bias", state["word_embed.bias"].float()
    start = 0
    for k, side in enumerate(config.patch_nums):
        length = side * side
        position = state["pos_1LC"][0, start : start + length].float() + state["lvl_embed.weight"][k].float()
        if k == 0:
            position = position + state["pos_start"][0].float()
        yield f"pos.{k}", position
        start += length

    # The blocks use 1 + scale: the one is added to the bias here, once.
    plus_one = torch.zeros(6, c)
    plus_one[2:4] = 1.0
    if config.shared_aln:
        yield from write_matrix(precision, "shared_modulation", state["shared_ada_lin.1.weight"])
        yield "shared_modulation.bias", state["shared_ada_lin.1.bias"].float()
    for i in range(config.depth):
        source = block = f"blocks.{i}."
        if config.shared_aln:
            yield block + "modulation.bias", state[source + "ada_gss"].view(6, c).float() + plus_one
        else:
            yield from write_matrix(precision, block + "modulation", state[source + "ada_lin.1.weight"])
            yield block + "modulation.bias", state[source + "ada_lin.1.bias"].float() + plus_one.flatten()
        q_bias, v_bias = state[source + "attn.q_bias"], state[source + "attn.v_bias"]
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        yield from write_linear(precision, block + "attn.mat_qkv", state[source + "attn.mat_qkv.weight"], qkv_bias)
        if config.attn_l2_norm:
            scale = state[source + "attn.scale_mul_1H11"].float().exp().clamp_max(MAX_Q_SCALE)
            yield block + "attn.q_scale", scale.view(config.num_heads, 1)
        for linear in ("attn.proj", "ffn.fc1", "ffn.fc2"):
            weight, bias = (state[f"{source}{linear}.{part}"] for part in ("weight", "bias"))
            yield from write_linear(precision, block + linear, weight, bias)
    head_plus_one = torch.cat([torch.ones(c), torch.zeros(c)])  # scale, shift
    yield from write_matrix(precision, "head_modulation", state["head_nm.ada_lin.1.weight"])
    yield "head_modulation.bias", state["head_nm.ada_lin.1.bias"].float() + head_plus_one
    yield from write_linear(precision, "head", state["head.weight"], state["head.bias"])
