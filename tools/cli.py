"""`fastvar`: everything that is done with a bundle. Needs neither torch nor onnx, but for `build`."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import click
import numpy as np
from PIL import Image

from fastvar_trt.runtime.command import ErrorCommand, RuntimeOptions, numbers, runtime_options
from fastvar_trt.runtime.engines import EngineRecord, read_engines
from fastvar_trt.runtime.errors import BackendError, BundleError, RequestError
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, Manifest, check_files, read_manifest
from fastvar_trt.runtime.pipeline import GenerationResult
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.serving.cli import serve_command
from fastvar_trt.tools.cli_profile import profile_command
from fastvar_trt.tools.cli_quality import compare_command, tune_command
from fastvar_trt.tools.files import check_writable, replacing
from fastvar_trt.tools.sheets import save_image
from fastvar_trt.tools.tables import format_table
from fastvar_trt.tools.work import activation_bytes, output_bytes

_FLAVOURS = ("tensorrt_rtx", "tensorrt", "onnxruntime_cuda")
_BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))


class _Group(click.Group):
    command_class = ErrorCommand


@click.group(cls=_Group)
@click.version_option(package_name="fastvar-trt")
def main() -> None:
    """Run, check and build exported bundles (make one with fastvar-export)."""


main.add_command(compare_command)
main.add_command(tune_command)
main.add_command(profile_command)
main.add_command(serve_command)


@main.command(
    epilog="""
\b
Examples:
  fastvar generate out/b --class 207 --class 88 --seed 1 -o out/dogs.png
  fastvar generate out/b --class 3 --cfg 4 --top-k 900 --top-p 0.96 -o out/3.png
  fastvar generate out/b --class 3 --greedy --save-tokens out/t.npz -o out/3.png
  fastvar generate out/infinity --prompt "a fox in the snow" --cfg 4 --temperature 0.5 -o out/fox.png
"""
)
@_BUNDLE
@click.option("--class", "labels", type=int, multiple=True, help="Class index; repeat for more images.")
@click.option("--prompt", "prompts", multiple=True, help="Text; repeat for more images.")
@click.option("--negative-prompt", "negative_prompts", multiple=True, help="One for all images, or one each.")
@click.option(
    "--text-features",
    type=click.Path(path_type=Path),
    help="In place of prompts: NPZ with the text encoder's features, arrays 0, 1, ... [tokens, width].",
)
@click.option("--h-div-w", type=float, help="Height over width that the bundle must hold.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Image i is drawn with seed + i.")
@click.option("--cfg", type=numbers(), help="Guidance scale, or one per scale: N,N,...; default: the bundle's.")
@click.option("--temperature", type=numbers(), help="Divides the logits (tau), or one per scale.")
@click.option("--top-k", type=int, help="Draw from the K likeliest tokens; default: the bundle's.")
@click.option(
    "--top-p", type=float, help="Draw from the likeliest tokens of this total probability; default: the bundle's."
)
@click.option("--greedy", is_flag=True, help="Take the likeliest token instead of drawing.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="PNG; several images make a grid.")
@click.option("--save-tokens", type=click.Path(path_type=Path), help="NPZ with step_00, ..., f_hat and image.")
@runtime_options
def generate(
    bundle: Path,
    labels: tuple[int, ...],
    prompts: tuple[str, ...],
    negative_prompts: tuple[str, ...],
    text_features: Path | None,
    h_div_w: float | None,
    seed: int,
    cfg: tuple[float, ...] | None,
    temperature: tuple[float, ...] | None,
    top_k: int | None,
    top_p: float | None,
    greedy: bool,
    out: Path,
    save_tokens: Path | None,
    runtime: RuntimeOptions,
) -> None:
    """Draw images of the given classes or texts."""
    if sum((bool(labels), bool(prompts), text_features is not None)) != 1:
        raise click.UsageError("give --class, --prompt or --text-features")
    if negative_prompts and not prompts:
        raise click.UsageError("--negative-prompt needs --prompt")
    for path in (out, save_tokens):
        if path is not None:
            check_writable(path)
    with runtime.load(bundle) as pipe:
        result = pipe.generate(
            labels or None,
            prompts=prompts or None,
            negative_prompts=negative_prompts * (len(prompts) if len(negative_prompts) == 1 else 1) or None,
            text_features=None if text_features is None else _read_features(text_features),
            h_div_w=h_div_w,
            seeds=seed,
            cfg=_per_scale(cfg),
            temperature=_per_scale(temperature),
            top_k=top_k,
            top_p=top_p,
            greedy=greedy,
            return_float_images=save_tokens is not None,
        )
        manifest = pipe.manifest
    save_png(result, out)
    if save_tokens is not None:
        _save_tokens(result, manifest, save_tokens)
    click.echo(_timing_table(result, manifest))
    total = sum(result.timings.values())
    click.echo(
        json.dumps(
            {
                "images": len(result.images),
                "total_ms": round(total, 1),
                "timings_ms": {name: round(ms, 2) for name, ms in result.timings.items()},
                "out": str(out),
            }
        )
    )


def _per_scale(values: tuple[float, ...] | None) -> float | Any:
    """One value, or an array [1, scales]."""
    if values is None:
        return None
    return values[0] if len(values) == 1 else np.array([values], dtype=np.float32)


def _read_features(path: Path) -> list[Any]:
    """The arrays `0`, `1`, ... of an NPZ."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = dict(data)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise RequestError(f"--text-features {path}: not a readable NPZ: {error}") from error
    expected = [str(i) for i in range(len(arrays))]
    if not arrays or set(arrays) != set(expected):
        raise RequestError(f"--text-features {path}: got the arrays {', '.join(arrays)}, expected 0, 1, ...")
    return [arrays[name] for name in expected]


def save_png(result: GenerationResult, path: Path) -> None:
    """All images as one PNG, row by row in a near-square grid."""
    count, height, width, _ = result.images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
    for i, image in enumerate(result.images):
        y, x = i // columns * height, i % columns * width
        grid[y : y + height, x : x + width] = image
    save_image(Image.fromarray(grid), path)


def _save_tokens(result: GenerationResult, manifest: Manifest, path: Path) -> None:
    arrays = {f"step_{k:02d}": tokens for k, tokens in zip(manifest.resolved_plan.steps, result.tokens, strict=True)}
    assert result.float_images is not None
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays, f_hat=result.f_hat, image=result.float_images)


def _timing_table(result: GenerationResult, manifest: Manifest) -> str:
    plan = manifest.resolved_plan
    rows: list[list[object]] = []
    total = sum(result.timings.values())
    for k, (height, width) in enumerate(manifest.schedule):
        layers = f"{plan.first_layer}-{plan.last_layer}" if plan.is_pruned(k) else ""
        ms = result.timings.get(f"step_{k:02d}")
        rows.append(
            [k, f"{height}x{width}", f"{plan.num_kept[k]}/{height * width}", layers]
            + (["skipped", ""] if ms is None else [f"{ms:.1f}", f"{ms / total:.1%}"])
        )
    for name in ("condition", "decoder"):
        rows.append([name, "", "", "", f"{result.timings[name]:.1f}", f"{result.timings[name] / total:.1%}"])
    rows.append(["total", "", "", "", f"{total:.1f}", ""])
    return format_table(["scale", "map", "tokens kept", "pruned layers", "ms", "share"], rows)


@main.command(
    epilog="""
\b
Examples:
  fastvar verify out/b
  fastvar verify out/b --engines require
"""
)
@_BUNDLE
@runtime_options
def verify(bundle: Path, runtime: RuntimeOptions) -> None:
    """Check every file's hash, then draw the images that PyTorch drew at export and compare."""
    with runtime.load(bundle) as pipe:
        outcome = verify_bundle(pipe)
        num_files = len(pipe.manifest.files)

    def show(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    rows = [
        [
            s.batch,
            s.scale,
            s.num_images,
            show(s.token_agreement, ".2%"),
            show(s.logits_error, ".2g"),
            show(s.relative_error, ".2g"),
            show(s.positions_off, ".1%"),
        ]
        for s in outcome.steps
    ]
    click.echo(
        format_table(
            ["batch", "scale", "images compared", "tokens equal", "max logits error", "relative", "positions off"], rows
        )
    )
    click.echo(
        f"{num_files} files match the manifest; {outcome.num_images_equal} of {outcome.num_images} images have "
        f"PyTorch's tokens, max image error {show(outcome.image_error, '.2g')}"
    )
    click.echo(json.dumps(dataclasses.asdict(outcome)))
    if outcome.failures:
        raise BundleError(f"bundle {bundle} does not compute what PyTorch computed: {'; '.join(outcome.failures)}")


@main.command(
    epilog="""
\b
Examples:
  fastvar inspect out/b
  fastvar inspect out/b --tensors
  fastvar inspect out/b --json
"""
)
@_BUNDLE
@click.option("--tensors", is_flag=True, help="List the inputs and outputs of every graph.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON and nothing else.")
def inspect(bundle: Path, tensors: bool, as_json: bool) -> None:
    """Show what a bundle holds."""
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=False)
    if as_json:
        click.echo(json.dumps(manifest.to_json(), indent=1))
        return
    model, plan = manifest.model, manifest.resolved_plan
    click.echo(
        f"{model.family}, {model.depth} layers x {model.width}, {model.num_heads} heads, {_conditions(manifest)}, "
        f"{model.image_width}x{model.image_height} pixels, {manifest.precision}, "
        f"batch {', '.join(map(str, manifest.batches))}"
    )
    click.echo(
        f"plan {manifest.plan.name}"
        + (
            ""
            if plan.cache_scale is None
            else f": cache of scale {plan.cache_scale}, layers {plan.first_layer} to {plan.last_layer}"
        )
    )
    rows = [
        [k, f"{h}x{w}", h * w, plan.num_kept[k] or "skipped", *(plan.num_past(k, i) for i in (0, model.depth - 1))]
        for k, (h, w) in enumerate(manifest.schedule)
    ]
    click.echo("\n" + format_table(["scale", "map", "tokens", "kept", "past keys, first layer", "last layer"], rows))
    memory = _memory_rows(manifest)
    click.echo("\n" + format_table(["memory, batch", *[str(b) for b in manifest.batches]], memory))
    files = [[name, f"{spec.num_bytes / 2**20:.2f}", spec.sha256[:12]] for name, spec in manifest.files.items()]
    click.echo("\n" + format_table(["file", "MiB", "SHA-256"], files))
    for flavour in _FLAVOURS:
        records = read_engines(bundle, flavour)
        if records:
            click.echo("\n" + _engine_table(flavour, list(records.values())))
    if tensors:
        for graph in manifest.graphs:
            click.echo(f"\n{graph.file}")
            lines = [
                [way, t.name, t.dtype, list(t.shape)]
                for way, ts in (("in", graph.inputs), ("out", graph.outputs))
                for t in ts
            ]
            click.echo(format_table(["", "tensor", "dtype", "shape"], lines))


def _conditions(manifest: Manifest) -> str:
    model = manifest.model
    if model.family == "var":
        return f"{model.num_classes} classes, vocabulary {model.vocab_size}"
    what = "text features" if manifest.text_encoder is None else "prompts"
    return f"{what} of up to {model.text_length} tokens, {model.vocab_size // 2} bits per token"


def _engine_table(flavour: str, records: list[EngineRecord]) -> str:
    rows: list[list[object]] = [
        [
            r.file,
            f"{r.content.num_bytes / 2**20:.2f}",
            r.version,
            ", ".join(r.targets),
            len(r.weights),
            *(r.kernels.get(kind, "-") for kind in ("total", "attention", "gemm_bias_gelu")),
        ]
        for r in records
    ]
    total = sum(r.content.num_bytes for r in records) / 2**20
    header = [f"{flavour} engine", "MiB", "version", "targets", "weights bound", "kernels", "attention"]
    return format_table([*header, "gemm+bias+gelu"], [*rows, ["all", f"{total:.2f}", "", "", "", "", "", ""]])


def _memory_rows(manifest: Manifest) -> list[list[object]]:
    """What the runtime holds, MiB per batch size."""

    columns = [
        {
            "weights": manifest.files[WEIGHTS_FILE].num_bytes,
            "keys and values": output_bytes(manifest, batch, "new_k_", "new_v_"),
            "token cache": output_bytes(manifest, batch, "cache_"),
            "modulations": output_bytes(manifest, batch, "modulation_", "head_modulation"),
            "keys and values of the text": output_bytes(manifest, batch, "text_k_", "text_v_"),
            "activations, estimated": activation_bytes(manifest, batch),
        }
        for batch in manifest.batches
    ]
    rows: list[list[object]] = [
        [name, *[f"{column[name] / 2**20:.2f} MiB" for column in columns]] for name in columns[0]
    ]
    return [*rows, ["all", *[f"{sum(column.values()) / 2**20:.2f} MiB" for column in columns]]]


@main.command(
    epilog="""
\b
Examples:
  fastvar build out/b --target cpu
  fastvar build out/b --target sm86,sm89,sm120
  fastvar build out/b --target current
"""
)
@_BUNDLE
@click.option("--target", "targets", required=True, metavar="T,T,...", help="cpu, cuda, sm75 ... sm121, or current.")
def build(bundle: Path, targets: str) -> None:
    """Build what targets need beyond the graphs.

    cpu: weights prepacked for this processor. cuda: graphs for ONNX Runtime's CUDA provider. sm75, sm80, sm86, sm89,
    sm120, sm121: engines of TensorRT for RTX, built without a GPU (extra `rtx`). current: engines of enterprise
    TensorRT for this machine's GPU (extra `tensorrt`). All need the extra `export`. Only what is missing or stale is
    built.
    """
    try:
        from fastvar_trt.export.targets import build_targets
    except ImportError as error:
        raise BackendError(f"{error.name} is not installed; pip install 'fastvar-trt[export,cpu]'") from error
    for line in build_targets(bundle, targets):
        click.echo(line)
