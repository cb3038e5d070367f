"""Editing with the scene model, at 1024x1024: how long it takes, what comes out, and what the means for it cost unused.

    python benchmarks/editing.py --scenes 30 --work-dir out/bench > results.md

In-painting: of a rendered scene with two solids one is drawn anew as another, in the box that holds both. Whether the
new one is there, and the other still, the checker of `fastvar evaluate --scenes` says. Super-resolution: of a scene,
rendered at 1024 and shrunk to 256 pixels, the first scales are kept. Overhead: bundles with image encoder and without
draw in turns. Prints tables, then one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.exporter import ExportOptions, export_again, export_model
from fastvar_trt.export.models.infinity.family import PLAN_OF_SIZE, load_scenes
from fastvar_trt.runtime import GenerationResult, Pipeline
from fastvar_trt.runtime.backends.onnxruntime import cpu_fields
from fastvar_trt.runtime.pictures import fitted
from fastvar_trt.runtime.plan import DENSE, PruningPlan
from fastvar_trt.tools.scenes.checker import compliance, read_picture
from fastvar_trt.tools.scenes.renderer import render, silhouette
from fastvar_trt.tools.scenes.world import COLOURS, SHAPES, Scene, caption, random_scene
from fastvar_trt.tools.sheets import contact_sheet
from fastvar_trt.tools.tables import format_table

SIDE = 1024
# Of the tokens that a third of a picture leaves to be drawn at 32x32 and 40x40, none needs to be left out.
EDIT_PLAN = PruningPlan("edit", ((9, 0.65), (10, 0.65), (11, 1.0), (12, 1.0)), 8, 3, 27)
PLANS = {"dense": DENSE, "pruned": PLAN_OF_SIZE["1M"], "edit": EDIT_PLAN}
KEPT = (7, 8, 9, 10)
MARGIN = 48  # pixels around the solids


def prepare(folder: Path) -> dict[str, Path]:
    """A prepacked bundle per plan, and one without image encoder; those that are there are taken."""
    folder.mkdir(parents=True, exist_ok=True)
    bundles = {name: folder / name for name in (*PLANS, "without encoder")}
    for name, bundle in bundles.items():
        if bundle.exists():
            continue
        if name == "without encoder":
            export_model(load_scenes("1M"), bundle, ExportOptions(PLANS["pruned"], compare=False))
        elif name == "dense":
            export_model(load_scenes("1M").with_encoder(), bundle, ExportOptions(DENSE, compare=False))
        else:
            export_again(bundles["dense"], bundle, PLANS[name])
        build_targets(bundle, "cpu")
    return bundles


def psnr(a: NDArray[Any], b: NDArray[Any], where: NDArray[Any] | None = None) -> float:
    """Of pixels, in dB."""
    difference = (a.astype(np.float64) - b) ** 2
    return float(10 * np.log10(255**2 / (difference if where is None else difference[where]).mean()))


@dataclasses.dataclass(frozen=True)
class Task:
    """A scene, and the same with one solid replaced."""

    before: Scene
    after: Scene
    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    prompt: str


def task(number: int) -> Task:
    """The solid at the right becomes one of another shape and colour."""
    rng = np.random.default_rng([number, 18])
    before = random_scene(rng, 2)
    *others, old = before.solids
    taken = {solid.colour for solid in before.solids}
    new = dataclasses.replace(
        old,
        shape=str(rng.choice([shape for shape in SHAPES if shape != old.shape])),
        colour=str(rng.choice([colour for colour in COLOURS if colour not in taken])),
    )
    after = dataclasses.replace(before, solids=(*others, new))
    shapes = [silhouette(dataclasses.replace(before, solids=(solid,)), (SIDE, SIDE)) for solid in (old, new)]
    rows, columns = np.nonzero(shapes[0] | shapes[1])
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[max(rows.min() - MARGIN, 0) : rows.max() + MARGIN, max(columns.min() - MARGIN, 0) : columns.max() + MARGIN] = (
        True
    )
    return Task(before, after, render(before, (SIDE, SIDE)), mask, caption(after, rng))


def timed(pipe: Pipeline, **values: Any) -> tuple[GenerationResult, float]:
    """What `generate` gives, and its seconds."""
    begin = time.perf_counter()
    result = pipe.generate(**values)
    return result, time.perf_counter() - begin


def in_painting(pipes: dict[str, Pipeline], tasks: Sequence[Task]) -> tuple[list[dict[str, Any]], list[Any]]:
    """A row per plan, and pictures of the first tasks."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in pipes}
    sheet = []
    for number, own in enumerate(tasks):
        nothing = np.zeros_like(own.mask)
        shown = [own.image]
        for name, pipe in pipes.items():
            common: dict[str, Any] = {"prompts": [own.prompt], "image": own.image, "seeds": number}
            edited, seconds = timed(pipe, **common, mask=own.mask, paste=False)
            whole, whole_s = timed(pipe, prompts=[own.prompt], seeds=number)
            kept = pipe.generate(**common, mask=nothing, paste=False).images[0]
            picture, pasted = edited.images[0], pipe.generate(**common, mask=own.mask).images[0]
            reading, expected = read_picture(pasted), own.after.solids[-1]
            row = {
                "edit s": seconds,
                "whole s": whole_s,
                "ratio": whole_s / seconds,
                "there": any((s.shape, s.colour) == (expected.shape, expected.colour) for s in reading.solids),
                "all": all(compliance(own.after, reading, sides_are_told=False).values()),
                "drawn": all(compliance(own.after, read_picture(whole.images[0]), sides_are_told=False).values()),
                "outside dB": psnr(picture, own.image, ~own.mask),
                "kept dB": psnr(kept, own.image, ~own.mask),
                **{f"{step} ms": edited.timings[step] for step in ("step_09", "step_10")},
            }
            for key, value in row.items():
                found[name].setdefault(key, []).append(float(value))
            shown.append(pasted)
        if number < 4:
            sheet.append((own.prompt, shown))
    rows = [
        {"plan": name, **{key: aggregate(key, values) for key, values in own.items()}} for name, own in found.items()
    ]
    return rows, sheet


def aggregate(key: str, values: Sequence[float]) -> float:
    """Medians of times, means of the rest."""
    is_time = key == "ratio" or key.endswith((" s", " ms"))
    return statistics.median(values) if is_time else statistics.fmean(values)


def super_resolution(pipes: dict[str, Pipeline], tasks: Sequence[Task]) -> tuple[list[dict[str, Any]], list[Any]]:
    """A row per way to enlarge: dB to the rendered picture, and to it after shrinking both to 256 pixels."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    sheet = []
    for number, own in enumerate(tasks):
        prompt = caption(own.before, np.random.default_rng(number))
        small = Image.fromarray(own.image).resize((SIDE // 4, SIDE // 4), Image.Resampling.LANCZOS)
        large = fitted(small, SIDE, SIDE)
        made = {"bicubic": (np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)), 0.0)}
        for name in ("dense", "pruned"):
            common: dict[str, Any] = {"prompts": [prompt], "image": large, "seeds": number}
            for kept in KEPT:
                result, seconds = timed(pipes[name], **common, keep_scales=kept)
                made[f"{name}, {kept} scales kept"] = result.images[0], seconds
        none = np.zeros((SIDE, SIDE), dtype=bool)
        kept_all = pipes["dense"].generate(prompts=[prompt], image=own.image, mask=none, paste=False)
        made["reconstruction of the large one"] = kept_all.images[0], 0.0
        for name, (picture, seconds) in made.items():
            again = np.asarray(Image.fromarray(picture).resize(small.size, Image.Resampling.LANCZOS))
            rows.setdefault(name, []).append((psnr(picture, own.image), psnr(again, np.asarray(small)), seconds))
        if number < 3:
            names = ("bicubic", "pruned, 9 scales kept", "dense, 9 scales kept")
            sheet.append((prompt, [own.image, *(made[name][0] for name in names)]))
    return [
        {
            "enlarged by": name,
            "dB at 1024": statistics.fmean(value[0] for value in values),
            "dB at 256": statistics.fmean(value[1] for value in values),
            "s": statistics.median(value[2] for value in values),
        }
        for name, values in rows.items()
    ], sheet


def overhead(bundles: dict[str, Path], runs: int) -> dict[str, float]:
    """Steps and decoder of a bundle with image encoder over those of one without, in turns."""
    ratios = []
    with Pipeline.load(bundles["pruned"]) as ours, Pipeline.load(bundles["without encoder"]) as theirs:
        features, _ = ours.encode(["a red sphere on sand"])
        for run in range(runs):
            order = (ours, theirs) if run % 2 else (theirs, ours)
            times = {id(pipe): sum(pipe.generate(text_features=features).timings.values()) for pipe in order}
            ratios.append(times[id(ours)] / times[id(theirs)])
    low, high = np.percentile(ratios, [25, 75]).tolist()
    return {"median": statistics.median(ratios), "lower quartile": low, "upper quartile": high, "runs": float(runs)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Of numbers."""
    return format_table(
        list(rows[0]), [[v if isinstance(v, str) else f"{v:.3g}" for v in row.values()] for row in rows]
    )


@click.command()
@click.option("--scenes", default=30, show_default=True)
@click.option("--runs", default=41, show_default=True, help="Of the overhead.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Keeps bundles. Default: a temporary folder.")
@click.option("--sheets", type=click.Path(path_type=Path), help="Folder for in_painting.png and super_resolution.png.")
def main(scenes: int, runs: int, work_dir: Path | None, sheets: Path | None) -> None:
    """Measure."""
    with tempfile.TemporaryDirectory() as scratch:
        bundles = prepare(work_dir or Path(scratch))
        processor = f"{cpu_fields().get('model name', '?')}, {len(os.sched_getaffinity(0))} cores"
        tasks = [task(number) for number in range(scenes)]
        unused = overhead(bundles, runs)
        pipes = {name: Pipeline.load(bundles[name], check="size") for name in PLANS}
        painted, painted_sheet = in_painting(pipes, tasks)
        enlarged, enlarged_sheet = super_resolution(pipes, tasks[: max(scenes // 2, 1)])
        for pipe in pipes.values():
            pipe.close()
    share = statistics.fmean(float(own.mask.mean()) for own in tasks)
    click.echo(f"{processor}. {scenes} scenes, {share:.0%} of the picture drawn anew.\n\n{table(painted)}\n")
    click.echo(f"{table(enlarged)}\n")
    click.echo(f"Unused: {unused['median']:.4f} of the time without (quartiles {unused['lower quartile']:.4f}, "
               f"{unused['upper quartile']:.4f}; {runs} runs).\n")  # fmt: skip
    click.echo(json.dumps({"cpu": processor, "in_painting": painted, "super_resolution": enlarged, "unused": unused}))
    if sheets is not None:
        sheets.mkdir(parents=True, exist_ok=True)
        contact_sheet(["picture", *PLANS], painted_sheet).save(sheets / "in_painting.png")
        columns = ["rendered", "bicubic", "pruned, 9 kept", "dense, 9 kept"]
        contact_sheet(columns, enlarged_sheet).save(sheets / "super_resolution.png")


if __name__ == "__main__":
    main()
