"""Official VAR checkpoints: their keys, and the deployment tensors made of them.

Every rename and every precomputation between the official state dicts and the tensors of a bundle is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastvar_trt.export.models.base import MAX_Q_SCALE
from fastvar_trt.export.models.checkpoint import check_keys, key_problems
from fastvar_trt.export.models.matrix import matrix_format, torch_dtype, write_linear
from fastvar_trt.export.models.resize import area_matrix, bicubic_matrix
from fastvar_trt.export.models.var.config import VARConfig, VQVAEConfig
from fastvar_trt.export.models.var.vqvae import ImageDecoder
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.precision import Precision

# Buffers that training leaves in a checkpoint and inference does not read.
_UNUSED = ("attn_bias_for_masking", "lvl_1L", ".attn.zero_k_bias")
_UNUSED_VAE = ("encoder.", "quant_conv.", "quantize.ema_vocab_hit_SV")


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


def phi_key(config: VQVAEConfig, index: int) -> str:
    """Official key prefix of one residual convolution of the quantizer."""
    middle = {"shared": "qresi.", "partially_shared": f"qresi_ls.{index}.", "non_shared": f"{index}."}[config.phi]
    return f"quantize.quant_resi.{middle}"


def expected_vae_keys(config: VQVAEConfig) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of the decoding half of a VQVAE."""
    with torch.device("meta"):
        keys = {key: tuple(tensor.shape) for key, tensor in ImageDecoder(config).state_dict().items()}
    c = config.code_channels
    keys["quantize.embedding.weight"] = (config.vocab_size, c)
    for index in range(config.num_phi):
        keys[phi_key(config, index) + "weight"] = (c, c, 3, 3)
        keys[phi_key(config, index) + "bias"] = (c,)
    return keys


def check_checkpoints(
    config: VARConfig, vae_config: VQVAEConfig, state: Mapping[str, Tensor], vae_state: Mapping[str, Tensor]
) -> None:
    """That both state dicts are complete and belong together.

    Raises:
        CheckpointError: one error that names the keys at fault in both, or the size in which the two models differ.
    """
    problems = {
        "--checkpoint": key_problems(state, expected_var_keys(config), _UNUSED),
        "--vae": key_problems(vae_state, expected_vae_keys(vae_config), _UNUSED_VAE),
    }
    check_keys(problems)
    for what in ("vocab_size", "code_channels"):
        ours, vae = getattr(config, what), getattr(vae_config, what)
        if ours != vae:
            raise CheckpointError(
                f"--vae: {what}: the VAE has {vae}, the transformer {ours}; give the VAE that it was trained with"
            )


def deployment_tensors(
    config: VARConfig,
    vae_config: VQVAEConfig,
    state: Mapping[str, Tensor],
    vae_state: Mapping[str, Tensor],
    precision: Precision,
    max_top_k: int,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bundle, one at a time, in the names of `models.var.model`.

    Of the precision are the large matrices, their biases and the decoder's convolutions. fp32 stay: embeddings and
    positions (added to the residual stream), modulation biases (1 + scale would lose the scale's digits),
    the code book and its convolutions (they accumulate in f_hat), normalisation parameters, and the
    interpolation matrices. `norm.weight` (ones) and `sampling.rank` (0 .. max_top_k - 1) are constants that
    would otherwise be repeated in every graph.
    """
    c, matrix, dtype = config.width, matrix_format(precision), torch_dtype(precision.computed)
    yield "norm.weight", torch.ones(c)
    yield "sampling.rank", torch.arange(max_top_k)
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
        yield from matrix.write("shared_modulation", state["shared_ada_lin.1.weight"])
        yield "shared_modulation.bias", state["shared_ada_lin.1.bias"].float()
    for i in range(config.depth):
        source = block = f"blocks.{i}."
        if config.shared_aln:
            yield block + "modulation.bias", state[source + "ada_gss"].view(6, c).float() + plus_one
        else:
            yield from matrix.write(block + "modulation", state[source + "ada_lin.1.weight"])
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
    yield from matrix.write("head_modulation", state["head_nm.ada_lin.1.weight"])
    yield "head_modulation.bias", state["head_nm.ada_lin.1.bias"].float() + head_plus_one
    yield from write_linear(precision, "head", state["head.weight"], state["head.bias"])

    yield "quantize.embedding.weight", vae_state["quantize.embedding.weight"].float()
    ratio = vae_config.phi_ratio
    channels = torch.arange(vae_config.code_channels)
    for index in range(vae_config.num_phi):
        # phi(x) = (1 - r) x + r conv(x) is itself a convolution: the identity joins the kernel's centre.
        weight = vae_state[phi_key(vae_config, index) + "weight"].float() * ratio
        weight[channels, channels, 1, 1] += 1.0 - ratio
        yield f"phi.{index}.weight", weight
        yield f"phi.{index}.bias", vae_state[phi_key(vae_config, index) + "bias"].float() * ratio
    last = config.patch_nums[-1]
    resizes = {f"resize.bicubic_{last}_{side}": bicubic_matrix(last, side) for side in config.patch_nums[:-1]}
    # Scale 0 embeds the condition, not f_hat.
    resizes |= {f"resize.area_{side}_{last}": area_matrix(side, last) for side in config.patch_nums[1:-1]}
    for name, resize in resizes.items():
        yield name, resize
        yield f"{name}_t", resize.T.contiguous()
    for key in expected_vae_keys(vae_config):
        if not key.startswith("quantize."):
            is_norm = ".norm" in key
            yield key, vae_state[key].to(torch.float32 if is_norm else dtype)
