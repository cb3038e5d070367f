"""Checkpoints in the official format with random weights, of any size, for tests, benchmarks and checks of GPUs.

The official initialisation is not used: it makes every block nearly the identity (gamma 1e-5, head x 0.02),
so that an error inside a block would not show in the output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastvar_trt.export.models.hart.checkpoint import expected_keys as expected_hart_keys
from fastvar_trt.export.models.hart.config import HARTConfig
from fastvar_trt.export.models.infinity.checkpoint import expected_keys as expected_infinity_keys
from fastvar_trt.export.models.infinity.config import BSQVAEConfig, InfinityConfig
from fastvar_trt.export.models.infinity.vae import official_keys
from fastvar_trt.export.models.var.checkpoint import expected_var_keys
from fastvar_trt.export.models.var.config import VARConfig
from fastvar_trt.export.models.vqvae import VQVAEConfig, expected_vae_keys

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def random_checkpoint(
    *,
    depth: int,
    width: int,
    num_heads: int | None = None,
    patch_nums: Iterable[int] = PATCH_NUMS_256,
    num_classes: int = 10,
    vocab_size: int = 512,
    code_channels: int = 32,
    vae_channels: int = 32,
    shared_aln: bool = False,
    attn_l2_norm: bool = True,
    with_encoder: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of a VAR and of its VQVAE, fp32, in the official keys.

    Sizes default to those of the tests; official models have width = 64 * depth, 1000 classes, a vocabulary of
    4096 and a VQVAE with 160 channels.
    """
    patch_nums = tuple(patch_nums)
    config = VARConfig(
        depth=depth,
        width=width,
        num_heads=num_heads or width // 64,
        mlp_width=4 * width,
        num_classes=num_classes,
        vocab_size=vocab_size,
        code_channels=code_channels,
        patch_nums=patch_nums,
        shared_aln=shared_aln,
        attn_l2_norm=attn_l2_norm,
    )
    vae_config = _vqvae(vocab_size, code_channels, vae_channels, with_encoder)
    generator = torch.Generator().manual_seed(0)
    state = {key: _tensor(key, shape, generator) for key, shape in expected_var_keys(config).items()}
    levels = [torch.full((side * side,), k) for k, side in enumerate(patch_nums)]
    state["lvl_1L"] = torch.cat(levels).unsqueeze(0)
    vae_state = {key: _tensor(key, shape, generator) for key, shape in expected_vae_keys(vae_config).items()}
    return state, vae_state


def _vqvae(vocab_size: int, code_channels: int, channels: int, with_encoder: bool) -> VQVAEConfig:
    return VQVAEConfig(
        vocab_size=vocab_size,
        code_channels=code_channels,
        level_channels=tuple(channels * m for m in (1, 1, 2, 2, 4)),  # `ch_mult` of the official one
        num_blocks=3,
        phi="partially_shared",
        num_phi=4,
        has_encoder=with_encoder,
    )


def _tensor(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    if "norm" in key and key.endswith("weight"):
        return 1.0 + 0.1 * normal
    if "scale_mul" in key:
        # Rotary positions are all that tells Infinity's tokens of one scale apart: they must weigh.
        return math.log(40.0 if ".sa." in key else 4.0) + 0.2 * normal
    if key.endswith("bias"):
        return 0.1 * normal
    if "embed" in key or "class_emb" in key or key.startswith(("pos_", "cfg_uncond")) or "ada_gss" in key:
        return 0.5 * normal
    if key == "head.weight":
        return 4.0 / math.sqrt(shape[1]) * normal  # logits far enough apart for a stable greedy choice
    fan_in = math.prod(shape[1:])
    if "final_layer.linear" in key:  # a diffusion's predicted variance, of which exp() is taken
        return 0.1 / math.sqrt(fan_in) * normal
    return normal / math.sqrt(fan_in)


def random_infinity_checkpoint(
    *,
    depth: int,
    width: int,
    num_heads: int,
    bits: int = 8,
    patchify: bool = False,
    text_width: int = 256,
    text_length: int = 64,
    block_chunks: int = 2,
    vae_channels: int = 32,
    with_encoder: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of an Infinity and of its VAE, in the official keys.

    Infinity-2B has 32 layers x 2048, 16 heads, 32 bits, text 2048 wide and 512 long, 8 chunks, a VAE of 128 channels.
    """
    multipliers = (1, 2, 4, 4) if patchify else (1, 2, 4, 4, 4)  # `decoder_ch_mult`
    channels = tuple(vae_channels * m for m in multipliers)
    encoder = (channels, 2) if with_encoder else ((), 0)  # `encoder_ch_mult`, `num_res_blocks`
    vae_config = BSQVAEConfig(bits, channels, 3, *encoder)
    per_chunk = depth // block_chunks
    prefixes = tuple(f"block_chunks.{i // per_chunk}.module.{i % per_chunk}." for i in range(depth))
    tokens_bits = 4 * bits if patchify else bits
    pool_heads = max(text_width // 128, 1)  # `TextAttentivePool`
    config = InfinityConfig(
        depth=depth,
        width=width,
        num_heads=num_heads,
        mlp_width=4 * width,
        bits=tokens_bits,
        patchify=patchify,
        text_width=text_width,
        text_length=text_length,
        pool_heads=pool_heads,
        pool_head_dim=width // pool_heads,
        schedule=((1, 1),),
        rope_span=(1, 1),
        num_levels=15,
        block_prefixes=prefixes,
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_infinity_keys(config) | {"cfg_uncond": (text_length, text_width)}
    shapes |= {f"{prefix}sa.scale_mul_1H11": (1, num_heads, 1, 1) for prefix in prefixes}
    state = {key: _tensor(key, shape, generator).to(dtype) for key, shape in shapes.items()}
    vae_state = {
        official: _tensor(official, shape, generator).to(dtype)
        for (official, _), shape in official_keys(vae_config).values()
    }
    return state, vae_state


def random_hart_folders(
    folder: Path,
    *,
    depth: int,
    width: int,
    num_heads: int,
    patch_nums: Iterable[int],
    context_tokens: int,
    text_width: int,
    vocab_size: int = 512,
    attn_l2_norm: bool = False,
    with_encoder: bool = False,
) -> Path:
    """The folders `llm` and `tokenizer` of a HART, as published, in `folder`.

    HART-0.7B at 1024 pixels has 24 layers x 1536, 24 heads, 300 tokens of text 1536 wide, a vocabulary of 4096, a VQVAE
    of 160 channels, and 6 layers x 1024 in its diffusion.

    Returns:
        the folder `llm`.
    """
    patch_nums = tuple(patch_nums)
    config = HARTConfig(
        depth=depth,
        width=width,
        num_heads=num_heads,
        mlp_width=(8 * width // 3 + 255) // 256 * 256,
        vocab_size=vocab_size,
        code_channels=32,
        patch_nums=patch_nums,
        context_tokens=context_tokens,
        text_width=text_width,
        has_context_norm=True,
        has_timestep_embed=True,
        attn_l2_norm=attn_l2_norm,
        diffusion_width=64,
        diffusion_depth=2,
        diffusion_steps=8,
    )
    vae_config = _vqvae(vocab_size, config.code_channels, 32, with_encoder)
    generator = torch.Generator().manual_seed(0)
    state = {key: _tensor(key, shape, generator) for key, shape in expected_hart_keys(config).items()}
    vae_state = {f"vae.{key}": _tensor(key, shape, generator) for key, shape in expected_vae_keys(vae_config).items()}
    data = {
        "model_type": "hart_transformer_t2i",
        "attn_type": "llama",
        "mlp_type": "llama",
        "disable_aln": True,
        "use_cross_attn": False,
        "sampler": "iddpm",
        "num_heads": num_heads,
        "num_sampling_steps": "8",
        "patch_nums": list(patch_nums),
        "context_token": context_tokens,
    }
    for name, content in (
        ("llm", data),
        ("tokenizer", {"model_type": "hart_autoencoder_with_disc", "quant_resi": 0.5}),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(content), encoding="utf-8")
    torch.save(state, folder / "llm" / "ema_model.bin")
    save_file(vae_state, folder / "tokenizer" / "model.safetensors")
    return folder / "llm"
