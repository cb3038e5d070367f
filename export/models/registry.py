"""The families that can be exported, a line each, and the presets of all."""

from __future__ import annotations

import json
from pathlib import Path

from fastvar_trt.export.models.family import Family
from fastvar_trt.export.models.hart.family import HART
from fastvar_trt.export.models.infinity.family import INFINITY
from fastvar_trt.export.models.var.family import VAR
from fastvar_trt.runtime.errors import PlanError
from fastvar_trt.runtime.plan import DENSE, PruningPlan
from fastvar_trt.runtime.registry import Registry

FAMILIES: Registry[Family] = Registry(VAR, INFINITY, HART)


def presets() -> dict[str, PruningPlan]:
    """Pruning plans by name: none, and those of every family."""
    plans = (DENSE, *(plan for family in FAMILIES.values() for plan in family.presets))
    return {plan.name: plan for plan in plans}


def load_plan(preset_or_file: str) -> PruningPlan:
    """The preset of that name, or the plan in that JSON file.

    Raises:
        PlanError: neither a preset nor a readable plan file.
    """
    known = presets()
    if preset_or_file in known:
        return known[preset_or_file]
    path = Path(preset_or_file)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(
            f"--prune {preset_or_file!r}: neither a preset ({', '.join(known)}) nor a JSON file that exists"
        ) from error
    except (OSError, ValueError) as error:
        raise PlanError(f"--prune {preset_or_file!r}: not a readable JSON file: {error}") from error
    return PruningPlan.from_json(data, name=path.stem)
