"""Pruning plans: what they resolve to, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastvar_trt.export.models.registry import load_plan, presets
from fastvar_trt.runtime.errors import PlanError
from fastvar_trt.runtime.plan import DENSE, PruningPlan

PRESETS = presets()
SCHEDULE = ((1, 1), (2, 2), (4, 4), (4, 6), (8, 8))


def test_none_keeps_everything() -> None:
    plan = PRESETS["none"].resolve(SCHEDULE, depth=3)
    assert plan.num_kept == (1, 4, 16, 24, 64)
    assert plan.cache_scale is None
    assert not any(plan.is_pruned(k) or plan.writes_cache(k, i) for k in range(5) for i in range(3))
    assert plan.num_past(4, 0) == 45


def test_kept_tokens_are_the_references() -> None:
    # FastVAR keeps L - int(L * ratio).
    plan = PruningPlan(fractions=((-1, 0.3), (3, 0.55)), cache_scale=2, first_layer=1, last_layer=-2).resolve(
        SCHEDULE, 4
    )
    assert plan.num_kept == (1, 4, 16, 24 - int(24 * 0.55), 64 - int(64 * 0.3))
    assert (plan.first_layer, plan.last_layer) == (1, 2)
    assert [plan.kept(3, i) for i in range(4)] == [24, 11, 11, 24]
    assert [plan.num_past(4, i) for i in range(4)] == [45, 32, 32, 45]  # ragged over layers
    assert [plan.writes_cache(2, i) for i in range(4)] == [False, True, True, False]
    assert not plan.writes_cache(3, 1)


def test_skipped_scales_do_not_run() -> None:
    plan = PruningPlan(fractions=((-1, 1.0), (-2, 0.5)), cache_scale=-3).resolve(SCHEDULE, 2)
    assert plan.steps == (0, 1, 2, 3)
    assert plan.num_kept[-1] == 0
    assert not plan.is_pruned(4)


def test_what_a_layer_computes() -> None:
    plan = PruningPlan(fractions=((-1, 1.0), (3, 0.5)), cache_scale=2, first_layer=1).resolve(SCHEDULE, 2)
    assert [plan.kept(k, 0) for k in range(5)] == [1, 4, 16, 24, 0]
    assert [plan.kept(k, 1) for k in range(5)] == [1, 4, 16, 12, 0]
    assert [(k, i) for k in range(5) for i in range(2) if plan.prunes(k, i)] == [(3, 1)]


def test_the_one_score_may_be_named() -> None:
    """As plan files of earlier releases do."""
    assert PruningPlan.from_json({"score": "mse_to_mean"}, name="none") == DENSE


def test_skipping_alone_needs_no_cache() -> None:
    assert PruningPlan(fractions=((-1, 1.0),)).resolve(SCHEDULE, 2).cache_scale is None


@pytest.mark.parametrize("name", sorted(name for name in PRESETS if "infinity" not in name))
@pytest.mark.parametrize("sides", [(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)])
def test_presets_fit_vars_schedules(name: str, sides: tuple[int, ...]) -> None:
    plan = PRESETS[name].resolve([(n, n) for n in sides], depth=16)
    assert plan.steps == tuple(range(10))
    assert PruningPlan.from_json(json.loads(json.dumps(PRESETS[name].to_json()))) == PRESETS[name]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PruningPlan(fractions=((5, 0.5),), cache_scale=2), "scale 5 does not exist: the model has 5"),
        (PruningPlan(fractions=((-6, 0.5),), cache_scale=2), "scale -6 does not exist"),
        (PruningPlan(fractions=((4, 0.5), (-1, 0.5)), cache_scale=2), "scale 4 is named twice"),
        (PruningPlan(fractions=((4, 1.5),), cache_scale=2), "fraction 1.5, expected 0 to 1"),
        (PruningPlan(fractions=((4, -0.1),), cache_scale=2), "fraction -0.1, expected 0 to 1"),
        (PruningPlan(fractions=((4, float("nan")),), cache_scale=2), "fraction nan, expected 0 to 1"),
        (PruningPlan(fractions=((3, 0.5),), cache_scale=4), "cache_scale 4 comes after the pruned scale 3"),
        (PruningPlan(fractions=((3, 0.5), (4, 0.5)), cache_scale=3), "cache_scale 3 is itself pruned"),
        (PruningPlan(fractions=((4, 0.5),)), "cache_scale is missing"),
        (PruningPlan(fractions=((4, 0.5),), cache_scale=9), "cache_scale 9 does not exist"),
        (PruningPlan(fractions=((0, 1.0),)), "scale 0 is skipped"),
        (PruningPlan(fractions=tuple((k, 1.0) for k in range(5))), "scale 0 is skipped"),
        (PruningPlan(fractions=((4, 0.5),), cache_scale=2, first_layer=3), "first_layer 3 does not exist"),
        (PruningPlan(fractions=((4, 0.5),), cache_scale=2, first_layer=2, last_layer=1), "comes after last_layer"),
    ],
)
def test_plans_that_do_not_fit(plan: PruningPlan, message: str) -> None:
    with pytest.raises(PlanError, match=message.replace("(", r"\(")):
        plan.resolve(SCHEDULE, depth=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "got a JSON list, expected an object"),
        ({"prune": []}, "unknown key 'prune'"),
        ({"pruned": {}}, "expected a list"),
        ({"pruned": [{"scale": 1}]}, 'expected {"scale"'),
        ({"pruned": [{"scale": "last", "fraction": 0.5}]}, "scale: got 'last', expected a whole number"),
        ({"pruned": [{"scale": 1, "fraction": "half"}]}, "fraction: got 'half'"),
        ({"pruned": [{"scale": 1, "fraction": True}]}, "fraction: got True"),
        ({"pruned": [{"scale": 1, "fraction": 10**400}]}, "expected a number from 0 to 1"),
        ({"cache_scale": 1.5}, "cache_scale: got 1.5"),
        ({"name": 3}, "name: got 3"),
        ({"score": "attention"}, "score: got 'attention', expected 'mse_to_mean', or leave it out"),
    ],
)
def test_malformed_json(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_json(data)


def test_load_plan_from_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"pruned": [{"scale": -1, "fraction": 0.25}], "cache_scale": -2, "first_layer": 1}')
    assert load_plan(str(file)) == PruningPlan("mine", ((-1, 0.25),), -2, 1)
    assert load_plan("none") is DENSE


def test_load_plan_refuses(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="neither a preset"):
        load_plan(str(tmp_path / "absent.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(PlanError, match="not a readable JSON file"):
        load_plan(str(broken))
