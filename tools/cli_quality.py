"""`fastvar compare` and `fastvar tune`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvar_trt.runtime.command import ErrorCommand, integers, numbers
from fastvar_trt.runtime.errors import BackendError, BundleError, PlanError, RequestError
from fastvar_trt.runtime.manifest import ModelSpec, read_manifest
from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.tools.compare import Comparison, check_comparable, compare, draw_side_by_side, shared_sampling
from fastvar_trt.tools.files import check_writable, write_text
from fastvar_trt.tools.quality import require_libraries
from fastvar_trt.tools.sheets import contact_sheet, error_map, save_image
from fastvar_trt.tools.tables import format_table

_FEW_CLASSES = 16  # all of them are drawn where nothing else is asked for
_PHOTOGRAPHS = "photographs"
_CROPS_PER_CLASS = 32
_TUNE_FILES = ("tune.json", "front.png", "plan.json")
_IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp"}


def _request_options(command: Any) -> Any:
    for option in (
        click.option(
            "--references",
            help="Photographs of the classes: a folder with one sub-folder per class index, or `photographs` for those "
            "of the demo model.",
        ),
        click.option("--cfg", type=float, help="Guidance scale; default: the bundle's."),
        click.option("--seeds", type=click.IntRange(1), default=8, show_default=True, help="Images per class."),
        click.option("--class", "labels", type=int, multiple=True, help="Class index; default: all, if they are few."),
    ):
        command = option(command)
    return command


def _requests(labels: tuple[int, ...], num_seeds: int, model: ModelSpec) -> tuple[list[int], list[int]]:
    """Class and seed of every image."""
    if model.family != "var":
        raise RequestError(f"the bundle is of {model.family}: pictures are compared by class, and it has none")
    if not labels and model.num_classes > _FEW_CLASSES:
        raise click.UsageError(f"the model has {model.num_classes} classes; name some with --class")
    classes = labels or tuple(range(model.num_classes))
    for label in classes:
        if not 0 <= label < model.num_classes:
            raise RequestError(f"class {label}: the bundle has 0 to {model.num_classes - 1}")
    return [label for label in classes for _ in range(num_seeds)], list(range(num_seeds)) * len(classes)


def load_references(source: str, labels: list[int], side: int) -> dict[int, NDArray[Any]]:
    """Photographs of each class, uint8 [M, side, side, 3].

    Args:
        source: a folder with one sub-folder per class index, or `photographs`.
        labels: the classes that are needed.
        side: pixels; the middle square of every photograph is scaled to it.

    Raises:
        RequestError: a class without a readable photograph.
    """
    if source == _PHOTOGRAPHS:
        from fastvar_trt.tools.train_demo.photographs import PHOTOGRAPHS, load_photographs, random_crop

        if max(labels) >= len(PHOTOGRAPHS):
            raise RequestError(f"--references {source}: has classes 0 to {len(PHOTOGRAPHS) - 1}, got {max(labels)}")
        rng = np.random.default_rng(0)
        return {
            label: np.stack([random_crop(image, side, rng) for _ in range(_CROPS_PER_CLASS)])
            for label, image in enumerate(load_photographs())
        }
    references = {}
    for label in dict.fromkeys(labels):
        folder = Path(source) / str(label)
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _IMAGE_FILES) if folder.is_dir() else []
        if not files:
            raise RequestError(f"--references {folder}: no PNG, JPEG or WebP files there; give some of every class")
        try:
            references[label] = np.stack([_middle_square(file, side) for file in files])
        except OSError as error:
            raise RequestError(f"--references {folder}: {error}") from error
    return references


def _middle_square(path: Path, side: int) -> NDArray[Any]:
    with Image.open(path) as image:
        length = min(image.size)
        left, top = ((extent - length) / 2 for extent in image.size)
        box = (left, top, left + length, top + length)
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box))


def _comparison_table(comparison: Comparison) -> str:
    rows: list[list[object]] = [
        [name, count, f"{m.psnr_db:.2f}", f"{m.ssim:.4f}", f"{m.vif:.4f}"]
        for name, count, m in [
            *(
                (f"class {label}", comparison.labels.count(label), comparison.of_class(label))
                for label in dict.fromkeys(comparison.labels)
            ),
            ("all", len(comparison.labels), comparison.mean),
        ]
    ]
    return format_table(["", "images", "PSNR dB", "SSIM", "VIF"], rows)


@click.command(
    "compare",
    cls=ErrorCommand,
    epilog="""
\b
Examples:
  fastvar compare out/dense out/pruned -o out/compare.png
  fastvar compare out/fp32 out/fp16 --class 207 --class 88 --seeds 16 --json out/compare.json
""",
)
@click.argument("bundle_a", type=click.Path(path_type=Path))
@click.argument("bundle_b", type=click.Path(path_type=Path))
@_request_options
@click.option("--greedy", is_flag=True, help="Take the likeliest token instead of drawing (one image per class).")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="PNG: A, B and their error, one row per class.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the JSON line to this file.")
def compare_command(
    bundle_a: Path,
    bundle_b: Path,
    labels: tuple[int, ...],
    seeds: int,
    cfg: float | None,
    references: str | None,
    greedy: bool,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Draw the same classes and seeds with two bundles and measure how the second differs from the first.

    PSNR, SSIM (structure) and VIF (visual information fidelity) of B's pictures against A's; token agreement per scale;
    times, measured in turn. Needs the extra `quality`.
    """
    require_libraries()
    for path in (out, json_file):
        if path is not None:
            check_writable(path)
    with Pipeline.load(bundle_a) as a, Pipeline.load(bundle_b) as b:
        check_comparable(a, b)
        classes, all_seeds = _requests(labels, 1 if greedy else seeds, a.manifest.model)
        known = references and load_references(references, classes, a.manifest.model.image_width)
        with click.progressbar(length=len(classes), label="drawing", width=24) as bar:
            options = {**shared_sampling([a, b], cfg), "greedy": greedy}
            ours, theirs = draw_side_by_side([a, b], classes, all_seeds, options, bar.update)
    comparison = compare(ours, theirs, classes, all_seeds, known or None)
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
    line = json.dumps({"a": str(bundle_a), "b": str(bundle_b), **comparison.to_json()})
    click.echo(line)
    if json_file is not None:
        write_text(json_file, line + "\n")
    if out is not None:
        firsts = [classes.index(label) for label in dict.fromkeys(classes)]
        save_image(
            contact_sheet(
                [
                    f"{bundle_a.name}: {comparison.seconds[0]:.2f} s",
                    f"{bundle_b.name}: {comparison.seconds[1]:.2f} s ({comparison.speedup:.2f}x)",
                    "error x 4",
                ],
                [
                    (
                        f"class {classes[i]}, seed {all_seeds[i]}: PSNR {comparison.per_image[i].psnr_db:.1f} dB, "
                        f"SSIM {comparison.per_image[i].ssim:.3f}",
                        [x := ours.images[i], y := theirs.images[i], error_map(x, y)],
                    )
                    for i in firsts
                ],
            ),
            out,
        )


@click.command(
    "tune",
    cls=ErrorCommand,
    epilog="""
\b
Examples:
  fastvar tune out/demo --references photographs --out out/tune
  fastvar tune out/d16 --class 207 --class 88 --fractions 0.4,0.5 --fractions 0.5,0.75 --out out/tune
""",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@_request_options
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of plan.json, front.png, tune.json."
)
@click.option(
    "--fractions", type=numbers(), multiple=True, help="Pruned fractions of the last scales, in order; repeat for more."
)
@click.option("--cache-scales", type=integers(), default="-2,-3,-4", show_default=True, help="From the end: -N,-N,...")
@click.option("--first-layers", type=integers(), help="First pruned layers; default: 0, 1/8, 1/4 and 1/2 of the depth.")
@click.option("--min-ssim", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="Of the chosen plan.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    default=0.05,
    show_default=True,
    help="Relative rise of the distance to the references that the chosen plan may have.",
)
def tune_command(
    bundle: Path,
    labels: tuple[int, ...],
    seeds: int,
    cfg: float | None,
    references: str | None,
    out: Path,
    fractions: tuple[tuple[float, ...], ...],
    cache_scales: tuple[int, ...],
    first_layers: tuple[int, ...] | None,
    min_ssim: float,
    max_drop: float,
) -> None:
    """Choose a pruning plan by measurement: sweep pruned fraction, cache scale and first pruned layer.

    Every candidate's pictures are compared with the dense ones; those that nothing beats in both work and SSIM are
    exported and timed beside the dense chain. Needs the extras `export` and `quality`.
    """
    require_libraries()
    try:
        from fastvar_trt.tools import tune
    except ImportError as error:
        raise BackendError(f"{error.name} is not installed; pip install 'fastvar-trt[export,cpu,quality]'") from error
    manifest = read_manifest(bundle)
    if manifest.precision != "fp32":
        raise BundleError(
            f"bundle {bundle}: precision: got {manifest.precision}, expected fp32: plans are judged on the CPU; export "
            "with --precision fp32 (the plan fits every precision)"
        )
    depth = manifest.model.depth
    layers = first_layers or tuple(sorted({0, depth // 8, depth // 4, depth // 2}))
    classes, all_seeds = _requests(labels, seeds, manifest.model)
    guidance = manifest.sampling.cfg if cfg is None else cfg
    plans = tune.candidate_plans(fractions or tune.DEFAULT_FRACTIONS, cache_scales, layers)
    known = load_references(references, classes, manifest.model.image_width) if references else None
    for name in _TUNE_FILES:
        check_writable(out / name)
        (out / name).unlink(missing_ok=True)  # of an earlier run: it would stand beside this one's
    with click.progressbar(length=(len(plans) + 1) * len(classes), label="sweep", width=24) as bar:
        result = tune.sweep(bundle, plans, classes, all_seeds, guidance, known, bar.update)
    num_front = sum(candidate.on_front for candidate in result.candidates)
    with (
        tempfile.TemporaryDirectory(dir=out) as scratch,
        click.progressbar(length=num_front + 1, label="front", width=24) as bar,
    ):
        result = tune.measure_front(bundle, result, Path(scratch), classes, all_seeds, guidance, known, bar.update)
    chosen = tune.choose(result, min_ssim=min_ssim, max_drop=max_drop)
    click.echo(_front_table(result.candidates, chosen))
    record = {
        "bundle": str(bundle),
        "images": len(classes),
        "chosen": None if chosen is None else chosen.plan.name,
        "candidates": [candidate.to_json() for candidate in result.candidates],
    }
    write_text(out / "tune.json", json.dumps(record, indent=1) + "\n")
    tune.plot_front(result, chosen, out / "front.png")
    if chosen is None:
        raise PlanError(
            f"no plan keeps SSIM {min_ssim} and the distance within {max_drop:.1%}; see {out / 'front.png'}, and allow "
            "more with --min-ssim or --max-drop, or give smaller --fractions"
        )
    write_text(out / "plan.json", json.dumps(chosen.plan.to_json(), indent=1) + "\n")
    click.echo(f"{out / 'plan.json'}: {chosen.plan.name}")


def _front_table(candidates: Any, chosen: Any) -> str:
    rows: list[list[object]] = []
    for candidate in candidates:
        m = candidate.measured
        if m is None:
            continue
        row = [("* " if chosen is not None and candidate.plan is chosen.plan else "") + candidate.plan.name]
        row += [f"{candidate.work:.3f}", f"{m.speedup:.2f}x", f"{m.mean.psnr_db:.2f}", f"{m.mean.ssim:.4f}"]
        if m.references is None:
            row.append("")
        else:
            row.append(f"{m.references[1].distance / m.references[0].distance - 1:+.2%}")
        rows.append(list(row))
    header = ["plan (* chosen)", "work", "speed-up", "PSNR dB", "SSIM", "distance to references"]
    return format_table(header, rows)
