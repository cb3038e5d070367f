"""`--target`: what a bundle is built for, and the builders behind it, a line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fastvar_trt.export.build.base import Builder, BuildReport, build_bundle
from fastvar_trt.export.build.cpu import CpuBuilder
from fastvar_trt.export.build.cuda import CudaBuilder
from fastvar_trt.export.build.tensorrt.builder import EnterpriseBuilder, RtxBuilder
from fastvar_trt.export.progress import Progress, no_progress
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.registry import Registry


@dataclasses.dataclass(frozen=True)
class Target:
    """What `--target` can name, and who builds for it."""

    name: str
    builder: type[Builder]


TARGETS: Registry[Target] = Registry()


def register(builder: type[Builder]) -> None:
    """Make a builder's targets known."""
    for name in builder.target_names:
        TARGETS.register(Target(name, builder))


for _builder in (CpuBuilder, CudaBuilder, RtxBuilder, EnterpriseBuilder):
    register(_builder)


def parse_targets(text: str) -> list[Builder]:
    """`cpu,sm86,sm89` -> the builder for the CPU, and one for both compute capabilities.

    Args:
        text: targets, separated by commas.

    Raises:
        ExportError: an unknown target, or targets that cannot be built together.
    """
    names = dict.fromkeys(part.strip().lower() for part in text.split(","))
    by_builder: dict[type[Builder], list[str]] = {}
    for name in names:
        if name not in TARGETS:
            raise ExportError(f"--target: got {name!r}, expected one or more of {'; '.join(_described())}")
        by_builder.setdefault(TARGETS[name].builder, []).append(name)
    return [builder(targets) for builder, targets in by_builder.items()]


def _described() -> list[str]:
    builders = dict.fromkeys(target.builder for target in TARGETS.values())
    return [f"{', '.join(builder.target_names)} ({builder.description})" for builder in builders]


def build_targets(
    bundle: Path, builders: str | Sequence[Builder], progress: Progress = no_progress
) -> list[BuildReport]:
    """Build for all targets.

    Args:
        bundle: its folder.
        builders: as `parse_targets` gives them, or what it takes.
        progress: as for `build_bundle`.
    """
    builders = parse_targets(builders) if isinstance(builders, str) else builders
    return [build_bundle(bundle, builder, progress) for builder in builders]
