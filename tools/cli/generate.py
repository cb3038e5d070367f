"""`fastvar generate` and `fastvar edit`."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import click
import numpy as np
from PIL import Image

from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.manifest import STEP, Condition, Manifest, Variant, graph_name
from fastvar_trt.runtime.pictures import (
    check_same_size,
    drawing_text,
    fitted,
    fitted_mask,
    is_transparent,
    png_text,
    read_picture,
)
from fastvar_trt.runtime.pipeline import GenerationResult
from fastvar_trt.runtime.request import GRAPH_INPUTS, TABLE, Parameter
from fastvar_trt.tools.cli.command import BUNDLE, ErrorCommand, RuntimeOptions, examples, numbers, runtime_options
from fastvar_trt.tools.files import check_writable, replacing
from fastvar_trt.tools.sheets import save_image
from fastvar_trt.tools.tables import format_table


def _value_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for every run-time value of a request."""
    for parameter in reversed(list(GRAPH_INPUTS.values())):
        command = _value_option(parameter)(command)
    return command


def _value_option(parameter: Parameter) -> Callable[..., Any]:
    flag, text = f"--{parameter.name.replace('_', '-')}", parameter.description
    if parameter.kind == "boolean":
        return click.option(flag, is_flag=True, help=text)
    if parameter.per_scale:
        return click.option(flag, type=numbers(), help=f"{text} One value, or one per scale: N,N,...")
    return click.option(flag, type={"integer": int, "number": float}[parameter.kind], help=text)


def _drawing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of what is drawn, with what and where to; the command gets them all."""
    for option in reversed(
        (
            click.option("--class", "labels", type=int, multiple=True, help="Class index; repeat for more images."),
            click.option("--prompt", "prompts", multiple=True, help="Text; repeat for more images."),
            click.option(
                "--negative-prompt", "negative_prompts", multiple=True, help="One for all images, or one each."
            ),
            click.option(
                "--text-features",
                type=click.Path(path_type=Path),
                help="In place of prompts: NPZ with the text encoder's features, arrays 0, 1, ... [tokens, width]; "
                "and, where padding is read, an array `tokens`: how many of each are no padding.",
            ),
            click.option("--size", metavar="WxH", help="Pixels; a size that the bundle holds. Default: its first."),
            click.option("--h-div-w", type=float, help="Height over width, in place of a size."),
            click.option(
                "--seed",
                type=click.IntRange(0),
                default=TABLE["seed"].minimum,
                show_default=True,
                help="Image i gets seed + i.",
            ),
            _value_options,
            click.option(
                "-o",
                "--out",
                type=click.Path(path_type=Path),
                required=True,
                help="PNG, which says in its text how it was drawn; several images make a grid.",
            ),
            click.option(
                "--save-tokens", type=click.Path(path_type=Path), help="NPZ with step_00, ..., f_hat and image."
            ),
            runtime_options,
        )
    ):
        command = option(command)
    return command


@click.command(
    cls=ErrorCommand,
    epilog=examples(
        "fastvar generate out/b --class 207 --class 88 --seed 1 -o out/dogs.png",
        "fastvar generate out/b --class 3 --cfg 4 --top-k 900 --top-p 0.96 -o out/3.png",
        "fastvar generate out/b --class 3 --greedy --save-tokens out/t.npz -o out/3.png",
        'fastvar generate out/infinity --prompt "a fox in the snow" --size 1344x768 --cfg 4 -o out/fox.png',
    ),
)
@BUNDLE
@_drawing_options
def generate(**options: Any) -> None:
    """Draw images of the given classes or texts. What is left out takes the bundle's default."""
    _draw(**options)


@click.command(
    cls=ErrorCommand,
    short_help="Draw a picture anew, in part or from a scale on.",
    epilog=examples(
        'fastvar edit out/scenes --image in.png --mask mask.png --prompt "a red sphere on sand" -o out/edited.png',
        'fastvar edit out/scenes --image small.png --keep-scales 9 --prompt "two cubes on grass" -o out/large.png',
    ),
)
@BUNDLE
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    required=True,
    help="The picture, of any size and kind that Pillow reads; it is scaled to cover what is drawn, its middle taken.",
)
@click.option(
    "--mask",
    type=click.Path(path_type=Path),
    help="Where it is drawn anew: the light parts of a picture of the same size, or its transparent ones, if any.",
)
@click.option(
    "--keep-scales", type=click.IntRange(1), help="How many of the first scales are the picture's everywhere."
)
@click.option(
    "--paste/--no-paste", default=True, show_default=True, help="Outside of the mask, the picture's own pixels."
)
@_drawing_options
def edit(image: Path, mask: Path | None, keep_scales: int | None, paste: bool, **options: Any) -> None:
    """Draw a picture anew, in part (--mask) or from a scale on (--keep-scales): in-painting, variations, larger ones.

    The bundle needs an image encoder (`fastvar-export ... --with-encoder`).
    """
    picture = read_picture(image, "--image")
    own = None if mask is None else read_picture(mask, "--mask")
    if own is None and keep_scales is None and not is_transparent(picture):
        raise click.UsageError("give --mask, --keep-scales, or a picture that is transparent where it is to be drawn")
    if own is not None:
        check_same_size(picture, own)
    elif is_transparent(picture) and keep_scales is None:
        own = picture

    def pictures(variant: Variant) -> dict[str, Any]:
        size = variant.image_width, variant.image_height
        fitted_own = None if own is None else fitted_mask(own, *size)
        return {"image": fitted(picture, *size), "mask": fitted_own, "keep_scales": keep_scales, "paste": paste}

    _draw(**options, pictures=pictures)


def _draw(
    *,
    bundle: Path,
    labels: tuple[int, ...],
    prompts: tuple[str, ...],
    negative_prompts: tuple[str, ...],
    text_features: Path | None,
    size: str | None,
    h_div_w: float | None,
    seed: int,
    out: Path,
    save_tokens: Path | None,
    runtime: RuntimeOptions,
    pictures: Callable[[Variant], dict[str, Any]] | None = None,
    **values: Any,
) -> None:
    """Draw, write, and say how long it took."""
    if sum((bool(labels), bool(prompts), text_features is not None)) != 1:
        raise click.UsageError("give --class, --prompt or --text-features")
    if negative_prompts and not prompts:
        raise click.UsageError("--negative-prompt needs --prompt")
    check_writable(out, save_tokens)
    if out.suffix.lower() != ".png":
        raise click.UsageError(f"--out: got {out.name}, expected a name that ends in .png")
    values = {k: v[0] if isinstance(v, tuple) and len(v) == 1 else v for k, v in values.items()}
    sampling: dict[str, Any] = {  # what is given per scale: an array [1, scales]
        k: np.array([v], dtype=np.float32) if isinstance(v, tuple) else v for k, v in values.items()
    }
    with runtime.load(bundle) as pipe:
        manifest, variant = pipe.manifest, pipe.variant(h_div_w=h_div_w, size=size)
        draws_text = manifest.model.condition is Condition.TEXT
        if labels and draws_text:
            raise RequestError(f"--class: bundle {bundle} draws from text; give --prompt")
        if prompts and not draws_text:
            raise RequestError(f"--prompt: bundle {bundle} draws classes; give --class")
        conditions = {
            "labels": labels or None,
            "prompts": prompts or None,
            "negative_prompts": negative_prompts * (len(prompts) if len(negative_prompts) == 1 else 1) or None,
            **({} if text_features is None else _read_features(text_features)),
        }
        edited = {} if pictures is None else pictures(variant)
        result = pipe.generate(
            **conditions,
            variant=variant.name,
            seeds=seed,
            return_float_images=save_tokens is not None,
            **edited,
            **sampling,
        )
    for i, warnings in enumerate(result.warnings):
        for warning in warnings:
            click.echo(f"warning: image {i}: {warning}", err=True)
    drawn = {
        name: value
        for name, value in {**conditions, **values, **edited}.items()
        if isinstance(value, str | int | float | tuple)  # pictures and features are too much for a text
    }
    save_png(result, out, drawing_text(manifest, variant, {**drawn, "seed": seed, "edited": bool(edited)}))
    if save_tokens is not None:
        _save_tokens(result, variant, save_tokens)
    click.echo(_timing_table(result, manifest, variant))
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


def _read_features(path: Path) -> dict[str, Any]:
    """The arrays `0`, `1`, ... of an NPZ, and how many tokens each has where it says so."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = dict(data)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise RequestError(f"--text-features {path}: not a readable NPZ: {error}") from error
    tokens = arrays.pop("tokens", None)
    expected = [str(i) for i in range(len(arrays))]
    if not arrays or set(arrays) != set(expected):
        raise RequestError(f"--text-features {path}: got the arrays {', '.join(arrays)}, expected 0, 1, ...")
    found: dict[str, Any] = {"text_features": [arrays[name] for name in expected]}
    if tokens is not None:
        if tokens.shape != (len(arrays),) or tokens.dtype.kind not in "iu":
            raise RequestError(
                f"--text-features {path}: tokens: got {tokens.dtype} {list(tokens.shape)}, expected integers "
                f"[{len(arrays)}], one of each array"
            )
        found["text_tokens"] = tokens.tolist()
    return found


def save_png(result: GenerationResult, path: Path, text: Mapping[str, str]) -> None:
    """All images as one PNG, row by row in a near-square grid."""
    count, height, width, _ = result.images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
    for i, image in enumerate(result.images):
        y, x = i // columns * height, i % columns * width
        grid[y : y + height, x : x + width] = image
    save_image(Image.fromarray(grid), path, png_text(text))


def _save_tokens(result: GenerationResult, variant: Variant, path: Path) -> None:
    steps = variant.computed_scales
    arrays = {graph_name(STEP, k): tokens for k, tokens in zip(steps, result.tokens, strict=True)}
    assert result.float_images is not None
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays, f_hat=result.f_hat, image=result.float_images)


def _timing_table(result: GenerationResult, manifest: Manifest, variant: Variant) -> str:
    plan = variant.resolve(manifest.model)
    rows: list[list[object]] = []
    timings, total = dict(result.timings), sum(result.timings.values())
    for k, (height, width) in enumerate(variant.schedule):
        layers = f"{plan.first_layer}-{plan.last_layer}" if plan.is_pruned(k) else ""
        ms = timings.pop(graph_name(STEP, k), None)
        rows.append(
            [k, f"{height}x{width}", f"{plan.num_kept[k]}/{height * width}", layers]
            + (["skipped", ""] if ms is None else [f"{ms:.1f}", f"{ms / total:.1%}"])
        )
    rows += [[name, "", "", "", f"{ms:.1f}", f"{ms / total:.1%}"] for name, ms in timings.items()]
    rows.append(["total", "", "", "", f"{total:.1f}", ""])
    return format_table(["scale", "map", "tokens kept", "pruned layers", "ms", "share"], rows)
