"""Official checkpoints: reading them, checking their keys, and turning them into deployment tensors.

Every rename and every precomputation between the official state dict and the tensors of a bundle is here.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvar_trt.export.models.config import VARConfig, VQVAEConfig
from fastvar_trt.export.models.resize import area_matrix, bicubic_matrix
from fastvar_trt.export.models.vqvae import ImageDecoder
from fastvar_trt.runtime.errors import CheckpointError

MAX_Q_SCALE = 100.0  # `max_scale_mul` of VAR's SelfAttention
# Buffers that training leaves in a checkpoint and inference does not read.
_UNUSED_VAR = ("attn_bias_for_masking", "lvl_1L", ".attn.zero_k_bias")
_UNUSED_VAE = ("encoder.", "quant_conv.", "quantize.ema_vocab_hit_SV")
_MAX_NAMED = 100  # keys of a kind in one error
# Where the trainers keep the models in a training checkpoint; VAEs of Infinity are always nested.
_NESTED = {
    "var": ("trainer", "var_wo_ddp"),
    "vae": ("trainer", "vae_local"),
    "infinity": ("trainer", "gpt_fsdp"),
    "infinity_vae": ("vae",),
    "t5": ("state_dict",),
}
_INDEX = "*.safetensors.index.json"


def load_state_dict(path: Path, part: str) -> dict[str, Tensor]:
    """A flat state dict from a `.pth` or `.safetensors` file or shards, memory-mapped: nothing is read until used.

    Args:
        path: the file, or a folder of safetensors shards with their index. Pickles load with `weights_only=True`, so
            they cannot run code.
        part: `var`, `vae`, `infinity`, `infinity_vae` or `t5`, to find the model inside a training checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no state dict.
    """
    if path.is_dir():
        return _load_shards(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path}: holds more than tensors, or is damaged, and is not loaded: {_first_line(error)}"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: not a readable PyTorch file: {_first_line(error)}") from error
    outer, *inner = _NESTED[part]
    if isinstance(state, Mapping) and outer in state and isinstance(state[outer], Mapping):
        state = state[outer]
        for key in inner:
            state = state.get(key)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"checkpoint {path}: got no flat state dict, expected tensors by name (or the official training checkpoint)"
        )
    return dict(state)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: not a readable safetensors file: {error}") from error


def _load_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of safetensors files, by its index where there is one."""
    indices = sorted(folder.glob(_INDEX))
    if len(indices) > 1:
        raise CheckpointError(f"checkpoint {folder}: got {len(indices)} files {_INDEX}, expected one")
    if indices:
        try:
            weight_map = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {indices[0]}: not a readable index of shards: {error}") from error
    else:
        weight_map, files = None, sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"checkpoint {folder}: no safetensors files in it")
    state: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder}: the shard {name} of its index is missing; copy it again")
        state |= _load_safetensors(folder / name)
    missing = [key for key in weight_map or () if key not in state]
    if missing:
        raise CheckpointError(f"checkpoint {folder}: {missing[0]} of its index is in no shard; copy it again")
    return state


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def key_problems(
    state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], unused: Sequence[str]
) -> list[str]:
    """What keeps the state dict from having exactly the expected keys and shapes, `unused` ones aside; keys by name."""
    missing = [key for key in expected if key not in state]
    ignored = {key for key in state if any(u in key if u[0] == "." else key.startswith(u) for u in unused)}
    unexpected = [key for key in state if key not in expected and key not in ignored]
    wrong = [
        f"{key} (got {list(state[key].shape)}, expected {list(shape)})"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    return [
        f"{len(keys)} {what}: {', '.join(keys[:_MAX_NAMED])}{', ...' if len(keys) > _MAX_NAMED else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", wrong))
        if keys
    ]


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
        "--checkpoint": key_problems(state, expected_var_keys(config), _UNUSED_VAR),
        "--vae": key_problems(vae_state, expected_vae_keys(vae_config), _UNUSED_VAE),
    }
    if any(problems.values()):
        raise CheckpointError(
            "the keys are not those of the model; "
            + "; ".join(f"{option}: {'; '.join(found)}" for option, found in problems.items() if found)
        )
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
    dtype: torch.dtype,
    max_top_k: int,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bundle, one at a time, in the names of `export.models.var`.

    `dtype` is that of the large matrices and of the decoder's convolutions. fp32 stay: embeddings and
    positions (added to the residual stream), modulation biases (1 + scale would lose the scale's digits),
    the code book and its convolutions (they accumulate in f_hat), normalisation parameters, and the
    interpolation matrices. `norm.weight` (ones) and `sampling.rank` (0 .. max_top_k - 1) are constants that
    would otherwise be repeated in every graph.
    """
    c = config.width
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
        yield "shared_modulation.weight", state["shared_ada_lin.1.weight"].to(dtype)
        yield "shared_modulation.bias", state["shared_ada_lin.1.bias"].float()
    for i in range(config.depth):
        source, block = f"blocks.{i}.", f"blocks.{i}."
        if config.shared_aln:
            yield block + "modulation.bias", state[source + "ada_gss"].view(6, c).float() + plus_one
        else:
            yield block + "modulation.weight", state[source + "ada_lin.1.weight"].to(dtype)
            yield block + "modulation.bias", state[source + "ada_lin.1.bias"].float() + plus_one.flatten()
        q_bias, v_bias = state[source + "attn.q_bias"], state[source + "attn.v_bias"]
        yield block + "attn.mat_qkv.weight", state[source + "attn.mat_qkv.weight"].to(dtype)
        yield block + "attn.mat_qkv.bias", torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]).to(dtype)
        if config.attn_l2_norm:
            scale = state[source + "attn.scale_mul_1H11"].float().exp().clamp_max(MAX_Q_SCALE)
            yield block + "attn.q_scale", scale.view(config.num_heads, 1)
        for linear in ("attn.proj", "ffn.fc1", "ffn.fc2"):
            yield f"{block}{linear}.weight", state[f"{source}{linear}.weight"].to(dtype)
            yield f"{block}{linear}.bias", state[f"{source}{linear}.bias"].to(dtype)
    head_plus_one = torch.cat([torch.ones(c), torch.zeros(c)])  # scale, shift
    yield "head_modulation.weight", state["head_nm.ada_lin.1.weight"].to(dtype)
    yield "head_modulation.bias", state["head_nm.ada_lin.1.bias"].float() + head_plus_one
    yield "head.weight", state["head.weight"].to(dtype)
    yield "head.bias", state["head.bias"].to(dtype)

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
    for name, matrix in resizes.items():
        yield name, matrix
        yield f"{name}_t", matrix.T.contiguous()
    for key in expected_vae_keys(vae_config):
        if not key.startswith("quantize."):
            is_norm = ".norm" in key
            yield key, vae_state[key].to(torch.float32 if is_norm else dtype)
