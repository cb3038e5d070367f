"""Two models in one chain: CoDe's drafter and refiner."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from conftest import Golden, thorough, tiny_states
from fastvar_trt.export.exporter import ExportOptions, ExportReport, export_again
from fastvar_trt.export.models.var.code import CoDeSource
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.errors import BundleError, CheckpointError, PlanError
from fastvar_trt.runtime.layout import _placed, kv_bytes, passed_bytes
from fastvar_trt.runtime.manifest import MANIFEST_FILE, Manifest
from fastvar_trt.runtime.plan import Drafted, PruningPlan
from fastvar_trt.runtime.precision import DTYPES
from fastvar_trt.runtime.request import example_requests
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.tools.cli import main
from fastvar_trt.tools.cli.export import main as export_main

Export = Callable[..., tuple[Path, ExportReport]]
PROBED = 64  # positions of the logits that a golden holds
MAPS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5))
DRAFTED = Drafted(num_scales=2, depth=3)


def tiny_pair(switch: int = 2, **changes: Any) -> CoDeSource:
    """Of two widths."""
    refiner, vae = tiny_states(**changes)
    drafter, _ = tiny_states(depth=3, width=192, num_heads=3, **changes)
    return CoDeSource.from_states({"drafter": drafter, "refiner": refiner}, vae, switch)


def test_it_draws_what_the_public_code_draws(export_once: Export) -> None:
    golden = Golden("code_d6_d4_256")
    case, expected = golden.case, golden.expected
    files = golden.folder / "drafter.pth", golden.folder / "refiner.pth"
    source = CoDeSource.from_files(*files, golden.vae, case["switch"])
    bundle, _ = export_once("code", source, ExportOptions(batches=(2,), compare=False))
    temperature = np.array(case["temperature"])
    with Pipeline.load(bundle) as pipe:
        result = pipe.generate(
            case["labels"],
            cfg=case["cfg"],
            temperature=[case["temperature"]],
            greedy=True,
            return_logits=True,
            return_float_images=True,
        )
    assert result.logits is not None and result.float_images is not None
    for k, tokens in enumerate(result.tokens):
        np.testing.assert_array_equal(tokens, expected[f"idx_{k}"], err_msg=f"scale {k}")
        logits = result.logits[k][:, :PROBED] / temperature[k]
        np.testing.assert_allclose(logits, expected[f"logits_{k}"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(result.f_hat, expected["f_hat_9"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(result.float_images, expected["image"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("switch", [1, thorough(3)])
def test_one_model_as_both_is_that_model(switch: int, export_once: Export) -> None:
    state, vae = tiny_states()
    alone, report = export_once("code_alone", VARSource.from_state(state, vae), ExportOptions(batches=(2,)))
    pair = CoDeSource.from_states({"drafter": state, "refiner": state}, vae, switch)
    both, _ = export_once(f"code_same_{switch}", pair, ExportOptions(batches=(2,), compare=False))
    requests = example_requests(report.manifest, 2)
    with Pipeline.load(alone) as one, Pipeline.load(both) as other:
        expected, got = one.draw(requests), other.draw(requests)
    for k, (a, b) in enumerate(zip(expected.tokens, got.tokens, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"scale {k}")
    np.testing.assert_allclose(expected.f_hat, got.f_hat, atol=1e-4)


# In the second the refiner's first step writes the cache.
@pytest.mark.parametrize(
    "plan",
    [
        PruningPlan("pair"),
        PruningPlan("pair_pruned", ((-1, 0.5),), cache_scale=-2, first_layer=1),
        thorough(PruningPlan("pair_unguided", ((-1, 0.5),), cache_scale=-2, unguided_from=-1)),
    ],
    ids=lambda plan: plan.name,
)
def test_graphs_are_what_pytorch_computes(plan: PruningPlan, export_once: Export) -> None:
    bundle, report = export_once(plan.name, tiny_pair(), ExportOptions(plan=plan, batches=(1, 2)))
    assert max(error.max_error for error in report.errors.values()) < 1e-3
    with Pipeline.load(bundle) as pipe:
        assert not verify_bundle(pipe).failures
        requests = example_requests(report.manifest, 2)
        both, single = pipe.draw(requests), pipe.draw(requests[:1])
    for k, (a, b) in enumerate(zip(both.tokens, single.tokens, strict=True)):
        np.testing.assert_array_equal(a[:1], b, err_msg=f"scale {k}")


def test_another_plan_needs_no_checkpoint(tmp_path: Path, export_once: Export) -> None:
    plan = PruningPlan("pair_pruned", ((-1, 0.5),), cache_scale=-2, first_layer=1)
    dense, _ = export_once("pair", tiny_pair(), ExportOptions(plan=PruningPlan("pair"), batches=(1, 2)))
    pruned, report = export_once(plan.name, tiny_pair(), ExportOptions(plan=plan, batches=(1, 2)))
    again = export_again(dense, tmp_path / "again", plan)
    assert sorted(again.traced) == ["step_02.onnx", "step_02_b2.onnx", "step_03.onnx", "step_03_b2.onnx"]
    for graph in report.manifest.graphs:
        assert (tmp_path / "again" / graph.file).read_bytes() == (pruned / graph.file).read_bytes()


def test_the_refiner_takes_the_memory_of_the_drafter(export_once: Export) -> None:
    bundle, report = export_once("pair", tiny_pair(), ExportOptions(plan=PruningPlan("pair"), batches=(1, 2)))
    token = 2 * 2 * 4  # keys and values of both halves, in fp32, per channel
    drafter, refiner = 3 * 192 * 1 * token, 2 * 128 * (1 + 9 + 25) * token
    assert kv_bytes(report.manifest.default.chain(1)) == refiner
    with Pipeline.load(bundle) as pipe:
        shapes = pipe.buffer_shapes["128x128", 1]
        kept = [4 * math.prod(shape) for name, shape in shapes.items() if name.startswith(("keys_", "values_"))]
        assert sum(kept) == drafter + refiner
        (chain,) = (c for key, c in pipe._chains.items() if key[1] == 1)
        others = sum(
            math.prod(buffer.shape) * DTYPES[buffer.dtype].num_bytes
            for name, buffer in chain._buffers.items()
            if not name.startswith(("keys_", "values_"))
        )
        passed = passed_bytes(report.manifest.default.chain(1))
        assert refiner <= passed
        assert chain.num_buffer_bytes + passed < others + refiner  # the drafter's modulations lie there, too


def test_what_is_needed_at_the_same_time_lies_apart() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        spans = {str(i): tuple(sorted(rng.integers(0, 8, 2).tolist())) for i in range(rng.integers(1, 12))}
        sizes = {name: int(rng.integers(1, 2000)) for name in spans}
        offsets, total = _placed(sizes, spans)
        assert total == max(offsets[name] + sizes[name] for name in spans)
        assert all(offset % 256 == 0 for offset in offsets.values())
        for a, b in itertools.combinations(spans, 2):
            if spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]:
                assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]


def test_previews_do_not_disturb_a_pair(export_once: Export) -> None:
    bundle, report = export_once("pair", tiny_pair(), ExportOptions(plan=PruningPlan("pair"), batches=(1, 2)))
    with Pipeline.load(bundle) as pipe:
        *previews, last = pipe.stream([3], seeds=1, preview_scales=list(report.manifest.preview_scales))
        assert len(previews) == 3
        np.testing.assert_array_equal(last.images, pipe.generate([3], seeds=1).images)


def test_who_runs_where() -> None:
    plan = PruningPlan("late", ((-1, 0.5),), cache_scale=-2, first_layer=1, unguided_from=-1)
    resolved = plan.resolve(MAPS, 4, drafted=DRAFTED)
    assert [list(resolved.layers(k)) for k in range(5)] == [[0, 1, 2]] * 2 + [[3, 4, 5, 6]] * 3
    assert resolved.kept(1, 2) == 4 and resolved.kept(1, 3) == 0
    assert resolved.kept(2, 3) == 1 + 4 + 9 and resolved.num_past(2, 3) == 0
    assert resolved.num_past(3, 3) == 14 and resolved.kept(4, 3) == 25 and resolved.kept(4, 4) == 13
    assert [resolved.emits_keys(k) for k in range(5)] == [True, False, True, True, False]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PruningPlan("p", ((1, 0.5),), cache_scale=0), "scale 1 is pruned, which the drafter draws"),
        (PruningPlan("p", ((2, 0.5),), cache_scale=0), "scale 2 is pruned, .* prune scales after 2"),
        (PruningPlan("p", ((-1, 0.5),), cache_scale=1), "cache_scale 1 is drawn by the drafter; .* 2 or later"),
        (PruningPlan("p", ((2, 1.0), (3, 1.0), (4, 1.0))), "scale 2 is pruned"),
        (PruningPlan("p", unguided_from=2), "got scale 2, expected one after scale 2"),
        (
            PruningPlan("p", ((-1, 0.5),), cache_scale=-2, first_layer=4),
            "first_layer 4 does not exist",
        ),
    ],
)
def test_plans_that_do_not_fit_a_pair(plan: PruningPlan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan.resolve(MAPS, 4, drafted=DRAFTED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_drafted": 4}, "the drafter draws 4 of 4 scales, expected 1 to 3"),
        ({"num_drafted": 3}, "expected .* in axis 0"),
        ({"num_drafted": 0}, "num_drafted: got 0"),
        ({"num_drafted": True}, "num_drafted: got True"),
        ({"drafter": None}, "num_drafted: got 2"),
        ({"drafter": {"depth": 3}}, "condition"),
    ],
)
def test_damaged_manifests_of_a_pair(changes: dict[str, Any], message: str, export_once: Export) -> None:
    bundle, _ = export_once("pair", tiny_pair(), ExportOptions(plan=PruningPlan("pair"), batches=(1, 2)))
    data = json.loads((bundle / MANIFEST_FILE).read_text())
    assert json.loads(json.dumps(Manifest.from_json(data, "x").to_json())) == data
    data["model"] |= changes
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(data, "x")


def test_pairs_that_do_not_fit_together() -> None:
    refiner, vae = tiny_states()
    for changes, message in (
        ({"patch_nums": (1, 2, 5, 8)}, r"patch_nums: got \(1, 2, 5, 8\) and \(1, 3, 5, 8\)"),
        ({"num_classes": 7}, "num_classes: got 7 and"),
    ):
        drafter, _ = tiny_states(**changes)
        with pytest.raises(CheckpointError, match=message):
            CoDeSource.from_states({"drafter": drafter, "refiner": refiner}, vae, 2)
    for switch in (4, 5):
        with pytest.raises(CheckpointError, match=f"--switch {switch}: expected 1 to 3"):
            CoDeSource.from_states({"drafter": refiner, "refiner": refiner}, vae, switch)
    damaged = {key: tensor for key, tensor in refiner.items() if key != "blocks.1.ffn.fc1.bias"}
    with pytest.raises(CheckpointError, match=r"--drafter.*blocks\.1\.ffn\.fc1\.bias"):
        CoDeSource.from_states({"drafter": damaged, "refiner": refiner}, vae, 2)


def test_from_the_command_line(tmp_path: Path) -> None:
    source = tiny_pair()
    files = {"drafter": source.states["drafter"], "refiner": source.states["refiner"], "vae": source.vae_state}
    for name, state in files.items():
        torch.save(dict(state), tmp_path / f"{name}.pth")
    given = [word for name in files for word in (f"--{name}", str(tmp_path / f"{name}.pth"))]
    out = str(tmp_path / "bundle")
    run = CliRunner().invoke(export_main, ["code", *given, "--switch", "2", "--no-compare", "--out", out])
    assert run.exit_code == 0, run.output
    shown = CliRunner().invoke(main, ["inspect", out])
    assert "var, 3 layers x 192, 3 heads (drafter, 2 scales), 2 layers x 128, 2 heads (refiner)" in shown.output
    drawn = CliRunner().invoke(main, ["generate", out, "--class", "3", "-o", str(tmp_path / "out.png")])
    assert drawn.exit_code == 0, drawn.output
    refused = CliRunner().invoke(export_main, ["code", *given, "--switch", "4", "--out", out, "--force"])
    assert refused.exit_code == 1 and "--switch 4: expected 1 to 3" in refused.output
