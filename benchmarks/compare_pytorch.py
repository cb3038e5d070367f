"""PyTorch eager against the runtime, dense and pruned, side by side in one run.

Each variant lives in a process of its own, so that its memory can be told apart; the parent lets them run in turn,
one image each, for several rounds, and compares medians. Weights are random: times do not depend on their values.

    python benchmarks/compare_pytorch.py --runs 5 --work-dir out/bench > results.md

Prints, for every schedule, tables (ratios, scales, memory), then one JSON line.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from fastvar_trt.export.models.registry import load_plan
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.backends.onnxruntime import cpu_fields
from fastvar_trt.runtime.manifest import LABELS, WEIGHTS_FILE
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.tools.tables import format_table

CFG, TOP_K, TOP_P = 1.5, 900, 0.96


def memory_mib() -> dict[str, float]:
    """Memory of this process: PSS counts a shared page once, RSS once per mapping."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {
        "pss_mib": int(fields["Pss"].split()[0]) / 1024,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


class PyTorchVariant:
    """The eager chain over the bundle's own weights: KV cache, SDPA, modulations hoisted."""

    def __init__(self, bundle: Path) -> None:
        import torch

        from fastvar_trt.export.exporter import load_bundle_model
        from fastvar_trt.export.models.base import Request
        from fastvar_trt.export.models.reference import generate

        model, manifest = load_bundle_model(bundle)
        plan = manifest.resolved_plan
        request = Request(
            torch.full((1,), CFG),
            torch.ones(1),
            torch.full((1,), TOP_K),
            torch.full((1,), TOP_P),
            torch.zeros(1, dtype=torch.bool),
        )
        noise = {k: torch.from_numpy(uniform_noise(0, k, plan.num_tokens(k)))[None] for k in plan.steps}

        def run() -> dict[str, float]:
            begin = time.perf_counter()
            result = generate(model, plan, {LABELS: torch.tensor([1])}, noise, request)
            total = (time.perf_counter() - begin) * 1e3
            return {"total": total, **{f"step_{k:02d}": ms for k, ms in result.step_ms.items()}}

        self.run = run
        self.memory = memory_mib


class RuntimeVariant:
    """The exported bundle on ONNX Runtime, without the decoder's time."""

    def __init__(self, bundle: Path, engines: str) -> None:
        self._pipe = Pipeline.load(bundle, engines=engines, check="size")

    def run(self) -> dict[str, float]:
        begin = time.perf_counter()
        result = self._pipe.generate([1], cfg=CFG, top_k=TOP_K, top_p=TOP_P)
        # All that the call takes, copies and loop included; PyTorch's side does not decode.
        total = (time.perf_counter() - begin) * 1e3 - result.timings["decoder"]
        return {"total": total, **{k: v for k, v in result.timings.items() if k.startswith("step")}}

    def memory(self) -> dict[str, float]:
        return {"buffers_mib": self._pipe.num_buffer_bytes / 2**20, **memory_mib()}


def worker(kind: str, bundle: Path) -> None:
    """Serve one variant over standard input and output: a line in, one image, its times out."""
    begin = time.perf_counter()
    variant: Any = PyTorchVariant(bundle) if kind == "pytorch" else RuntimeVariant(bundle, kind)
    print(json.dumps({"load_s": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        print(json.dumps(variant.run() if line.strip() == "run" else variant.memory()), flush=True)


class Worker:
    """A variant in its own process."""

    def __init__(self, kind: str, bundle: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, str(bundle)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.load_s = self._read()["load_s"]

    def ask(self, what: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException("a worker ended early; its message is above")
        data: dict[str, float] = json.loads(line)
        return data

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_rounds(workers: dict[str, Worker], runs: int) -> dict[str, list[dict[str, float]]]:
    """The times of every variant, one image each in turn, after a round that warms up; the workers are closed."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    try:
        for round_number in range(runs + 1):
            for name, process in workers.items():
                result = process.ask("run")
                if round_number > 0:
                    times[name].append(result)
    finally:
        for process in workers.values():
            process.close()
    return times


def measure_memory(kind: str, bundle: Path) -> dict[str, float]:
    """Memory of a variant after one image, with no other process that maps the same weights."""
    process = Worker(kind, bundle)
    try:
        process.ask("run")
        return process.ask("memory")
    finally:
        process.close()


def prepare(folder: Path, depth: int, width: int, schedule: str, prune: str) -> tuple[Path, Path]:
    """A random checkpoint and its dense and pruned bundles, with prepacked engines; reused where they exist."""
    from fastvar_trt.export.build.base import build_bundle
    from fastvar_trt.export.build.cpu import CpuBuilder
    from fastvar_trt.export.exporter import ExportOptions, export_model
    from fastvar_trt.export.models.var.source import VARSource
    from fastvar_trt.runtime import read_manifest
    from fastvar_trt.tools.random_checkpoints import PATCH_NUMS_256, PATCH_NUMS_512, random_checkpoint

    patch_nums = {"256": PATCH_NUMS_256, "512": PATCH_NUMS_512}[schedule]
    bundles = {name: folder / f"d{depth}_w{width}_{schedule}" / Path(name).stem for name in ("none", prune)}
    source = None
    for name, bundle in bundles.items():
        if bundle.exists() and read_manifest(bundle).default.plan != load_plan(name):
            raise click.ClickException(f"{bundle} was exported with another plan {name}; remove it")
        if not bundle.exists():
            if source is None:
                states = random_checkpoint(
                    depth=depth, width=width, patch_nums=patch_nums, num_classes=1000, vocab_size=4096
                )
                source = VARSource.from_state(*states)
                bundle.parent.mkdir(parents=True, exist_ok=True)
            begin = time.perf_counter()
            export_model(source, bundle, ExportOptions(load_plan(name)))
            click.echo(f"exported {name} at {schedule} in {time.perf_counter() - begin:.0f} s", err=True)
        report = build_bundle(bundle, CpuBuilder())
        if report.built:
            click.echo(f"prepacked {name} at {schedule} in {report.seconds:.0f} s", err=True)
    return bundles["none"], bundles[prune]


@click.command()
@click.option("--depth", default=16, show_default=True)
@click.option("--width", default=1024, show_default=True)
@click.option(
    "--schedule",
    "schedules",
    type=click.Choice(["256", "512"]),
    multiple=True,
    default=("256", "512"),
    show_default=True,
)
@click.option("--prune", default="fastvar-var", show_default=True)
@click.option("--runs", default=5, show_default=True, help="Rounds; each runs every variant once.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keeps checkpoints and bundles; default: temporary.")
def main(depth: int, width: int, schedules: tuple[str, ...], prune: str, runs: int, work_dir: Path | None) -> None:
    """Compare PyTorch eager with the runtime on this machine."""
    for schedule in schedules:
        compare(depth, width, schedule, prune, runs, work_dir)


def compare(depth: int, width: int, schedule: str, prune: str, runs: int, work_dir: Path | None) -> None:
    """One schedule: measure, print."""
    with tempfile.TemporaryDirectory() as scratch:
        dense, pruned = prepare(work_dir or Path(scratch), depth, width, schedule, prune)
        variants = {
            "PyTorch dense": ("pytorch", dense),
            "ours dense": ("off", dense),
            "ours dense, prepacked": ("require", dense),
            "PyTorch pruned": ("pytorch", pruned),
            "ours pruned": ("off", pruned),
            "ours pruned, prepacked": ("require", pruned),
        }
        memory = {name: measure_memory(kind, bundle) for name, (kind, bundle) in variants.items()}
        workers = {name: Worker(kind, bundle) for name, (kind, bundle) in variants.items()}
        times = take_rounds(workers, runs)
        weights_mib = (dense / WEIGHTS_FILE).stat().st_size / 2**20

    medians = {name: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for name, rows in times.items()}
    base = [r["total"] for r in times["PyTorch dense"]]
    ratios = {
        name: statistics.median(b / r["total"] for b, r in zip(base, rows, strict=True)) for name, rows in times.items()
    }
    processor = cpu_fields().get("model name", platform.machine())
    click.echo(
        f"## {depth} layers x {width}, {schedule}x{schedule} pixels, plan {prune}\n\n"
        f"Batch 1 with guidance, fp32, {runs} runs, transformer only. {processor}, "
        f"{len(os.sched_getaffinity(0))} cores.\n"
    )
    rows: list[list[object]] = [
        [
            name,
            f"{m['total'] / 1e3:.2f}",
            f"{min(r['total'] for r in times[name]) / 1e3:.2f}-{max(r['total'] for r in times[name]) / 1e3:.2f}",
            f"{ratios[name]:.2f}x",
            f"{workers[name].load_s:.1f}",
            f"{memory[name].get('buffers_mib', 0):.0f}",
            f"{memory[name]['pss_mib']:.0f}",
            f"{memory[name]['pss_mib'] / weights_mib:.2f}",
            f"{memory[name]['peak_rss_mib']:.0f}",
        ]
        for name, m in medians.items()
    ]
    header = ["variant", "s (median)", "min-max", "speed-up over PyTorch dense", "load s", "buffers MiB", "PSS MiB"]
    header += ["PSS / weights", "peak RSS MiB"]
    click.echo(format_table(header, rows))
    click.echo(f"\nWeights: {weights_mib:.0f} MiB. Milliseconds per scale:\n")
    steps = [key for key in medians["PyTorch dense"] if key.startswith("step")]
    click.echo(
        format_table(["scale", *variants], [[s, *[f"{m.get(s, 0.0):.0f}" for m in medians.values()]] for s in steps])
    )
    click.echo(
        "\n"
        + json.dumps(
            {
                "schedule": schedule,
                "depth": depth,
                "width": width,
                "plan": prune,
                "runs": runs,
                "total_ms": {name: round(m["total"], 1) for name, m in medians.items()},
                "speedup_over_pytorch_dense": {name: round(r, 3) for name, r in ratios.items()},
                "memory": {name: {k: round(v) for k, v in m.items()} for name, m in memory.items()},
                "weights_mib": round(weights_mib),
            }
        )
        + "\n"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
