"""What a GPU is checked with: the scene model as it is, the others in their true sizes with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from fastvar_trt.export.exporter import ExportOptions, export_again, export_model
from fastvar_trt.export.models.infinity.family import PLAN_OF_SIZE, load_scenes
from fastvar_trt.export.models.infinity.schedules import SIZES, schedule
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.models.registry import load_plan
from fastvar_trt.export.models.source import Source
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime.plan import DENSE, PruningPlan
from fastvar_trt.runtime.registry import Registry
from fastvar_trt.tools.random_checkpoints import (
    PATCH_NUMS_256,
    PATCH_NUMS_512,
    random_checkpoint,
    random_infinity_checkpoint,
)

PRUNED, DENSE_LABEL = "pruned", "dense"
_SIZES = ("1M", *(size for size in SIZES if size != "1M"))  # of Infinity's pictures, the default first


@dataclasses.dataclass(frozen=True)
class CheckedModel:
    """A model that can be checked.

    Attributes:
        name: on the command line.
        sizes: of its pictures, as `--size` names them; the first is the default.
        source: of a size.
        plan: the preset of a size.
        precision: that bundles are exported in.
        compares: whether PyTorch on the CPU is run beside every graph at export, which big models have no time for.
    """

    name: str
    sizes: tuple[str, ...]
    source: Callable[[str], Source]
    plan: Callable[[str], PruningPlan]
    precision: str = "fp16"
    compares: bool = False

    def bundles(self, size: str, folder: Path) -> dict[str, Path]:
        """Where `export` writes: by plan."""
        return {label: folder / f"{self.name}_{size}_{label}" for label in (DENSE_LABEL, PRUNED)}

    def export(self, size: str, folder: Path) -> None:
        """Write its bundles, one per plan."""
        folder.mkdir(parents=True, exist_ok=True)
        bundles = self.bundles(size, folder)
        options = ExportOptions(self.plan(size), self.precision, compare=self.compares)
        export_model(self.source(size), bundles[PRUNED], options, force=True)
        export_again(bundles[PRUNED], bundles[DENSE_LABEL], DENSE, force=True)


def _var(name: str, depth: int, size: str = "256") -> CheckedModel:
    def source(size: str) -> VARSource:
        large = size == "512"
        states = random_checkpoint(
            depth=depth,
            width=64 * depth,
            patch_nums=PATCH_NUMS_512 if large else PATCH_NUMS_256,
            num_classes=1000,
            vocab_size=4096,
            vae_channels=160,
            shared_aln=large,
        )
        return VARSource.from_state(*states)

    return CheckedModel(name, (size,), source, lambda _: load_plan("fastvar-var"))


def _infinity(
    name: str, depth: int, width: int, num_heads: int, *, bits: int = 32, patchify: bool = False
) -> CheckedModel:
    def source(size: str) -> InfinitySource:
        states = random_infinity_checkpoint(
            depth=depth,
            width=width,
            num_heads=num_heads,
            bits=bits,
            patchify=patchify,
            text_width=2048,
            text_length=512,
            block_chunks=4,
            vae_channels=128,
            dtype=torch.bfloat16,
        )
        return InfinitySource.from_state(*states, *schedule(size, 1.0))

    return CheckedModel(name, _SIZES, source, lambda size: PLAN_OF_SIZE[size], "bf16")


# Sizes are those of the published checkpoints. Small ones first: so are they checked.
MODELS: Registry[CheckedModel] = Registry(
    CheckedModel("scenes", _SIZES, load_scenes, lambda size: PLAN_OF_SIZE[size], compares=True),
    *(_var(f"var-d{depth}", depth) for depth in (16, 20, 24, 30)),
    _var("var-d36", 36, "512"),
    _infinity("infinity-125m", 12, 768, 8),
    _infinity("infinity-2b", 32, 2048, 16),
    _infinity("infinity-8b", 40, 3584, 28, bits=14, patchify=True),
)
