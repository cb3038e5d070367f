"""VAR for the exporter's commands. Imports torch only where a model is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastvar_trt.export.models.family import Family, SourceCommand
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.plan import PruningPlan
from fastvar_trt.runtime.precision import Precision

if TYPE_CHECKING:
    from fastvar_trt.export.models.var.model import VAR as Model
    from fastvar_trt.export.models.var.source import VARSource

# FastVAR's fractions for Infinity's last two computed scales, on VAR's last two; the first layers stay dense, as there.
# Chosen for speed on models of official size (benchmarks/results); what it costs in quality has not been measured.
_FASTVAR_VAR = PruningPlan("fastvar-var", ((-2, 0.4), (-1, 0.5)), cache_scale=-3, first_layer=2)


def _load_files(checkpoint: Path, vae: Path, config: str | None) -> VARSource:
    overrides = _read_config(config)
    from fastvar_trt.export.models.var.source import VARSource

    return VARSource.from_files(checkpoint, vae, overrides)


def _from_configs(configs: Mapping[str, Any], precision: Precision) -> Model:
    from fastvar_trt.export.models.var.model import VAR

    return VAR.from_configs(configs, precision)


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
        click.Option(["--vae"], type=click.Path(path_type=Path), required=True, help="The official file of its VAE."),
        click.Option(
            ["--config"],
            help="JSON, or a JSON file, of what state dicts do not tell: num_heads, patch_nums, quant_resi (0.5).",
        ),
    ),
    load=_load_files,
    default_plan=lambda **_: _FASTVAR_VAR.name,
    top_k=900,
)
VAR = Family("var", (_FILES,), _from_configs, (_FASTVAR_VAR,))
