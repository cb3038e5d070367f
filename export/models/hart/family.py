"""HART for the exporter's commands. Imports torch only where a model is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastvar_trt.export.models.family import Family, SourceCommand
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.plan import PruningPlan
from fastvar_trt.runtime.precision import PLAIN, Precision

if TYPE_CHECKING:
    from fastvar_trt.export.models.hart.model import HART as Model
    from fastvar_trt.export.models.hart.source import HARTSource

# As published for 1024x1024 (`fastvar_utils.py`): half of 48x48, three quarters of 64x64, cache of 36x36, every layer.
_FASTVAR_HART = PruningPlan("fastvar-hart", ((-2, 0.5), (-1, 0.75)), cache_scale=-3)


def _load(
    checkpoint: Path,
    vae: Path | None,
    text_encoder: Path | None,
    system_prompt: Path | None,
    text_padding: str,
    more_smooth: bool,
) -> HARTSource:
    from fastvar_trt.export.models.hart.source import HARTSource

    return HARTSource.from_folders(checkpoint, vae, text_encoder, _read_text(system_prompt), text_padding, more_smooth)


def _read_text(path: Path | None) -> str:
    """The file of --system-prompt, as it is.

    Raises:
        CheckpointError: it cannot be read.
    """
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--system-prompt {path}: cannot be read as text: {error}") from error


def _from_configs(configs: Mapping[str, Any], precision: Precision) -> Model:
    from fastvar_trt.export.models.hart.model import HART

    return HART.from_configs(configs, precision)


_FOLDERS = SourceCommand(
    name="hart",
    description="An official HART checkpoint. Sizes are read from its config.json and state dict.",
    examples=(
        "fastvar-export hart --checkpoint hart-0.7b-1024px/llm --out out/hart",
        "fastvar-export hart --checkpoint hart-0.7b-1024px/llm --text-encoder Qwen2-VL-1.5B-Instruct \\\n"
        "    --system-prompt system_prompt.txt --precision fp16 --out out/hart --target sm86",
    ),
    options=(
        click.Option(
            ["--checkpoint"],
            type=click.Path(path_type=Path),
            required=True,
            help="The official folder `llm`; its ema_model.bin is taken, where there is one.",
        ),
        click.Option(
            ["--vae"],
            type=click.Path(path_type=Path),
            help="The official folder of the image tokenizer. Default: `tokenizer` beside the other.",
        ),
        click.Option(
            ["--text-encoder"],
            type=click.Path(path_type=Path),
            help="Hugging Face folder of Qwen2, for prompts; without it, the bundle takes text features.",
        ),
        click.Option(
            ["--system-prompt"],
            type=click.Path(path_type=Path),
            help="Text file of what comes before every prompt: `llm_system_prompt` of HART's constants.py.",
        ),
        click.Option(
            ["--text-padding"],
            type=click.Choice(["left", "right"]),
            default="right",
            show_default=True,
            help="Side of the padding in text features; that of a text encoder is its own.",
        ),
        click.Option(
            ["--more-smooth/--no-more-smooth"],
            default=True,
            show_default=True,
            help="Blend the likeliest codes in place of one that is drawn.",
        ),
    ),
    load=_load,
    default_plan=lambda **_: _FASTVAR_HART.name,
    top_k=600,
)
# Computed once per prompt, over few rows: there is nothing to gain from rounding what they multiply.
_OF_FEW_ROWS = tuple((pattern, "w8") for pattern in ("context.*", "text_encoder.*", "*modulation"))
HART = Family(
    "hart",
    (_FOLDERS,),
    _from_configs,
    (_FASTVAR_HART,),
    # The first step of the diffusion multiplies the rounding of what it predicts by thousands.
    matrices=(("head", PLAIN), ("diffusion.*", PLAIN), *_OF_FEW_ROWS),
)
