"""`fastvar profile`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fastvar_trt.runtime.backends import Backend
from fastvar_trt.runtime.backends.tensorrt import TENSORRT_FLAVOURS
from fastvar_trt.runtime.engines import read_engines
from fastvar_trt.runtime.errors import BackendError, BundleError, RequestError
from fastvar_trt.runtime.manifest import Manifest, read_manifest
from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.runtime.request import example_requests
from fastvar_trt.tools.cli.command import ErrorCommand, RuntimeOptions, counting_bar, examples, runtime_options
from fastvar_trt.tools.files import check_writable, write_text
from fastvar_trt.tools.measure import profiling
from fastvar_trt.tools.measure.estimate import GPUS, Gpu, estimate, to_table

_OPERATOR_RUNS = 3
_TEXT_TOKENS = 32  # of the random features that text bundles are profiled with
_FILES = ("profile.json", "profile.md", "trace.json", "profile.png")
_BESIDE = "beside.json"
_ESTIMATE_FILES = ("estimate.json", "estimate.md")


@click.command(
    cls=ErrorCommand,
    short_help="Time every graph of a bundle.",
    epilog=examples(
        "fastvar profile out/demo_pruned --operators --out out/profile",
        "fastvar profile out/demo_pruned --beside out/demo_dense --runs 50 --out out/profile",
        "fastvar profile --compare last_week/profile.json out/profile/profile.json",
        "fastvar profile out/infinity_1m --estimate rtx3090",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True, help="Calls that count.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Calls before them.")
@click.option("--batch", type=click.IntRange(1), help="Images per call; default: the bundle's smallest batch size.")
@click.option("--operators", is_flag=True, help="Also time operators or TensorRT's layers, in calls of their own.")
@click.option(
    "--beside", type=click.Path(path_type=Path), help="Another bundle: run in turns with this one, and compared."
)
@click.option("--compare", type=click.Path(path_type=Path), nargs=2, help="Compare two profile.json; no bundle then.")
@click.option(
    "--estimate",
    "gpu",
    type=click.Choice(list(GPUS)),
    help="Run nothing: what the bundle's TensorRT engines need on this GPU, by the layers that TensorRT listed.",
)
@click.option("--out", type=click.Path(path_type=Path), help=f"Folder for {', '.join((*_FILES, _BESIDE))}.")
@runtime_options
def profile(
    bundle: Path | None,
    runs: int,
    warmup: int,
    batch: int | None,
    operators: bool,
    beside: Path | None,
    compare: tuple[Path, Path] | None,
    gpu: str | None,
    out: Path | None,
    runtime: RuntimeOptions,
) -> None:
    """Time every graph of a bundle, against its counted work and what this machine reaches.

    Prints a table and a JSON line; with --out also writes a report, a trace for Perfetto (ui.perfetto.dev) and a plot.
    """
    if (bundle is None) == (compare is None):
        raise click.UsageError("give a BUNDLE, or --compare with two profiles")
    if compare is not None:
        if operators or any(option is not None for option in (beside, gpu, batch, out)):
            raise click.UsageError(
                "--compare runs and writes nothing: leave out --operators, --beside, --estimate, --batch and --out"
            )
        a, b = (_read(path) for path in compare)
        click.echo(profiling.comparison_table(a, b))
        click.echo(json.dumps({"a_ms": round(a.total_ms, 3), "b_ms": round(b.total_ms, 3)}))
        return
    assert bundle is not None
    if gpu is not None:
        if operators or beside is not None:
            raise click.UsageError("--estimate runs nothing: leave out --operators and --beside")
        _estimate(bundle, batch, GPUS[gpu], out)
        return
    bundles = [bundle] if beside is None else [bundle, beside]
    measuring = _measuring_backend(runtime) if operators else None
    if out is not None:
        if importlib.util.find_spec("matplotlib") is None:  # before minutes of work
            raise BackendError("matplotlib is not installed; pip install 'fastvar-trt[quality]', or leave out --out")
        for name in (*_FILES, *([_BESIDE] if beside is not None else [])):
            check_writable(out / name)
        if beside is not None and _label(_conditions(beside, read_manifest(beside))) == _label(
            _conditions(bundle, read_manifest(bundle))
        ):
            raise RequestError(f"--beside {beside}: has the name and the plan of {bundle}; give another")
    with contextlib.ExitStack() as stack:
        recorders = []
        for path in bundles:
            pipe = stack.enter_context(runtime.load(path))
            size = _batch_size(path, pipe.manifest, batch)
            conditions: dict[str, Any] = {**_conditions(path, pipe.manifest), **pipe.backend.describe()}
            recorders.append(profiling.Recorder(pipe, _drawer(pipe, size), size, conditions))
        with counting_bar("profile", (runs + warmup) * len(bundles)) as progress:
            own, *others = profiling.measure(recorders, warmup, runs, progress)
    if measuring is not None:
        own = _with_operators(own, bundle, measuring)
    click.echo(profiling.to_table(own))
    click.echo(f"beyond the graphs {own.overhead_ms:.2f} ms per call")
    for name, by_operator in own.operators.items():
        click.echo(f"{name}: " + ", ".join(f"{op} {ms:.2f} ms" for op, ms in list(by_operator.items())[:5]))
    for other in others:
        click.echo(f"\nA: {other.conditions['bundle']}, B: {bundle}, run in turns")
        click.echo(profiling.comparison_table(other, own))
    if out is not None:
        _write(own, others, out)
    click.echo(json.dumps({"total_ms": round(own.total_ms, 3), "overhead_ms": own.overhead_ms, "out": str(out or "")}))


def _batch_size(bundle: Path, manifest: Manifest, batch: int | None) -> int:
    size = batch or manifest.batches[0]
    if size not in manifest.batches:
        sizes = ", ".join(map(str, manifest.batches))
        raise RequestError(f"--batch {size}: {bundle} holds {sizes}; export with --batch {size}")
    return size


def _estimate(bundle: Path, batch: int | None, gpu: Gpu, out: Path | None) -> None:
    """Print, and with a folder also write, what the engines need."""
    if out is not None:
        for name in _ESTIMATE_FILES:
            check_writable(out / name)
    manifest = read_manifest(bundle)
    folders = [engine_set for name in TENSORRT_FLAVOURS if (engine_set := read_engines(bundle, name)).records]
    if not folders:
        raise BackendError(
            f"bundle {bundle}: has no TensorRT engines; run `fastvar build {bundle} --target {gpu.target}`"
        )
    result = estimate(manifest, folders[0], _batch_size(bundle, manifest, batch), gpu)
    table, total = to_table(result), result.total
    click.echo(table)
    if out is not None:
        write_text(out / "estimate.json", json.dumps(result.to_json(), indent=1) + "\n")
        write_text(out / "estimate.md", f"# Estimate for {bundle.name} on {gpu.name}\n\n```\n{table}\n```\n")
    line = {"gpu": gpu.name, "least_ms": total.least_ms, "probable_ms": total.probable_ms, "launches": total.launches}
    click.echo(json.dumps({key: round(v, 2) if isinstance(v, float) else v for key, v in line.items()}))


def _read(path: Path) -> profiling.Profile:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read as JSON: {error}") from error
    return profiling.Profile.from_json(data, str(path))


def _drawer(pipe: Pipeline, batch: int) -> Callable[[int], Any]:
    """A call of `draw` for one batch, of the first classes or of random text features."""
    requests = example_requests(pipe.manifest, batch, text_tokens=_TEXT_TOKENS)

    def draw(run: int) -> Any:
        return pipe.draw([dataclasses.replace(r, seed=run * batch + i) for i, r in enumerate(requests)])

    return draw


def _measuring_backend(runtime: RuntimeOptions) -> Backend:
    try:
        return runtime.profiling_backend()
    except BackendError as error:
        raise click.UsageError(f"--operators: {error}") from error


def _with_operators(profile: profiling.Profile, bundle: Path, backend: Backend) -> profiling.Profile:
    batch = int(profile.conditions["batch"])
    with Pipeline.load(bundle, backend=backend, check="size") as pipe:
        draw = _drawer(pipe, batch)
        for run in range(_OPERATOR_RUNS):
            draw(run)
        return dataclasses.replace(profile, operators=profiling.operators_of(pipe, batch, _OPERATOR_RUNS))


def _conditions(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    return {"bundle": str(bundle), "plan": manifest.default.plan.name, "precision": manifest.precision}


def _label(conditions: Mapping[str, Any]) -> str:
    return f"{Path(str(conditions['bundle'])).name}\n{conditions['plan']}, {conditions['precision']}"


def _write(profile: profiling.Profile, others: Sequence[profiling.Profile], out: Path) -> None:
    write_text(out / "profile.json", json.dumps(profile.to_json(), indent=1) + "\n")
    report = profiling.to_markdown(profile, f"Profile of {Path(str(profile.conditions['bundle'])).name}")
    for other in others:
        write_text(out / _BESIDE, json.dumps(other.to_json(), indent=1) + "\n")
        report += f"\nA: {other.conditions['bundle']}, plan {other.conditions['plan']}; B: this one; run in turns.\n\n"
        report += f"```\n{profiling.comparison_table(other, profile)}\n```\n"
    write_text(out / "profile.md", report)
    write_text(out / "trace.json", json.dumps(profiling.to_trace(profile)) + "\n")
    profiling.plot({_label(p.conditions): p for p in (*others, profile)}, out / "profile.png")
