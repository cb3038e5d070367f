"""Formats of few bits beside fp32 on this processor: a VAR with random weights, dense and pruned, in turns in one run.

Every bundle is prepacked and lives in a process of its own, as in `compare_pytorch.py`.

    python benchmarks/quantised.py --runs 5 --work-dir out/bench > results.md

Prints, for every plan, times by scale and memory, then one JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import click

from compare_pytorch import Worker, measure_memory, take_rounds
from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.exporter import ExportOptions, export_again, export_model
from fastvar_trt.export.models.registry import load_plan
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime.backends.onnxruntime import cpu_fields
from fastvar_trt.runtime.manifest import WEIGHTS_FILE
from fastvar_trt.tools.random_checkpoints import PATCH_NUMS_256, PATCH_NUMS_512, random_checkpoint
from fastvar_trt.tools.tables import format_table

SCHEDULES = {"256": PATCH_NUMS_256, "512": PATCH_NUMS_512}
FORMATS = ("fp32", "w8", "w4", "w8a8")


def prepare(folder: Path, depth: int, schedule: str, plan: str) -> dict[str, Path]:
    """A prepacked bundle per format; those that are there are taken."""
    bundles = {name: folder / f"d{depth}_{schedule}_{plan}_{name}" for name in FORMATS}
    for name, bundle in bundles.items():
        begin = time.perf_counter()
        if bundle.exists():
            continue
        if name == "fp32":
            states = random_checkpoint(
                depth=depth, width=64 * depth, patch_nums=SCHEDULES[schedule], num_classes=1000, vocab_size=4096
            )
            options = ExportOptions(load_plan(plan), max_top_k=900, compare=False)
            export_model(VARSource.from_state(*states), bundle, options)
        else:
            export_again(bundles["fp32"], bundle, precision=name)
        build_targets(bundle, "cpu")
        click.echo(f"{bundle.name} in {time.perf_counter() - begin:.0f} s", err=True)
    return bundles


@click.command()
@click.option("--depth", default=16, show_default=True, help="Layers; the width is 64 times that.")
@click.option("--schedule", type=click.Choice(list(SCHEDULES)), default="256", show_default=True, help="Pixels.")
@click.option("--runs", default=5, show_default=True)
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keeps bundles. Default: a temporary folder.")
def main(depth: int, schedule: str, runs: int, work_dir: Path | None) -> None:
    """Measure."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = work_dir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for plan in ("none", "fastvar-var"):
            compare(prepare(folder, depth, schedule, plan), f"d{depth}, {schedule}x{schedule}, plan {plan}", runs)


def compare(bundles: dict[str, Path], title: str, runs: int) -> None:
    """One plan: measure, print."""
    memory = {name: measure_memory("require", bundle) for name, bundle in bundles.items()}
    times = take_rounds({name: Worker("require", bundle) for name, bundle in bundles.items()}, runs)
    graphs = list(times["fp32"][0])
    medians = {
        name: {graph: statistics.median(r[graph] for r in rows) for graph in graphs} for name, rows in times.items()
    }

    def ratio(name: str, graph: str) -> float:
        """Median of the rounds' ratios to fp32."""
        pairs = zip(times["fp32"], times[name], strict=True)
        return statistics.median(base[graph] / own[graph] for base, own in pairs)

    processor = f"{cpu_fields().get('model name', '?')}, {len(os.sched_getaffinity(0))} cores"
    click.echo(f"## {title}\n\nBatch 1 with guidance, {runs} runs, without the decoder. {processor}.\n")
    rows = [
        [
            graph,
            *(f"{own[graph]:.1f}" for own in medians.values()),
            *(f"{ratio(name, graph):.2f}x" for name in FORMATS[1:]),
        ]
        for graph in graphs
    ]
    click.echo(format_table(["median ms", *FORMATS, *(f"{name} to fp32" for name in FORMATS[1:])], rows))
    sizes = {name: (bundle / WEIGHTS_FILE).stat().st_size / 2**20 for name, bundle in bundles.items()}
    click.echo(
        "\n"
        + format_table(
            ["MiB", *FORMATS],
            [
                ["weights file", *(f"{size:.0f}" for size in sizes.values())],
                ["PSS", *(f"{own['pss_mib']:.0f}" for own in memory.values())],
                ["of these, buffers", *(f"{own['buffers_mib']:.0f}" for own in memory.values())],
            ],
        )
    )
    record = {"title": title, "cpu": processor, "median_ms": medians, "memory_mib": memory, "weights_mib": sizes}
    click.echo("\n" + json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
