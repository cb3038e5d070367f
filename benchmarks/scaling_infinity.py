"""How the time of Infinity's steps grows with the picture, dense and pruned, side by side in one run.

The scene model is exported at every size, dense and with the plan of the size, built for this processor, and the two
chains take turns. Prints a table per size and scale and the fitted exponents of time over pixels, and writes a plot.

    python benchmarks/scaling_infinity.py --sizes 0.06M,0.25M,1M,2K --runs 3 --out out/scaling
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastvar_trt.export.models.infinity.family import PLAN_OF_SIZE, load_scenes
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.layout import kv_bytes
from fastvar_trt.runtime.manifest import Manifest
from fastvar_trt.runtime.plan import DENSE
from fastvar_trt.tools.measure.work import chain_multiply_adds
from fastvar_trt.tools.sheets import saved_figure
from fastvar_trt.tools.tables import format_table

PROMPT = "a red sphere left of a blue cube on sand"


def export(folder: Path, size: str) -> tuple[Path, Path]:
    """Bundles of one size, built for the CPU: dense and pruned."""
    from fastvar_trt.export.build.registry import build_targets
    from fastvar_trt.export.exporter import ExportOptions, export_again, export_model

    dense, pruned = folder / f"{size}_dense", folder / f"{size}_pruned"
    if not dense.exists():
        export_model(load_scenes(size), dense, ExportOptions(DENSE))
    if not pruned.exists():
        export_again(dense, pruned, PLAN_OF_SIZE[size])
    for bundle in (dense, pruned):
        build_targets(bundle, "cpu")
    return dense, pruned


def tokens_forwarded(manifest: Manifest) -> int:
    """Kept tokens over all scales and layers, of one row."""
    plan = manifest.resolved_plan
    return sum(plan.kept(k, layer) for k in plan.steps for layer in range(plan.depth))


@click.command()
@click.option("--sizes", default="0.06M,0.25M,1M,2K", show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keeps the bundles for another run.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for scaling.png and scaling.json.")
def main(sizes: str, runs: int, work_dir: Path | None, out: Path) -> None:
    """Measure and plot."""
    out.mkdir(parents=True, exist_ok=True)
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = work_dir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for size in sizes.split(","):
            bundles = export(folder, size)
            times: list[dict[str, list[float]]] = [{}, {}]
            manifests = []
            for run in range(runs + 1):  # the first is a warm-up
                for i, bundle in enumerate(bundles):
                    with Pipeline.load(bundle, check="size") as pipe:
                        if run == 0:
                            manifests.append(pipe.manifest)
                        pipe.generate(prompts=[PROMPT], seeds=0)
                        result = pipe.generate(prompts=[PROMPT], seeds=run)
                    if run > 0:
                        for name, ms in result.timings.items():
                            times[i].setdefault(name, []).append(ms)
            medians = [{name: statistics.median(values) for name, values in t.items()} for t in times]
            graphs = [{g.scale: g.name for g in m.default.chain(1) if g.scale is not None} for m in manifests]
            by_scale = [{k: m[name] for k, name in g.items()} for m, g in zip(medians, graphs, strict=True)]
            steps = [sum(times_of.values()) / 1e3 for times_of in by_scale]
            variant = manifests[0].default
            records.append(
                {
                    "size": size,
                    "pixels": variant.image_height * variant.image_width,
                    "dense_s": round(steps[0], 3),
                    "pruned_s": round(steps[1], 3),
                    "tokens": [tokens_forwarded(m) for m in manifests],
                    "kv_mib": [round(kv_bytes(m.default.chain(1)) / 2**20, 1) for m in manifests],
                    "work": [chain_multiply_adds(m.model, m.resolved_plan) for m in manifests],
                    "steps_ms": [{k: round(ms, 1) for k, ms in m.items()} for m in by_scale],
                }
            )
            _print_scales(records[-1], manifests)
    _report(records, out / "scaling.png")
    (out / "scaling.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps([{k: v for k, v in record.items() if k != "steps_ms"} for record in records]))


def _print_scales(record: dict[str, Any], manifests: list[Manifest]) -> None:
    dense, pruned = record["steps_ms"]
    plan = manifests[1].resolved_plan
    rows = [
        [
            f"{h}x{w}",
            f"{plan.num_kept[k]}/{h * w}",
            f"{dense[k]:.1f}",
            f"{pruned[k]:.1f}" if k in plan.steps else "skipped",
        ]
        for k, (h, w) in enumerate(plan.schedule)
    ]
    click.echo(f"\n{record['size']}\n" + format_table(["map", "kept", "dense ms", "pruned ms"], rows))


def _exponent(pixels: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(pixels), np.log(seconds), 1)[0])


def _report(records: list[dict[str, Any]], path: Path) -> None:
    pixels = [r["pixels"] for r in records]
    dense, pruned = ([r[key] for r in records] for key in ("dense_s", "pruned_s"))
    exponents = [_exponent(pixels, seconds) for seconds in (dense, pruned)]
    rows = []
    for i, r in enumerate(records):
        tokens, kv, work = r["tokens"], r["kv_mib"], r["work"]
        rows.append(
            [r["size"], f"{dense[i]:.2f}", f"{pruned[i]:.2f}", f"{dense[i] / pruned[i]:.2f}x"]
            + [f"{pair[0]} -> {pair[1]}" for pair in (tokens, kv)]
            + [f"{work[1] / work[0]:.3f}"]
        )
    header = ["size", "dense s", "pruned s", "speed-up", "tokens x layers", "KV MiB", "work"]
    click.echo("\n" + format_table(header, rows))
    click.echo(f"time ~ pixels^x: dense x = {exponents[0]:.2f}, pruned x = {exponents[1]:.2f}")
    with saved_figure(path, (6, 4.2)) as figure:
        axes = figure.subplots()
        for name, seconds, exponent in (("dense", dense, exponents[0]), ("pruned", pruned, exponents[1])):
            axes.loglog(pixels, seconds, "o-", label=f"{name}, pixels^{exponent:.2f}")
        axes.set_xticks(pixels, [str(r["size"]) for r in records])
        axes.minorticks_off()
        axes.set_xlabel("picture")
        axes.set_ylabel("seconds, all steps")
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    main()
