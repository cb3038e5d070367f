"""Sizes of an Infinity model and of its VAE, read from their state dicts. No I/O here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from torch import Tensor

from fastvar_trt.export.models.checkpoint import count_indices, tensor_of
from fastvar_trt.export.models.decoder import NORM_GROUPS
from fastvar_trt.runtime.errors import CheckpointError

_KIND = "an Infinity transformer"
_VAE_KIND = "an Infinity VAE"


@dataclasses.dataclass(frozen=True)
class BSQVAEConfig:
    """Infinity's VAE (`flux_vqgan.AutoEncoder`), with its encoder or without."""

    code_bits: int  # d: bits, and channels, of one position of the feature map
    level_channels: tuple[int, ...]  # `base_ch * ch_mult`, finest level first
    num_blocks: int  # residual blocks per decoder level (`num_res_blocks + 1`)
    encoder_channels: tuple[int, ...] = ()  # `base_ch * encoder_ch_mult`, finest level first; () without encoder
    encoder_blocks: int = 0  # residual blocks per encoder level (`num_res_blocks`); 0: the scene model's light one

    @property
    def pixels_per_code(self) -> int:
        """Side of the image patch behind one position: 16, or 8 where tokens are patches of 2x2."""
        return int(2 ** (len(self.level_channels) - 1))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> BSQVAEConfig:
        """Sizes from `infinity_vae_d16.pth` .. `d64`, `d32reg` or `d56_f8_14_patchify`.

        Raises:
            CheckpointError: keys that name no such VAE.
        """
        key = next((k for k in ("decoder.conv_in.conv.weight", "decoder.conv_in.weight") if k in state), None)
        if key is None:
            some = ", ".join(list(state)[:3])
            raise CheckpointError(
                f"not {_VAE_KIND}: key decoder.conv_in.conv.weight is missing (the file has {some}, ...)"
            )
        if any(k.startswith("decoder.mid.attn_1.") for k in state):
            raise CheckpointError(f"not {_VAE_KIND}: it has attention in the decoder, which no official one has")
        levels = []
        for level in range(count_indices(state, r"decoder\.up\.(\d+)\.")):
            stem = f"decoder.up.{level}.block.0.norm2"
            weight = next((state[k] for k in (f"{stem}.norm.weight", f"{stem}.weight") if k in state), None)
            if weight is None:
                raise CheckpointError(f"not {_VAE_KIND}: key {stem}.norm.weight is missing")
            levels.append(_channels(stem, weight))
        if not levels:
            raise CheckpointError(f"not {_VAE_KIND}: key decoder.up.* is missing")
        return cls(
            code_bits=int(tensor_of(state, key, _VAE_KIND, num_axes=4).shape[1]),
            level_channels=tuple(levels),
            num_blocks=count_indices(state, r"decoder\.up\.0\.block\.(\d+)\."),
        )

    def with_encoder(self, state: Mapping[str, Tensor]) -> BSQVAEConfig:
        """The same with the encoder of the state dict.

        Raises:
            CheckpointError: it has none, or one that no official VAE of images has.
        """
        light = [f"encoder.layers.{layer}.weight" for layer in (0, 2)]
        if all(key in state for key in light):
            channels = tuple(int(state[key].shape[0]) for key in light)
            return dataclasses.replace(self, encoder_channels=channels, encoder_blocks=0)
        levels = []
        for level in range(count_indices(state, r"encoder\.down\.(\d+)\.")):
            stem = f"encoder.down.{level}.block.0.conv1"
            weight = next((state[key] for key in (f"{stem}.conv.weight", f"{stem}.weight") if key in state), None)
            if weight is None:
                raise CheckpointError(f"--with-encoder: not {_VAE_KIND}: key {stem}.conv.weight is missing")
            levels.append(_channels(stem, weight))
        if not levels:
            raise CheckpointError("--with-encoder: --vae: the file has no encoder (keys encoder.*)")
        if len(levels) != len(self.level_channels) or any(k.startswith("encoder.mid.attn_1.") for k in state):
            raise CheckpointError("--with-encoder: --vae: its encoder has levels or layers that no official one has")
        num_blocks = count_indices(state, r"encoder\.down\.0\.block\.(\d+)\.")
        return dataclasses.replace(self, encoder_channels=tuple(levels), encoder_blocks=num_blocks)


def _channels(stem: str, weight: Tensor) -> int:
    """What a layer gives, and group normalisation takes."""
    channels = int(weight.shape[0])
    if channels == 0 or (channels % NORM_GROUPS and channels % 24):
        raise CheckpointError(
            f"{stem}: got {channels} channels, expected a multiple of {NORM_GROUPS} or 24, its groups"
        )
    return channels


@dataclasses.dataclass(frozen=True)
class InfinityConfig:
    """An Infinity transformer at one size and aspect ratio."""

    depth: int
    width: int  # C
    num_heads: int  # H
    mlp_width: int
    bits: int  # per token: d, or 4 d where tokens are patches of 2x2 codes
    patchify: bool
    text_width: int  # C_text
    text_length: int  # T, the longest prompt of the bundle
    pool_heads: int  # of the attentive pooling of the text
    pool_head_dim: int
    schedule: tuple[tuple[int, int], ...]  # (height, width) of the token map per scale
    rope_span: tuple[int, int]  # the map whose corners the rotary grid spans
    num_levels: int  # rows of the level embedding
    block_prefixes: tuple[str, ...]  # of the official keys, per layer
    has_cross_gain: bool = False  # `ca_gamma`, a learnt gain on the cross-attention's output
    cfg: float = 4.0  # guidance where a request names none: that of scripts/infer.sh
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.num_heads

    @property
    def code_schedule(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the feature map per scale: twice the token map where tokens are patches."""
        factor = 2 if self.patchify else 1
        return tuple((factor * h, factor * w) for h, w in self.schedule)

    def rope_name(self, scale: int) -> str:
        """The rotary table of a scale: of its map, and of what the grid spans."""
        (height, width), (span_h, span_w) = self.schedule[scale], self.rope_span
        return f"rope.{height}x{width}_of_{span_h}x{span_w}"

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        vae: BSQVAEConfig,
        schedule: tuple[tuple[int, int], ...],
        rope_span: tuple[int, int],
        text_length: int | None = None,
    ) -> InfinityConfig:
        """Sizes from `infinity_2b_reg.pth`, `infinity_8b_weights` or another checkpoint of the same keys.

        Args:
            state: the flat state dict.
            vae: of the VAE that it was trained with.
            schedule: (height, width) per scale.
            rope_span: see the field.
            text_length: longest prompt of the bundle in tokens; default: all that the model was trained with.

        Raises:
            CheckpointError: keys that name no Infinity, or sizes that contradict each other.
        """
        word_embed = tensor_of(state, "word_embed.weight", _KIND, num_axes=2)
        width, bits = (int(size) for size in word_embed.shape)
        if bits not in (vae.code_bits, 4 * vae.code_bits):
            raise CheckpointError(
                f"--vae: the VAE has {vae.code_bits} bits, the transformer {bits} per token, expected {bits} or "
                f"{bits / 4:g}; give the VAE that it was trained with"
            )
        head = tensor_of(state, "head.weight", _KIND, num_axes=2)
        if head.shape[0] != 2 * bits:
            raise CheckpointError(f"head.weight: got {head.shape[0]} outputs, expected two per bit ({2 * bits})")
        prefixes = _block_prefixes(state)
        scale = next((key for key in state if key.endswith(".sa.scale_mul_1H11")), None)
        if scale is None:
            raise CheckpointError(f"not {_KIND}: key {prefixes[0]}sa.scale_mul_1H11 is missing")
        num_heads = state[scale].numel()
        if width % num_heads or (width // num_heads) % 4:
            raise CheckpointError(f"{scale}: got {num_heads} heads, expected a divisor of {width} / 4")
        pool = tensor_of(state, "text_proj_for_sos.ca.mat_q", _KIND, num_axes=3)
        longest, text_width = tensor_of(state, "cfg_uncond", _KIND, num_axes=2).shape
        if text_length is not None and not 1 <= text_length <= longest:
            raise CheckpointError(f"--text-length: got {text_length}, this model takes 1 to {longest}")
        num_levels = tensor_of(state, "lvl_embed.weight", _KIND, num_axes=2).shape[0]
        if len(schedule) > num_levels:
            raise CheckpointError(f"lvl_embed.weight: got {num_levels} scales, the schedule has {len(schedule)}")
        return cls(
            depth=len(prefixes),
            width=width,
            num_heads=num_heads,
            mlp_width=tensor_of(state, f"{prefixes[0]}ffn.fc1.weight", _KIND, num_axes=2).shape[0],
            bits=bits,
            patchify=bits != vae.code_bits,
            text_width=int(text_width),
            text_length=int(text_length or longest),
            pool_heads=int(pool.shape[1]),
            pool_head_dim=int(pool.shape[2]),
            schedule=schedule,
            rope_span=rope_span,
            num_levels=int(num_levels),
            block_prefixes=prefixes,
            has_cross_gain=any(key.endswith(".ca_gamma") for key in state),
        )

    @property
    def attn_scale(self) -> float:
        """Factor on q·k of the self-attention: q and k are L2-normalised, a learnt factor per head replaces it."""
        return 1.0

    @property
    def cross_scale(self) -> float:
        """Factor on q·k of the cross-attention."""
        return 1 / math.sqrt(self.head_dim)


def _block_prefixes(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The key prefix of every layer: `block_chunks.i.module.j.`, or `blocks.i.` where there is one chunk."""
    pattern = re.compile(r"(?:block_chunks\.(\d+)\.module|(blocks))\.(\d+)\.")
    found = {match[0]: (int(match[1] or 0), int(match[3])) for match in map(pattern.match, state) if match}
    prefixes = sorted(found, key=lambda prefix: found[prefix])
    # Chunks number their modules through, or each from 0.
    if not prefixes:
        raise CheckpointError(f"not {_KIND}: keys block_chunks.*.module.* are missing")
    chunks: dict[int, list[int]] = {}
    for prefix in prefixes:
        chunks.setdefault(found[prefix][0], []).append(found[prefix][1])
    running = 0
    for place, (chunk, modules) in enumerate(chunks.items()):
        counted = list(range(len(modules)))
        if chunk != place or modules not in (counted, [running + i for i in counted]):
            raise CheckpointError(f"not {_KIND}: a block before block_chunks.{chunk}.module.{modules[0]} is missing")
        if len(modules) != len(chunks[0]):
            raise CheckpointError(
                f"not {_KIND}: block_chunks.{chunk} has {len(modules)} blocks, expected {len(chunks[0])}"
            )
        running += len(modules)
    return tuple(prefixes)
