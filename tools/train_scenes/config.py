"""What the training depends on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from fastvar_trt.export.models.infinity.config import BSQVAEConfig, InfinityConfig
from fastvar_trt.export.models.infinity.schedules import schedule
from fastvar_trt.export.models.t5 import T5Config

SCHEDULE, ROPE_SPAN = schedule("1M", 1.0)
PATCH = 16  # pixels of a token's side
SIDE = PATCH * SCHEDULE[-1][0]  # pixels


Part = TypeVar("Part", bound=tuple[Any, ...])


def part_at(step: int, parts: Sequence[Part]) -> Part:
    """The part of a training that a step is in; each begins with how many steps it has."""
    ends = np.cumsum([part[0] for part in parts])
    return parts[int(np.searchsorted(ends, step, side="right"))]


@dataclasses.dataclass(frozen=True)
class BitsConfig:
    """The encoder's, and what its bits are: a state of another configuration is not resumed."""

    seed: int = 0
    code_bits: int = 16
    channels: tuple[int, int] = (64, 128)
    num_pictures: int = 4000
    lr: float = 2e-3
    steps: int = 1000
    batch: int = 2
    truncate: float = 0.3  # share of the steps that decode without the last one or two scales, which plans skip


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The decoder's."""

    bits: BitsConfig
    seed: int = 0
    # At least two channels for each of the 24 or 32 groups that are normalised: with one, mean colours are lost.
    level_channels: tuple[int, ...] = (48, 48, 48, 96, 128)
    num_blocks: int = 1
    num_pictures: int = 240
    lr: float = 2e-3
    # Steps, pictures, the finest level that draws, and the side of the pictures in pixels. All levels at full size cost
    # five times as much as at half the side, where there are edges, too. Pictures are whole, because normalisation is
    # over whole pictures.
    phases: tuple[tuple[int, int, int, int], ...] = (
        (320, 1, 2, SIDE),
        (30, 1, 1, SIDE),
        (50, 1, 0, SIDE),
        (400, 1, 0, SIDE // 4),
        (420, 1, 0, SIDE // 2),
        (30, 1, 0, SIDE),
    )

    @property
    def sizes(self) -> BSQVAEConfig:
        """Sizes of the decoder."""
        return BSQVAEConfig(self.bits.code_bits, self.level_channels, self.num_blocks)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text encoder's."""

    seed: int = 0
    width: int = 192
    depth: int = 3
    num_heads: int = 4
    mlp_width: int = 384
    text_length: int = 40
    lr: float = 1.5e-3
    steps: int = 2400
    batch: int = 32

    def sizes(self, vocab_size: int) -> T5Config:
        """Sizes of the encoder."""
        return T5Config(
            width=self.width,
            head_dim=self.width // self.num_heads,
            num_heads=self.num_heads,
            mlp_width=self.mlp_width,
            depth=self.depth,
            vocab_size=vocab_size,
            num_buckets=32,
            max_distance=128,
            norm_eps=1e-6,
            text_length=self.text_length,
        )


@dataclasses.dataclass(frozen=True)
class View:
    """What one step of the transformer's training looks at.

    Attributes:
        num_scales: the first so many.
        batch: pictures.
        num_whole: scales that are whole. The largest cost four fifths of a whole pyramid, and nothing new is in most
            of it.
        share: of the side of the part that is seen of the other scales.
    """

    num_scales: int
    batch: int
    num_whole: int = len(SCHEDULE)
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The transformer's."""

    bits: BitsConfig
    text: TextConfig
    seed: int = 0
    depth: int = 8
    width: int = 192
    num_heads: int = 3
    lr: float = 1.5e-3
    drop_text: float = 0.1
    flips: float = 0.2  # share of wrong bits in the inputs, at most
    ema: float = 0.998
    solids: float = 4.0  # weight of the tokens that show them, besides the 1 of all
    scale_weight: float = 1.0  # power of a scale's side in its weight
    in_front: float = 4.0  # weight of pictures where one solid stands in front of another, which are few and hardest
    views: tuple[View, ...] = (View(5, 32), View(7, 8), View(9, 3), View(13, 2, 9, 0.375))
    # Per part of the training: steps, and the share of every view.
    parts: tuple[tuple[int, tuple[float, ...]], ...] = (
        (700, (0.75, 0.25, 0.0, 0.0)),
        (350, (0.25, 0.45, 0.3, 0.0)),
        (250, (0.1, 0.25, 0.25, 0.4)),
        (1400, (0.55, 0.3, 0.15, 0.0)),
        (350, (0.3, 0.35, 0.3, 0.05)),
        (150, (0.05, 0.2, 0.35, 0.4)),
        (1150, (0.4, 0.35, 0.25, 0.0)),
        (250, (0.05, 0.2, 0.35, 0.4)),
        (480, (0.4, 0.32, 0.2, 0.08)),
        (120, (0.1, 0.3, 0.4, 0.2)),
        (520, (0.45, 0.33, 0.17, 0.05)),
        (450, (0.5, 0.32, 0.15, 0.03)),
        (150, (0.3, 0.35, 0.25, 0.1)),
        (100, (0.1, 0.3, 0.4, 0.2)),
    )

    @property
    def num_steps(self) -> int:
        """Of all parts."""
        return sum(steps for steps, _ in self.parts)

    def view(self, step: int, rng: np.random.Generator) -> View:
        """A view for a step."""
        _, shares = part_at(step, self.parts)
        return self.views[int(rng.choice(len(self.views), p=shares))]

    @property
    def sizes(self) -> InfinityConfig:
        """Sizes of the transformer."""
        return InfinityConfig(
            depth=self.depth,
            width=self.width,
            num_heads=self.num_heads,
            mlp_width=4 * self.width,
            bits=self.bits.code_bits,
            patchify=False,
            text_width=self.text.width,
            text_length=self.text.text_length,
            pool_heads=4,
            pool_head_dim=self.width // 4,
            schedule=SCHEDULE,
            rope_span=ROPE_SPAN,
            num_levels=15,
            block_prefixes=tuple(f"blocks.{i}." for i in range(self.depth)),
        )


@dataclasses.dataclass(frozen=True)
class SceneTraining:
    """All stages."""

    decoder: DecoderConfig
    transformer: TransformerConfig

    @classmethod
    def of(cls, bits: BitsConfig, **transformer: Any) -> SceneTraining:
        """Around one kind of bits."""
        return cls(DecoderConfig(bits), TransformerConfig(bits, TextConfig(), **transformer))


# `small` is what is shipped: hours on two cores. `large` is for a GPU.
SIZES = {
    "small": SceneTraining.of(BitsConfig()),
    "large": SceneTraining.of(
        BitsConfig(num_pictures=20000, steps=8000, batch=8),
        depth=12,
        width=512,
        num_heads=8,
        lr=6e-4,
        views=(View(7, 64), View(13, 8)),
        parts=((6000, (0.8, 0.2)), (6000, (0.2, 0.8))),
    ),
}


def fingerprint(config: Any, *learnt: nn.Module | Tensor) -> dict[str, Any]:
    """What a stage depends on: its configuration, and what others have learnt."""
    found = hashlib.sha256()
    for part in learnt:
        for tensor in part.state_dict().values() if isinstance(part, nn.Module) else [part]:
            found.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return {**dataclasses.asdict(config), "learnt_sha256": found.hexdigest()}
