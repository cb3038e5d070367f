"""`fastvar profile`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastvar_trt.runtime.backends import BACKENDS
from fastvar_trt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fastvar_trt.runtime.command import ErrorCommand
from fastvar_trt.runtime.errors import BackendError, BundleError, RequestError
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.tools import profiling
from fastvar_trt.tools.files import check_writable, write_text

_OPERATOR_RUNS = 3
_TEXT_TOKENS = 32  # of the random features that text bundles are profiled with
_FILES = ("profile.json", "profile.md", "trace.json", "profile.png")


@click.command(
    "profile",
    cls=ErrorCommand,
    epilog="""
\b
Examples:
  fastvar profile out/demo_dense --out out/profile_dense
  fastvar profile out/demo_pruned --operators --against out/profile_dense/profile.json --out out/profile_pruned
  fastvar profile --compare out/profile_dense/profile.json out/profile_pruned/profile.json
""",
)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True, help="Calls that count.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Calls before them.")
@click.option("--batch", type=click.IntRange(1), help="Images per call; default: the bundle's smallest batch size.")
@click.option("--operators", is_flag=True, help="Also time ONNX Runtime's operators, in calls of their own.")
@click.option("--against", type=click.Path(path_type=Path), help="profile.json to stand beside in the plot.")
@click.option("--compare", type=click.Path(path_type=Path), nargs=2, help="Compare two profile.json; no bundle then.")
@click.option("--out", type=click.Path(path_type=Path), help=f"Folder for {', '.join(_FILES)}.")
@click.option("--engines", type=click.Choice(["auto", "off", "require"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads per operator; default: one per core.")
@click.option("--capture/--no-capture", default=None, help="On a GPU: run the chain as one CUDA graph.")
@click.option("--device", help="cpu, cuda or cuda:N; default: what the backend runs on.")
@click.option("--backend", type=click.Choice(BACKENDS), default=BACKENDS[0], show_default=True)
def profile_command(
    bundle: Path | None,
    runs: int,
    warmup: int,
    batch: int | None,
    operators: bool,
    against: Path | None,
    compare: tuple[Path, Path] | None,
    out: Path | None,
    engines: str,
    threads: int | None,
    capture: bool | None,
    device: str | None,
    backend: str,
) -> None:
    """Time every graph of a bundle, against its counted work and what this machine reaches.

    Prints a table and a JSON line; with --out also writes a report, a trace for Perfetto (ui.perfetto.dev) and a plot.
    """
    if (bundle is None) == (compare is None):
        raise click.UsageError("give a BUNDLE, or --compare with two profiles")
    if compare is not None:
        a, b = (_read(path) for path in compare)
        click.echo(profiling.comparison_table(a, b))
        click.echo(json.dumps({"a_ms": round(a.total_ms, 3), "b_ms": round(b.total_ms, 3)}))
        return
    assert bundle is not None
    if operators and (backend != BACKENDS[0] or (device or "cpu") != "cpu"):
        raise click.UsageError("--operators reads ONNX Runtime's profiler on the CPU")
    beside = None if against is None else _read(against)
    if out is not None:
        if importlib.util.find_spec("matplotlib") is None:  # before minutes of work
            raise BackendError("matplotlib is not installed; pip install 'fastvar-trt[quality]', or leave out --out")
        for name in _FILES:
            check_writable(out / name)
        if beside is not None and _label(beside.conditions) == _label(_conditions_of(bundle)):
            raise RequestError(f"--against {against}: is a profile of the same bundle and plan; give another's")
    with Pipeline.load(
        bundle, backend=backend, device=device, num_threads=threads, engines=engines, capture=capture
    ) as pipe:
        batch = batch or pipe.manifest.batches[0]
        if batch not in pipe.manifest.batches:
            sizes = ", ".join(map(str, pipe.manifest.batches))
            raise RequestError(f"--batch {batch}: the bundle holds {sizes}; export with --batch {batch}")
        conditions: dict[str, Any] = {**_conditions_of(bundle), "backend": pipe.backend.name}
        if isinstance(pipe.backend, OnnxRuntimeBackend):
            conditions["prepacked"] = pipe.backend.prepacked
        with click.progressbar(length=runs + warmup, label="profile", width=24) as bar:
            profile = profiling.measure(
                pipe,
                _drawer(pipe, batch),
                warmup=warmup,
                runs=runs,
                batch=batch,
                conditions=conditions,
                progress=bar.update,
            )
    if operators:
        profile = _with_operators(profile, bundle, batch, threads, engines)
    click.echo(profiling.to_table(profile))
    click.echo(f"beyond the graphs {profile.overhead_ms:.2f} ms per call")
    for name, by_operator in profile.operators.items():
        click.echo(f"{name}: " + ", ".join(f"{op} {ms:.2f} ms" for op, ms in list(by_operator.items())[:5]))
    if out is not None:
        _write(profile, beside, out)
    click.echo(
        json.dumps({"total_ms": round(profile.total_ms, 3), "overhead_ms": profile.overhead_ms, "out": str(out or "")})
    )


def _read(path: Path) -> profiling.Profile:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read as JSON: {error}") from error
    return profiling.Profile.from_json(data, str(path))


def _drawer(pipe: Pipeline, batch: int) -> Callable[[int], Any]:
    """A call of `generate` for one batch, of the first classes or of random text features."""
    model = pipe.manifest.model
    if model.family == "var":
        labels = [i % model.num_classes for i in range(batch)]
        return lambda run: pipe.generate(labels, seeds=run * batch)
    rng = np.random.default_rng(0)
    shape = (min(_TEXT_TOKENS, model.text_length), model.text_width)
    features = [rng.standard_normal(shape).astype(np.float32) for _ in range(batch)]
    return lambda run: pipe.generate(text_features=features, seeds=run * batch)


def _with_operators(
    profile: profiling.Profile, bundle: Path, batch: int, threads: int | None, engines: str
) -> profiling.Profile:
    """The profile with ONNX Runtime's own times: they cost time themselves, so they are taken apart from the others."""
    with tempfile.TemporaryDirectory() as folder:
        backend = OnnxRuntimeBackend(num_threads=threads, engines=engines, profile_to=Path(folder))
        with Pipeline.load(bundle, backend=backend, check="size") as pipe:
            draw = _drawer(pipe, batch)
            for run in range(_OPERATOR_RUNS):
                draw(run)
            files = backend.end_profiling()
            traces = {g.name: files[g.file] for g in pipe.manifest.chain(batch)}
            return dataclasses.replace(profile, operators=profiling.operators_of(traces, _OPERATOR_RUNS))


def _conditions_of(bundle: Path) -> dict[str, Any]:
    manifest = read_manifest(bundle)
    return {"bundle": str(bundle), "plan": manifest.plan.name, "precision": manifest.precision}


def _label(conditions: Mapping[str, Any]) -> str:
    return f"{Path(str(conditions['bundle'])).name}\n{conditions['plan']}, {conditions['precision']}"


def _write(profile: profiling.Profile, beside: profiling.Profile | None, out: Path) -> None:
    shown = {_label(profile.conditions): profile}
    if beside is not None:
        shown = {_label(beside.conditions): beside, **shown}
    write_text(out / "profile.json", json.dumps(profile.to_json(), indent=1) + "\n")
    title = f"Profile of {Path(str(profile.conditions['bundle'])).name}"
    write_text(out / "profile.md", profiling.to_markdown(profile, title))
    write_text(out / "trace.json", json.dumps(profiling.to_trace(profile)) + "\n")
    profiling.plot(shown, out / "profile.png")
