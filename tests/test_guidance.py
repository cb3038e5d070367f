"""Plans whose late scales compute the conditional half alone: the same pictures as guidance that does not guide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import INFINITY_PLAN, TINY_PLAN, Golden, thorough, tiny_infinity, tiny_states
from fastvar_trt.export.exporter import ExportOptions, ExportReport, export_again
from fastvar_trt.export.models.hart.source import HARTSource
from fastvar_trt.export.models.source import Source
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.errors import PlanError, RequestError
from fastvar_trt.runtime.manifest import Role
from fastvar_trt.runtime.plan import DENSE, PruningPlan
from fastvar_trt.runtime.request import example_requests
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.tools.measure.work import step_multiply_adds

Export = Callable[..., tuple[Path, ExportReport]]
SCHEDULE = ((1, 1), (2, 2), (4, 4), (8, 8))
SOURCES: dict[str, tuple[Callable[[], Source], PruningPlan]] = {
    "var": (lambda: VARSource.from_state(*tiny_states()), TINY_PLAN),
    "infinity": (tiny_infinity, INFINITY_PLAN),
    "hart": (lambda: HARTSource.from_folders(Golden("hart_d4_dense").folder / "llm", more_smooth=False), DENSE),
}


@pytest.mark.parametrize(
    ("family", "first"),
    [("var", -2), ("infinity", -2), thorough("infinity", -1), thorough("hart", -2)],
)
def test_it_draws_what_neutral_guidance_draws(family: str, first: int, export_once: Export, tmp_path: Path) -> None:
    make, plan = SOURCES[family]
    guided, _ = export_once(f"guided_{family}", make(), ExportOptions(plan=plan, batches=(2,)))
    halved = tmp_path / "halved"
    report = export_again(guided, halved, dataclasses.replace(plan, name="halved", unguided_from=first))
    variant = report.manifest.default
    num_scales, neutral = len(variant.schedule), report.manifest.sampling.neutral_cfg
    first %= num_scales
    with_guidance = {graph.file for graph in variant.steps(2) if graph.scale is not None and graph.scale < first}
    assert not with_guidance & set(report.errors), "these are the same graphs"
    requests = [dataclasses.replace(r, cfg=3.0) for r in example_requests(report.manifest, 2, text_tokens=4)]
    spelt = np.where(np.arange(num_scales) < first, 3.0, neutral)
    with Pipeline.load(guided) as pipe, Pipeline.load(halved) as ours:
        expected = pipe.draw([dataclasses.replace(r, cfg=spelt) for r in requests], return_logits=True)
        got = ours.draw(requests, return_logits=True)
        again = ours.draw([dataclasses.replace(r, cfg=spelt) for r in requests])
        assert not verify_bundle(ours).failures
        with pytest.raises(RequestError, match=rf"cfg: got 3 at scale {first}, expected {neutral:g}"):
            ours.draw([dataclasses.replace(requests[0], cfg=np.full(num_scales, 3.0))])
        shapes = ours.buffer_shapes[variant.name, 2]
        plan_there = report.manifest.resolved_plan
        for rows, keys in ((4, plan_there.num_past(first, 0)), (2, plan_there.kept(first, 0))):
            shape = shapes.get(f"{Role.KEYS}_0x{rows}", (0,))
            assert shape[0] == (keys if rows == 4 or first < num_scales - 1 else 0)
    assert expected.logits is not None and got.logits is not None
    for k, (a, b) in enumerate(zip(expected.logits, got.logits, strict=True)):
        np.testing.assert_array_equal(expected.tokens[k], got.tokens[k], err_msg=f"scale {k}")
        np.testing.assert_allclose(a, b, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(got.images, again.images)
    assert (np.abs(expected.images.astype(int) - got.images) <= 1).mean() >= 0.999


def test_it_halves_the_work() -> None:
    model = SOURCES["infinity"][0]().new_model(ExportOptions().check("infinity")).model_spec()
    plans = [PruningPlan(unguided_from=first).resolve(SCHEDULE, 2) for first in (None, 2)]
    guided, halved = ([step_multiply_adds(model, plan, k) for k in plan.steps] for plan in plans)
    assert guided[:2] == halved[:2]
    once = 64 * (model.width * model.vocab_size + model.code_channels * model.width)  # head and embedding
    assert halved[3] - once == (guided[3] - once) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unguided_from": 4}, "unguided_from 4 does not exist"),
        ({"unguided_from": -4}, "unguided_from -4 is scale 0"),
    ],
)
def test_places_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan(**changes).resolve(SCHEDULE, 2)


def test_plan_files_have_it() -> None:
    with pytest.raises(PlanError, match=r"unguided_from: got 1\.5, expected a whole number"):
        PruningPlan.from_json({"unguided_from": 1.5})
    plan = PruningPlan("late", unguided_from=-1)
    assert PruningPlan.from_json(plan.to_json()) == plan
