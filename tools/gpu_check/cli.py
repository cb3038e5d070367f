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

from fastvar_trt.runtime.errors import BackendError, UnavailableError
from fastvar_trt.tools.cli.command import ErrorCommand, examples
from fastvar_trt.tools.files import check_writable
from fastvar_trt.tools.gpu_check.checks import (
    BACKENDS,
    check_backend,
    check_gpu,
    check_kernels,
    check_logits,
    draw_known_answers,
)
from fastvar_trt.tools.gpu_check.models import MODELS
from fastvar_trt.tools.gpu_check.report import FILES, plot, write_report
from fastvar_trt.tools.gpu_check.sections import Results, Section, run_section
from fastvar_trt.tools.gpu_check.speed import summary, time_variant, variants_of

_DEMO = next(iter(MODELS))
# Seconds after which a section is ended, where more time is left: for a model, all of its rounds.
_SHORT_S, _LONG_S = 120.0, 900.0
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
    "--model", "names", default=_DEMO, show_default=True, help=f"Models, separated by commas: {', '.join(MODELS)}."
)
@click.option("--size", "sizes", help="Of their pictures, separated by commas; default: each model's first.")
@click.option("--minutes", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Time for all sections.")
@click.option("--runs", type=click.IntRange(1), default=10, show_default=True, help="Images per variant and round.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/gpu_check"), show_default=True)
@click.option("--isolate/--no-isolate", default=True, hidden=True)  # for a debugger
def main(names: str, sizes: str | None, minutes: float, runs: int, out: Path, isolate: bool) -> None:
    """Check kernels and backends on this machine's GPU, and time models of true sizes beside PyTorch.

    The demo model is always checked, with its trained weights; the others have random ones.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if name not in MODELS:
            raise click.UsageError(f"--model: got {name!r}, expected one or more of {', '.join(MODELS)}")
    for name in FILES:
        check_writable(out / name)
    check = _Check(out, minutes, isolate=isolate)
    gpu = check.section("GPU", check_gpu, _SHORT_S)
    check.section("CUDA kernels against the oracle", check_kernels, _SHORT_S)
    if gpu.skipped or gpu.failed:
        check.add(Section("Models", skipped=gpu.skipped or "no GPU that works"))
    else:
        _check_models(check, wanted, sizes, runs)
    click.echo(write_report(check.sections, out))
    failed = [section.name for section in check.sections if section.failed]
    if failed:
        raise BackendError(f"failed: {', '.join(failed)}; see {out / FILES[1]}")


def _check_models(check: _Check, wanted: list[str], sizes: str | None, runs: int) -> None:
    folder = check.out / "bundles"  # kept, for another look; each is replaced by the next check
    demo = MODELS[_DEMO]
    exported = check.section("Export of the demo", functools.partial(export, demo.name, demo.sizes[0], folder), _LONG_S)
    bundles = [Path(row["bundle"]) for row in exported.results]
    for backend, targets in BACKENDS.items():
        for target in targets:
            for bundle in bundles:
                name = (
                    f"{backend}{f', built for {target}' if target else ''}, {bundle.name}, against PyTorch and the CPU"
                )
                check.section(name, functools.partial(check_backend, bundle, backend, target), _LONG_S)
    for name in [name for name in MODELS if name in wanted]:
        model = MODELS[name]
        for size in model.sizes[:1] if sizes is None else sizes.split(","):
            if name == _DEMO:
                found = exported
            else:
                found = check.section(
                    f"Export of {name} {size}", functools.partial(export, name, size, folder), _LONG_S
                )
            bundles = [Path(row["bundle"]) for row in found.results]
            if name != _DEMO:
                _compare_model(check, bundles)
            if bundles:
                _time_model(check, f"{name} {size}", bundles, runs)


def _compare_model(check: _Check, bundles: list[Path]) -> None:
    """Every backend against PyTorch on this GPU."""
    for bundle in bundles:
        drawn = check.section(
            f"PyTorch's pictures, {bundle.name}", functools.partial(draw_known_answers, bundle), _LONG_S
        )
        for backend in BACKENDS if drawn.results else ():
            name = f"{backend}, {bundle.name}, against PyTorch"
            check.section(name, functools.partial(check_logits, bundle, backend), _LONG_S)


def export(name: str, size: str, folder: Path) -> Results:
    """The bundles of a model, built for what this machine has."""
    from fastvar_trt.export.build.registry import build_targets
    from fastvar_trt.export.build.tensorrt.flavour import RTX_TARGETS
    from fastvar_trt.runtime.backends.cuda import CudaDevice

    folder.mkdir(parents=True, exist_ok=True)
    device = CudaDevice()
    gpu = device.target
    device.close()
    results = []
    for label, bundle in MODELS[name].export(size, folder).items():
        built = []
        for target in ("cuda", *([gpu] if gpu in RTX_TARGETS else []), "current"):
            begin = time.perf_counter()
            try:
                build_targets(bundle, target)
            except UnavailableError:
                continue  # not on this machine: the sections of its backend say why
            built.append(f"{target} {time.perf_counter() - begin:.0f} s")
        results.append({"plan": label, "bundle": str(bundle), "built for": ", ".join(built)})
    return results


def _time_model(check: _Check, title: str, bundles: list[Path], runs: int) -> None:
    """Rounds in which every variant takes its turn, until there are enough or the time is over."""
    kernels = check.out / "kernels" / f"{time.time():.0f}"  # a fresh folder: the first load compiles
    variants = [v for bundle in bundles for v in variants_of(bundle.name.rpartition("_")[2], bundle, kernels)]
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    begin = time.perf_counter()
    limit_s = min(_LONG_S, check.left_s)
    for _ in range(_ROUNDS):
        for variant in variants:
            if variant.name in skipped or variant.name in failed:
                continue
            left_s = limit_s - (time.perf_counter() - begin)
            timed = run_section(
                variant.name, functools.partial(time_variant, variant, runs), left_s, isolate=check.isolate
            )
            if timed.failed:
                failed[variant.name] = timed.failed
            elif timed.skipped and variant.name not in rounds:
                skipped[variant.name] = timed.skipped
            rounds[variant.name] += timed.results
    rounds = {name: rows for name, rows in rounds.items() if rows}
    section = Section(f"Speed of {title}", summary(rounds, skipped), seconds=round(time.perf_counter() - begin, 1))
    section.failed = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    if rounds:
        check.speeds[title] = [row for row in section.results if not row["skipped"]]
        if importlib.util.find_spec("matplotlib") is not None:
            plot(check.speeds, check.out / FILES[2])
    check.add(section)
