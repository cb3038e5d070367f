"""`fastvar compare`."""

from __future__ import annotations

from pathlib import Path

import click

from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.tools.cli.command import ErrorCommand, counting_bar, examples
from fastvar_trt.tools.cli.pictures import (
    echo_json,
    json_option,
    picture_requests,
    references_of,
    request_options,
    subject_name,
    vif_option,
)
from fastvar_trt.tools.files import check_writable
from fastvar_trt.tools.measure.compare import Comparison, check_comparable, draw_side_by_side, shared_sampling
from fastvar_trt.tools.measure.compare import compare as measure
from fastvar_trt.tools.measure.quality import require_libraries
from fastvar_trt.tools.sheets import contact_sheet, error_map, save_image
from fastvar_trt.tools.tables import format_table


def _comparison_table(comparison: Comparison) -> str:
    subjects = comparison.pictures.subjects
    rows: list[list[object]] = [
        [name, count, *m.texts()]
        for name, count, m in [
            *(
                (subject_name(subject), subjects.count(subject), comparison.of_subject(subject))
                for subject in dict.fromkeys(subjects)
            ),
            ("all", len(subjects), comparison.mean),
        ]
    ]
    return format_table(["", "images", "PSNR dB", "SSIM", "VIF"], rows)


@click.command(
    cls=ErrorCommand,
    short_help="Measure how the pictures of two bundles differ.",
    epilog=examples(
        "fastvar compare out/dense out/pruned -o out/compare.png",
        "fastvar compare out/fp32 out/fp16 --class 207 --class 88 --seeds 16 --json out/compare.json",
    ),
)
@click.argument("bundle_a", type=click.Path(path_type=Path))
@click.argument("bundle_b", type=click.Path(path_type=Path))
@request_options
@click.option(
    "--greedy", is_flag=True, help="Take the likeliest token instead of drawing (one image per class or prompt)."
)
@vif_option
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="PNG: A, B and their error, one row per class or prompt."
)
@json_option
def compare(
    bundle_a: Path,
    bundle_b: Path,
    labels: tuple[int, ...],
    prompts: tuple[str, ...],
    seeds: int | None,
    cfg: float | None,
    references: Path | None,
    greedy: bool,
    vif: bool,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Draw the same classes or prompts and seeds with two bundles and measure how the second differs from the first.

    PSNR, SSIM (structure) and VIF (visual information fidelity) of B's pictures against A's; token agreement per scale;
    times, measured in turn. Needs the extra `quality`.
    """
    if greedy and seeds is not None:
        raise click.UsageError("give one of --greedy and --seeds: the likeliest tokens are the same with every seed")
    require_libraries()
    check_writable(out, json_file)
    with Pipeline.load(bundle_a) as a, Pipeline.load(bundle_b) as b:
        check_comparable(a, b)
        pictures = picture_requests(bundle_a, labels, prompts, 1 if greedy else seeds, a.manifest)
        known = references_of(references, pictures, a.manifest)
        with counting_bar("drawing", len(pictures)) as progress:
            options = {**shared_sampling([a, b], cfg), "greedy": greedy}
            ours, theirs = draw_side_by_side([a, b], pictures, options, progress)
    comparison = measure(ours, theirs, pictures, known, vif=vif)
    click.echo(_comparison_table(comparison))
    agreement = [[k, f"{value:.2%}"] for k, value in comparison.token_agreement.items()]
    click.echo("\n" + format_table(["scale", "tokens equal"], agreement))
    click.echo(
        f"\nA {comparison.seconds[0]:.3f} s, B {comparison.seconds[1]:.3f} s per call: B is {comparison.speedup:.2f}x "
        "as fast as A"
    )
    if comparison.references is not None:
        for name, metrics in zip("AB", comparison.references, strict=True):
            click.echo(
                f"{name}: distance to the nearest photograph of its class {metrics.distance:.4f}, nearest to its own "
                f"class {metrics.accuracy:.1%}"
            )
    if out is not None:
        subjects = pictures.subjects
        firsts = [subjects.index(subject) for subject in dict.fromkeys(subjects)]
        save_image(
            contact_sheet(
                [
                    f"{bundle_a.name}: {comparison.seconds[0]:.2f} s",
                    f"{bundle_b.name}: {comparison.seconds[1]:.2f} s ({comparison.speedup:.2f}x)",
                    "error x 4",
                ],
                [
                    (
                        f"{subject_name(subjects[i])}, seed {pictures.seeds[i]}: "
                        f"PSNR {comparison.per_image[i].psnr_db:.1f} dB, SSIM {comparison.per_image[i].ssim:.3f}",
                        [x := ours.images[i], y := theirs.images[i], error_map(x, y)],
                    )
                    for i in firsts
                ],
            ),
            out,
        )
        click.echo(f"{out}: a picture of each subject, and the errors")
    echo_json({"a": str(bundle_a), "b": str(bundle_b), **comparison.to_json()}, json_file)
