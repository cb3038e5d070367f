"""Infinity for the exporter's commands. Imports torch only where a model is asked for."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastvar_trt.export.models.family import Family, ListParam, SourceCommand
from fastvar_trt.export.models.infinity.schedules import SIZES, schedule
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.plan import DENSE, PruningPlan
from fastvar_trt.runtime.precision import PLAIN, Precision

if TYPE_CHECKING:
    from fastvar_trt.export.models.infinity.model import Infinity as Model
    from fastvar_trt.export.models.infinity.source import InfinitySource

DEFAULT_SIZE = "1M"
_SCENE_CFG = 2.5  # at 4, solids lose their shapes
_SCENE_EXAMPLES = (
    "a red sphere left of a blue cube on sand",
    "a glossy purple cone in the middle on a checkered floor at night",
    "three yellow cylinders on snow at sunset",
    "a green cube in front of an orange sphere on grass by day",
)
SCENE_FOLDER = Path(str(importlib.resources.files("fastvar_trt.export"))) / "scene_model"


def _plan(name: str, *fractions: tuple[int, float]) -> PruningPlan:
    return PruningPlan(name, fractions, cache_scale=8, first_layer=3, last_layer=27)


# `fastvar-infinity`: as published for 1024x1024 (`fastvar_utils.py`: 0.4 of 32x32 and 0.5 of 40x40, cache of 24x24,
# 48x48 and 64x64 skipped, layers 3 to 27), by place, so for every aspect ratio. The smaller sizes are what the
# published code does there. For `-2K` and `-4M` nothing was published: what is skipped and pruned below them stays, and
# of the last scale a quarter is computed.
PLAN_OF_SIZE: Mapping[str, PruningPlan] = {
    "0.06M": DENSE,
    "0.25M": _plan("fastvar-infinity-0.25M", (9, 0.4)),
    "0.60M": _plan("fastvar-infinity-0.60M", (9, 0.4), (10, 0.5), (11, 1.0)),
    "1M": _plan("fastvar-infinity", (9, 0.4), (10, 0.5), (11, 1.0), (12, 1.0)),
    "2K": _plan("fastvar-infinity-2K", (9, 0.4), (10, 0.5), (11, 1.0), (12, 1.0), (13, 0.75)),
    "4M": _plan("fastvar-infinity-4M", (9, 0.4), (10, 0.5), (11, 1.0), (12, 1.0), (13, 1.0), (14, 0.75)),
}


# What was found to be faster at the same compliance on the scene model (docs/plans.md): the published plan with
# guidance to where pruning begins, and one that ends at 32x32 with guidance to 20x20.
_MEASURED = (
    dataclasses.replace(PLAN_OF_SIZE["1M"], name="fastvar-infinity-unguided", unguided_from=9),
    dataclasses.replace(_plan("infinity-short", (9, 0.4), (10, 1.0), (11, 1.0), (12, 1.0)), unguided_from=8),
)


def _height_over_width(text: str) -> float:
    """`16:9` -> 0.5625."""
    width, height = (float(part) for part in text.split(":"))
    if not (width > 0 and height > 0):
        raise ValueError(text)
    return height / width


def _size(text: str) -> str:
    if text not in SIZES:
        raise ValueError(text)
    return text


def _load(
    checkpoint: Path,
    vae: Path,
    pn: str,
    h_div_w: float,
    text_length: int | None = None,
    text_encoder: Path | None = None,
) -> InfinitySource:
    from fastvar_trt.export.models.infinity.source import InfinitySource

    return InfinitySource.from_files(checkpoint, vae, pn, h_div_w, text_length, text_encoder)


def load_scenes(pn: str, h_div_w: float = 1.0) -> InfinitySource:
    """The model that comes with the package, at a size and a height over width.

    Raises:
        CheckpointError: the package was installed without its data.
    """
    checkpoint, vae, text = (SCENE_FOLDER / name for name in ("infinity.safetensors", "vae.safetensors", "t5"))
    source = _load(checkpoint, vae, pn, h_div_w, text_encoder=text)
    # It knows the positions of one size: with others solids repeat. Of larger maps, tokens lie between these; at other
    # ratios, solids are as stretched as the picture.
    _, span = schedule(DEFAULT_SIZE, 1.0)
    config = dataclasses.replace(source.config, cfg=_SCENE_CFG, rope_span=span)
    return dataclasses.replace(source, config=config, examples=_SCENE_EXAMPLES)


def _from_configs(configs: Mapping[str, Any], precision: Precision) -> Model:
    from fastvar_trt.export.models.infinity.model import Infinity

    return Infinity.from_configs(configs, precision)


def _sizes(pn: tuple[str, ...], h_div_w: Any, aspect: Any, **rest: Any) -> list[dict[str, Any]]:
    """Every size at every ratio; what a size has not at all is left out, where it has others of those asked for."""
    if h_div_w is not None and aspect is not None:
        raise click.UsageError("--h-div-w and --aspect say the same; give one of them")
    found: list[dict[str, Any]] = []
    for size in pn:
        missing: list[ExportError] = []
        wanted = [ratio for given in (h_div_w, aspect) if given is not None for ratio in given] or [1.0]
        for ratio in wanted:
            try:
                schedule(size, ratio)
            except ExportError as error:
                missing.append(error)
                continue
            found.append({"pn": size, "h_div_w": ratio, **rest})
        if len(missing) == len(wanted):
            raise missing[0]
        for absent in missing:
            click.echo(f"left out: {absent}", err=True)
    return found


_SIZE_OPTIONS = (
    click.Option(
        ["--pn"],
        type=ListParam(_size, "SIZE,SIZE,...", f"of {', '.join(SIZES)}"),
        default=DEFAULT_SIZE,
        show_default=True,
        help="Pixels of the image; several are separated by commas, the first is the default.",
    ),
    click.Option(
        ["--h-div-w"],
        type=ListParam(float, "X,X,...", "numbers"),
        help="Height over width; one, or several. Default: 1.",
    ),
    click.Option(
        ["--aspect"],
        type=ListParam(_height_over_width, "W:H,W:H,...", "two numbers each as in 4:3,"),
        help="Width to height as W:H,W:H,...: the same said otherwise.",
    ),
)
_FILES = SourceCommand(
    name="infinity",
    description="An official Infinity checkpoint, at one size and aspect ratio, or several.",
    examples=(
        "fastvar-export infinity --checkpoint infinity_2b_reg.pth --vae infinity_vae_d32reg.pth \\\n"
        "    --pn 1M --h-div-w 1.333 --precision fp16 --out out/infinity_1m",
        "fastvar-export infinity --checkpoint infinity_2b_reg.pth --vae infinity_vae_d32reg.pth \\\n"
        "    --text-encoder flan-t5-xl --pn 1M,2K --aspect 1:1,2:1 --out out/infinity_2k",
    ),
    options=(
        click.Option(
            ["--checkpoint"],
            type=click.Path(path_type=Path),
            required=True,
            help="The official file, or a folder of shards.",
        ),
        click.Option(["--vae"], type=click.Path(path_type=Path), required=True, help="The official file of its VAE."),
        *_SIZE_OPTIONS,
        click.Option(["--text-length"], type=click.IntRange(1), help="Longest prompt in tokens. Default: the model's."),
        click.Option(
            ["--text-encoder"],
            type=click.Path(path_type=Path),
            help="Hugging Face folder of flan-t5, for prompts; without it, the bundle takes text features.",
        ),
    ),
    load=_load,
    default_plan=lambda pn, **_: PLAN_OF_SIZE[pn].name,
    top_k=0,
    sizes=_sizes,
)
_SCENES = SourceCommand(
    name="scenes",
    description="The small trained model of text that comes with the package: simple scenes, at any size.",
    examples=(
        "fastvar-export scenes --out out/scenes",
        "fastvar-export scenes --pn 2K --aspect 2:1 --prune none --out out/scenes_2k",
        "fastvar-export scenes --pn 1M,2K --aspect 1:1,2:1 --with-encoder --out out/scenes_all",
    ),
    options=_SIZE_OPTIONS,
    load=load_scenes,
    default_plan=lambda pn, **_: PLAN_OF_SIZE[pn].name,
    top_k=0,
    sizes=_sizes,
)
# Computed once per prompt, over few rows: there is nothing to gain from rounding what they multiply.
_OF_CONDITION = tuple((pattern, "w8") for pattern in ("text.*", "text_encoder.*", "cross.mat_kv", "*modulation"))
INFINITY = Family(
    "infinity",
    (_SCENES, _FILES),
    _from_configs,
    (*(p for p in PLAN_OF_SIZE.values() if p is not DENSE), *_MEASURED),
    matrices=(("head", PLAIN), *_OF_CONDITION),
)
