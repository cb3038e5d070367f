"""`fastvar evaluate`."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path

import click
from PIL import Image

from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.tools.cli.command import ErrorCommand, RuntimeOptions, counting_bar, examples, runtime_options
from fastvar_trt.tools.cli.pictures import (
    cfg_option,
    check_takes_prompts,
    echo_json,
    json_option,
    judge_of,
    judge_options,
    vif_option,
)
from fastvar_trt.tools.files import check_writable
from fastvar_trt.tools.measure.compare import check_comparable, shared_sampling
from fastvar_trt.tools.measure.evaluate import ALL, Evaluation
from fastvar_trt.tools.measure.evaluate import evaluate as measure
from fastvar_trt.tools.measure.quality import mean_metrics, require_libraries
from fastvar_trt.tools.sheets import contact_sheet, save_image
from fastvar_trt.tools.tables import format_table

_ON_SHEET = 8


@click.command(
    cls=ErrorCommand,
    short_help="Say whether pictures show what their prompts say.",
    epilog=examples(
        "fastvar evaluate out/demo_dense out/demo_pruned --scenes 300 -o out/evaluation.png",
        "fastvar evaluate out/dense out/pruned --prompts evaluation_metadata.jsonl --checker my_geneval:check",
    ),
)
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@judge_options
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Prompt i gets seed + i.")
@cfg_option
@vif_option
@click.option("-o", "--out", type=click.Path(path_type=Path), help="PNG: the first pictures of every bundle.")
@json_option
@runtime_options
def evaluate(
    bundles: tuple[Path, ...],
    num_scenes: int | None,
    held_out: bool | None,
    prompts_file: Path | None,
    checker: str | None,
    seed: int,
    cfg: float | None,
    vif: bool,
    out: Path | None,
    json_file: Path | None,
    runtime: RuntimeOptions,
) -> None:
    """Whether pictures show what their prompts say, for one or more bundles of one model.

    Compliance per category with its 95 % interval; PSNR, SSIM and VIF against the first bundle, and how many prompts
    only one of the two complies with; time per scale, measured in turn. Needs the extras `quality` and `text`.
    """
    require_libraries()
    judge = judge_of(num_scenes, held_out, prompts_file, checker, seed)
    if judge is None:
        raise click.UsageError("give one of --scenes and --prompts")
    check_writable(out, json_file)
    with contextlib.ExitStack() as stack:
        pipelines = [stack.enter_context(runtime.load(bundle)) for bundle in bundles]
        _check_bundles(pipelines)
        options = shared_sampling(pipelines, cfg)
        with counting_bar("drawing", len(judge.cases)) as progress:
            result = measure(pipelines, judge, options, vif=vif, num_samples=_ON_SHEET, progress=progress)
    names = [bundle.name for bundle in bundles]
    click.echo(_compliance_table(result, names))
    if len(bundles) > 1:
        click.echo("\n" + _likeness_table(result, names))
    click.echo("\n" + _time_table(result, names))
    if out is not None:
        save_image(_sheet(result, names), out)
        click.echo(f"\n{out}: the first {len(result.samples[0])} prompts, and which categories fail")
    echo_json(result.to_json(), json_file)


def _check_bundles(pipelines: list[Pipeline]) -> None:
    for pipe in pipelines:
        check_takes_prompts(pipe.manifest, pipe.bundle)
        check_comparable(pipelines[0], pipe)


def _compliance_table(result: Evaluation, names: list[str]) -> str:
    rows: list[list[object]] = []
    for tag in (*(result.tags if len(result.tags) > 1 else ()), ALL):
        for category in result.categories:
            shares = [result.share(i, category, tag) for i in range(len(names))]
            count = max((share.count for share in shares if share is not None), default=0)
            if count:
                rows.append([tag, category, count, *(share or "-" for share in shares)])
    return format_table(["prompts", "category", "count", *names], rows)


def _likeness_table(result: Evaluation, names: list[str]) -> str:
    rows = [
        [names[i], *mean_metrics(result.results[i].metrics).texts(), *result.only_one_complies(i)]
        for i in range(1, len(names))
    ]
    return format_table(
        [f"against {names[0]}", "PSNR dB", "SSIM", "VIF", "only this complies", f"only {names[0]}"], rows
    )


def _time_table(result: Evaluation, names: list[str]) -> str:
    """Median ms per graph, and what they sum to; `-` where a plan skips a scale."""
    graphs = dict.fromkeys(name for own in result.results for name in own.step_ms)
    rows: list[list[object]] = [
        [graph, *(f"{own.step_ms[graph]:.1f}" if graph in own.step_ms else "-" for own in result.results)]
        for graph in graphs
    ]
    rows.append(["all steps", *(f"{own.steps_ms:.1f}" for own in result.results)])
    rows.append(["whole call", *(f"{1e3 * statistics.median(own.seconds):.1f}" for own in result.results)])
    for title, place in (("speed-up of the steps", 0), ("speed-up of the call", 1)):
        rows.append([title, *(f"{result.speedup(i)[place]:.2f}x" for i in range(len(names)))])
    return format_table(["median ms", *names], rows)


def _sheet(result: Evaluation, names: list[str]) -> Image.Image:
    titles = [
        f"{name}: {statistics.median(own.seconds):.2f} s" for name, own in zip(names, result.results, strict=True)
    ]
    rows = []
    for i in range(len(result.samples[0])):
        failed = [(name, result.failed(j, i)) for j, name in enumerate(names)]
        told = "".join(f" ({name} fails: {', '.join(own)})" for name, own in failed if own)
        rows.append((result.cases[i].prompt + told, [samples[i] for samples in result.samples]))
    return contact_sheet(titles, rows, result.samples[0].shape[2])
