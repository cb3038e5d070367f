"""The command: sections in order, small ones first, each written as soon as it has ended."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastvar_trt.runtime.errors import BackendError
from fastvar_trt.tools.cli.command import ErrorCommand, examples
from fastvar_trt.tools.files import check_writable
from fastvar_trt.tools.gpu_check.checks import (
    BACKENDS,
    build,
    check_backend,
    check_gpu,
    check_kernels,
    check_logits,
    draw_known_answers,
)
from fastvar_trt.tools.gpu_check.models import MODELS
from fastvar_trt.tools.gpu_check.outputs import check_outputs
from fastvar_trt.tools.gpu_check.report import FILES, plot, write_report
from fastvar_trt.tools.gpu_check.sections import Results, Section, run_section
from fastvar_trt.tools.gpu_check.speed import summary, time_variant, variants_of

_TRAINED = next(iter(MODELS))
# Seconds after which a section, or a variant's turn, is ended where more time is left.
_SHORT_S, _LONG_S, _VARIANT_S = 120.0, 900.0, 180.0
_ROUNDS = 3


class _Check:
    """The sections so far, and the time that is left."""

    def __init__(self, out: Path, minutes: float, *, isolate: bool) -> None:
        self.out, self.isolate = out, isolate
        self.sections: list[Section] = []
        self.speeds: dict[str, Results] = {}
        self._end = time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def section(self, name: str, check: Callable[[], Results], limit_s: float) -> Section:
        """Run one, and write what there is."""
        section = run_section(name, check, min(limit_s, self.left_s), isolate=self.isolate)
        self.add(section)
        return section

    def add(self, section: Section) -> None:
        """Keep one that has been run, and write what there is."""
        state = "skipped" if section.skipped else "FAILED" if section.failed else "done"
        click.echo(f"{section.name}: {state}, {section.seconds:.0f} s {section.skipped}{section.failed}", err=True)
        self.sections.append(section)
        write_report(self.sections, self.out)


@click.command(
    cls=ErrorCommand,
    epilog=examples(
        "python -m fastvar_trt.tools.gpu_check --minutes 10",
        "python -m fastvar_trt.tools.gpu_check --model infinity-2b --size 1M,2K --minutes 28",
    ),
)
@click.option(
    "--model", "names", default=_TRAINED, show_default=True, help=f"Models, separated by commas: {', '.join(MODELS)}."
)
@click.option(
    "--size",
    "sizes",
    help="Of their pictures, separated by commas, for the models that have them; default: each model's first.",
)
@click.option("--minutes", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Time for all sections.")
@click.option("--runs", type=click.IntRange(1), default=10, show_default=True, help="Images per variant and round.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/gpu_check"), show_default=True)
@click.option("--isolate/--no-isolate", default=True, hidden=True)  # for a debugger
def main(names: str, sizes: str | None, minutes: float, runs: int, out: Path, isolate: bool) -> None:
    """Check kernels and backends on this machine's GPU, and time models of true sizes beside PyTorch.

    The scene model is always checked, with its trained weights; the others have random ones.
    """
    wanted = _models(names, sizes)
    for name in FILES:
        check_writable(out / name)
    check = _Check(out, minutes, isolate=isolate)
    gpu = check.section("GPU", check_gpu, _SHORT_S)
    check.section("CUDA kernels against the oracle", check_kernels, _SHORT_S)
    if gpu.skipped or gpu.failed:
        check.add(Section("Models", skipped=gpu.skipped or "no GPU that works"))
    else:
        _check_models(check, wanted, runs)
    click.echo(write_report(check.sections, out))
    failed = [section.name for section in check.sections if section.failed]
    if failed:
        raise BackendError(f"failed: {', '.join(failed)}; see {out / FILES[1]}")


def _models(names: str, sizes: str | None) -> dict[str, list[str]]:
    """Model -> sizes of its pictures, small models first; the sizes that are asked for, of those that it has."""
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in MODELS:
            raise click.UsageError(f"--model: got {name!r}, expected one or more of {', '.join(MODELS)}")
    asked = [] if sizes is None else [size.strip() for size in sizes.split(",")]
    known = {size for name in wanted for size in MODELS[name].sizes}
    for size in asked:
        if size not in known:
            raise click.UsageError(f"--size: got {size!r}, {', '.join(wanted)} have {', '.join(sorted(known))}")
    models = {name: MODELS[name].sizes for name in MODELS if name in wanted}
    return {name: [size for size in asked if size in own] or [own[0]] for name, own in models.items()}


def _check_models(check: _Check, wanted: dict[str, list[str]], runs: int) -> None:
    folder = check.out / "bundles"  # kept, for another look; each is replaced by the next check
    trained = MODELS[_TRAINED]
    first = _export(check, trained.name, trained.sizes[0], folder)
    for backend, targets in BACKENDS.items():
        for target in targets:
            for bundle in first.values():
                if _build(check, bundle, backend, target):
                    name = f"{_named(backend, target)}, {bundle.name}, against PyTorch and the CPU"
                    check.section(name, functools.partial(check_backend, bundle, backend), _LONG_S)
                    name = f"{_named(backend, target)}, {bundle.name}, outputs of single graphs, by Polygraphy"
                    check.section(name, functools.partial(check_outputs, bundle, backend), _LONG_S)
    for name, sizes in wanted.items():
        for size in sizes:
            bundles = first
            if (name, size) != (trained.name, trained.sizes[0]):
                bundles = _export(check, name, size, folder)
                _compare(check, bundles)
            if bundles:
                _time(check, f"{name} {size}", bundles, runs)


def _export(check: _Check, name: str, size: str, folder: Path) -> dict[str, Path]:
    """The bundles of a model, by their plans; none where that failed."""
    section = check.section(f"Export of {name} {size}", functools.partial(export, name, size, folder), _LONG_S)
    return MODELS[name].bundles(size, folder) if section.results else {}


def export(name: str, size: str, folder: Path) -> Results:
    """Write the bundles of a model."""
    MODELS[name].export(size, folder)
    return [{"plan": label, "bundle": str(path)} for label, path in MODELS[name].bundles(size, folder).items()]


def _build(check: _Check, bundle: Path, backend: str, target: str) -> bool:
    """Whether there is now something for a backend to load."""
    name = f"{_named(backend, target)}, {bundle.name}, built"
    return bool(check.section(name, functools.partial(build, bundle, backend, target), _LONG_S).results)


def _named(backend: str, target: str) -> str:
    return f"{backend}, {target}" if target else backend


def _compare(check: _Check, bundles: dict[str, Path]) -> None:
    """Every backend against PyTorch on this GPU."""
    for bundle in bundles.values():
        built = [backend for backend, targets in BACKENDS.items() if _build(check, bundle, backend, targets[-1])]
        drawn = check.section(
            f"PyTorch's pictures, {bundle.name}", functools.partial(draw_known_answers, bundle), _LONG_S
        )
        for backend in built if drawn.results else ():
            name = f"{backend}, {bundle.name}, against PyTorch"
            check.section(name, functools.partial(check_logits, bundle, backend), _LONG_S)


def _time(check: _Check, title: str, bundles: dict[str, Path], runs: int) -> None:
    """Rounds in which every variant takes its turn, until there are enough or the time is over."""
    kernels = check.out / "kernels" / f"{time.time():.0f}"  # a fresh folder: the first load compiles
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    begin = time.perf_counter()
    for _ in range(_ROUNDS):
        for variant in variants_of(bundles, kernels):
            if variant.name in skipped or variant.name in failed:
                continue
            limit_s = min(_VARIANT_S, check.left_s)
            if limit_s <= 0:
                if variant.name not in rounds:
                    skipped[variant.name] = "no time was left"
                continue
            measured = functools.partial(time_variant, variant, runs)
            timed = run_section(variant.name, measured, limit_s, isolate=check.isolate)
            if timed.failed:
                failed[variant.name] = timed.failed
            elif timed.skipped:
                skipped[variant.name] = timed.skipped
            else:
                rounds[variant.name] += timed.results
    section = Section(f"Speed of {title}", summary(rounds, skipped), seconds=round(time.perf_counter() - begin, 1))
    section.failed = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    check.add(section)
    if rounds:
        check.speeds[title] = [row for row in section.results if not row["skipped"]]
        if importlib.util.find_spec("matplotlib") is not None:
            plot(check.speeds, check.out / FILES[2])
