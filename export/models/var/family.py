"""VAR for the exporter's commands. Imports torch only where a model is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastvar_trt.export.models.family import Family, SourceCommand
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.plan import DENSE, PruningPlan
from fastvar_trt.runtime.precision import PLAIN, Precision

if TYPE_CHECKING:
    from fastvar_trt.export.models.base import NextScaleModel
    from fastvar_trt.export.models.var.code import CoDeSource
    from fastvar_trt.export.models.var.source import VARSource

# FastVAR's fractions for Infinity's last two computed scales, on VAR's last two; the first layers stay dense, as there.
# Chosen for speed on models of official size (benchmarks/results); what it costs in quality has not been measured.
_FASTVAR_VAR = PruningPlan("fastvar-var", ((-2, 0.4), (-1, 0.5)), cache_scale=-3, first_layer=2)


def _load_files(checkpoint: Path, vae: Path, config: str | None) -> VARSource:
    overrides = _read_config(config)
    from fastvar_trt.export.models.var.source import VARSource

    return VARSource.from_files(checkpoint, vae, overrides)


def _load_pair(drafter: Path, refiner: Path, vae: Path, switch: int, config: str | None) -> CoDeSource:
    overrides = _read_config(config)
    from fastvar_trt.export.models.var.code import CoDeSource

    return CoDeSource.from_files(drafter, refiner, vae, switch, overrides)


def _from_configs(configs: Mapping[str, Any], precision: Precision) -> NextScaleModel:
    from fastvar_trt.export.models.var.code import CoDe
    from fastvar_trt.export.models.var.model import VAR

    return (CoDe if "code" in configs else VAR).from_configs(configs, precision)


def _read_config(text: str | None) -> dict[str, Any] | None:
    """The --config option: JSON, or the name of a JSON file."""
    if text is None:
        return None
    try:
        if Path(text).is_file():
            text = Path(text).read_text(encoding="utf-8")
        data = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--config: neither JSON nor a JSON file that exists: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"--config: got a JSON {type(data).__name__}, expected an object")
    return data


_VAE = click.Option(["--vae"], type=click.Path(path_type=Path), required=True, help="The official file of its VAE.")
_CONFIG = click.Option(
    ["--config"], help="JSON, or a JSON file, of what state dicts do not tell: num_heads, patch_nums, quant_resi (0.5)."
)
_FILES = SourceCommand(
    name="var",
    description="An official VAR checkpoint. Sizes, scales and variants are read from the state dict.",
    examples=(
        "fastvar-export var --checkpoint var_d16.pth --vae vae_ch160v4096z32.pth --out out/d16",
        "fastvar-export var --checkpoint var_d36.pth --vae vae_ch160v4096z32.pth \\\n"
        "    --prune my_plan.json --precision fp16 --batch 1,4 --out out/d36 --target sm86,sm89",
    ),
    options=(
        click.Option(["--checkpoint"], type=click.Path(path_type=Path), required=True, help="The official file."),
        _VAE,
        _CONFIG,
    ),
    load=_load_files,
    default_plan=lambda **_: _FASTVAR_VAR.name,
    top_k=900,
)
_PAIR = SourceCommand(
    name="code",
    description="CoDe: two official VARs in one chain. A large one draws the first scales, a small one the rest.",
    examples=(
        "fastvar-export code --drafter var_d30.pth --refiner var_d16.pth --vae vae_ch160v4096z32.pth \\\n"
        "    --switch 8 --out out/code",
    ),
    options=(
        click.Option(["--drafter"], type=click.Path(path_type=Path), required=True, help="The official file."),
        click.Option(["--refiner"], type=click.Path(path_type=Path), required=True, help="The official file."),
        _VAE,
        click.Option(
            ["--switch"], type=click.IntRange(1), default=8, show_default=True, help="Scales that the drafter draws."
        ),
        _CONFIG,
    ),
    load=_load_pair,
    default_plan=lambda **_: DENSE.name,
    top_k=600,  # `sample_CoDe.py`
)
VAR = Family(
    "var",
    (_FILES, _PAIR),
    _from_configs,
    (_FASTVAR_VAR,),
    # The modulations are computed once per image, over few rows: rounding what they multiply would gain nothing.
    matrices=(("*head", PLAIN), ("*modulation", "w8")),
)
