"""`fastvar tune`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastvar_trt.export.models.registry import load_plan
from fastvar_trt.runtime.errors import BundleError, PlanError
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.tools.cli.command import ErrorCommand, counting_bar, examples, extras, integers, numbers
from fastvar_trt.tools.cli.pictures import (
    check_takes_prompts,
    judge_of,
    judge_options,
    picture_requests,
    references_of,
    request_options,
)
from fastvar_trt.tools.files import check_writable, write_text
from fastvar_trt.tools.measure.quality import require_libraries
from fastvar_trt.tools.tables import format_table

if TYPE_CHECKING:  # it needs torch, and a help does not
    from fastvar_trt.tools.measure.tune import Candidate, Study, Sweep

_FILES = ("tune.json", "front.png", "plan.json")


@click.command(
    cls=ErrorCommand,
    short_help="Choose a pruning plan by measurement.",
    epilog=examples(
        "fastvar tune out/demo_dense --scenes 12 --budget 72 --fractions 0.4,0.5,1,1 --fractions 0.4,1,1,1 \\\n"
        "    --cache-scales=-5 --first-layers 0,3 --unguided-from=-4,-5 --plan fastvar-infinity --out out/tune",
        "fastvar tune out/demo_dense --prompt 'two red cubes on snow' --plan fastvar-infinity --out out/tune",
        "fastvar tune out/d16 --class 207 --class 88 --fractions 0.4,0.5 --fractions 0.5,0.75 --out out/tune",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path))
@request_options
@judge_options
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of plan.json, front.png, tune.json."
)
@click.option(
    "--fractions", type=numbers(), multiple=True, help="Pruned fractions of the last scales, in order; repeat for more."
)
@click.option("--cache-scales", type=integers(), default="-2,-3,-4", show_default=True, help="From the end: -N,-N,...")
@click.option("--first-layers", type=integers(), help="First pruned layers; default: 0, 1/8, 1/4 and 1/2 of the depth.")
@click.option(
    "--unguided-from", type=integers(), default=(), help="Where guidance may also end, from the end: -N,-N,..."
)
@click.option(
    "--plan", "marked", multiple=True, help="Preset or plan file that is measured and shown wherever it lies; repeat."
)
@click.option(
    "--budget",
    type=click.IntRange(1),
    help="Pictures that candidates may draw in all: half of them are left out in every round. Default: all draw all.",
)
@click.option(
    "--min-ssim",
    type=click.FloatRange(0, 1),
    help="Of the chosen plan. Default: 0.9, or none where pictures are judged by what they show.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    default=0.05,
    show_default=True,
    help="Relative rise of the distance to the references that the chosen plan may have.",
)
@click.option(
    "--max-loss",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Of scenes and prompts with a checker: share that may show less than dense.",
)
def tune(
    bundle: Path,
    labels: tuple[int, ...],
    prompts: tuple[str, ...],
    seeds: int | None,
    cfg: float | None,
    references: Path | None,
    num_scenes: int | None,
    held_out: bool | None,
    prompts_file: Path | None,
    checker: str | None,
    out: Path,
    fractions: tuple[tuple[float, ...], ...],
    cache_scales: tuple[int, ...],
    first_layers: tuple[int, ...] | None,
    unguided_from: tuple[int, ...],
    marked: tuple[str, ...],
    budget: int | None,
    min_ssim: float | None,
    max_drop: float,
    max_loss: float,
) -> None:
    """Choose a pruning plan by measurement: sweep pruned fraction, cache scale, first pruned layer and end of guidance.

    Every candidate's pictures are compared with the dense ones, or, of --scenes and of --prompts with a --checker, with
    what they are to show. Those that nothing beats in both work and quality are exported and timed beside the dense
    chain. Needs the extras `export` and `quality`, and `text` for prompts.
    """
    with extras("export,cpu,quality"):
        import matplotlib  # noqa: F401  # an error before the sweep

        from fastvar_trt.tools.measure import tune as tuning
    require_libraries()
    manifest = read_manifest(bundle)
    if manifest.precision != "fp32":
        raise BundleError(
            f"bundle {bundle}: precision: got {manifest.precision}, expected fp32: plans are judged on the CPU; export "
            "with --precision fp32 (the plan fits every precision)"
        )
    judge = judge_of(num_scenes, held_out, prompts_file, checker, seed=0)
    if judge is None:
        pictures = picture_requests(bundle, labels, prompts, seeds, manifest)
    else:
        if labels or prompts or seeds is not None:
            raise click.UsageError(
                "--class, --prompt and --seeds go without --scenes and --prompts, which have their own"
            )
        check_takes_prompts(manifest, bundle)
        pictures = judge.pictures
    guidance = manifest.sampling.cfg if cfg is None else cfg
    study = tuning.Study(bundle, pictures, guidance, references_of(references, pictures, manifest), judge)
    try:
        extra = list(dict.fromkeys(load_plan(name) for name in marked))
    except PlanError as error:
        raise PlanError(str(error).replace("--prune", "--plan", 1)) from error
    depth = manifest.model.depth
    layers = first_layers or tuple(sorted({0, depth // 8, depth // 4, depth // 2}))
    swept = tuning.candidate_plans(fractions or tuning.DEFAULT_FRACTIONS, cache_scales, layers, unguided_from)
    plans = tuning.distinct(swept, extra)
    tuning.check(bundle, [*plans, *extra], pictures)
    rounds = tuning.rounds(len(pictures), len(plans), budget)
    for name in _FILES:
        check_writable(out / name)
        (out / name).unlink(missing_ok=True)  # of an earlier run: it would stand beside this one's
    drawn = sum(len(rows) * (alive + len(extra) + 1) for rows, alive in rounds)
    with counting_bar("sweep", drawn) as progress:
        result = tuning.sweep(study, plans, extra, budget, progress)
    num_front = sum(candidate.on_front or candidate.is_marked for candidate in result.candidates)
    with tempfile.TemporaryDirectory(dir=out) as scratch, counting_bar("front", num_front + 1) as progress:
        result = tuning.measure_front(study, result, Path(scratch), progress)
    least_ssim = (0.9 if judge is None else 0.0) if min_ssim is None else min_ssim
    chosen = tuning.choose(result, min_ssim=least_ssim, max_drop=max_drop, max_loss=max_loss)
    _write(study, result, chosen, out)
    if chosen is None:
        raise PlanError(
            f"no plan keeps SSIM {least_ssim}, the distance within {max_drop:.1%} and compliance within "
            f"{max_loss:.1%}; see {out / 'front.png'}, and allow more with --min-ssim, --max-drop or --max-loss, or "
            "give smaller --fractions"
        )
    click.echo(f"{out / 'plan.json'}: {chosen.plan.name}")


def _write(study: Study, result: Sweep, chosen: Candidate | None, out: Path) -> None:
    """What was found, as a table and as files."""
    from fastvar_trt.tools.measure.tune import plot_front

    click.echo(_front_table(result.candidates, chosen))
    record = {
        "bundle": str(study.bundle),
        "images": len(study.pictures),
        "chosen": None if chosen is None else chosen.plan.name,
        "candidates": [candidate.to_json() for candidate in result.candidates],
    }
    write_text(out / "tune.json", json.dumps(record, indent=1) + "\n")
    if chosen is not None:
        write_text(out / "plan.json", json.dumps(_with_place(chosen, record), indent=1) + "\n")
    plot_front(result, chosen, out / "front.png")


def _with_place(chosen: Candidate, record: Mapping[str, Any]) -> dict[str, Any]:
    """The plan as a plan file, with where it was found to lie."""
    found = chosen.to_json()
    measured = {key: found[key] for key in ("work", "metrics", "compliance", "measured")}
    return {**found["plan"], "measured": {"bundle": record["bundle"], "images": record["images"], **measured}}


def _front_table(candidates: Sequence[Candidate], chosen: Candidate | None) -> str:
    rows: list[list[object]] = []
    for candidate in candidates:
        m = candidate.measured
        if m is None:
            continue
        row = [("* " if chosen is not None and candidate.plan is chosen.plan else "") + candidate.plan.name]
        row += [f"{candidate.work:.3f}", f"{m.speedup:.2f}x", f"{m.mean.psnr_db:.2f}", f"{m.mean.ssim:.4f}"]
        row.append("" if candidate.compliance is None else f"{candidate.compliance.value:.3f}")
        if m.references is None:
            row.append("")
        else:
            row.append(f"{m.references[1].distance / m.references[0].distance - 1:+.2%}")
        rows.append(list(row))
    header = ["plan (* chosen)", "work", "speed-up", "PSNR dB", "SSIM", "compliance", "distance to references"]
    return format_table(header, rows)
