"""Metrics with known answers, and the commands `compare` and `tune` on the tiny bundle."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from conftest import TINY_PLAN
from fastvar_trt.export.exporter import ExportOptions, export_again
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import Pipeline, read_manifest
from fastvar_trt.runtime.errors import PlanError, RequestError
from fastvar_trt.runtime.plan import DENSE, PruningPlan
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.tools.cli import main
from fastvar_trt.tools.measure import tune
from fastvar_trt.tools.measure.compare import Comparison, Pictures, compare, draw_side_by_side
from fastvar_trt.tools.measure.evaluate import Share
from fastvar_trt.tools.measure.quality import (
    ImageMetrics,
    ReferenceMetrics,
    image_metrics,
    mean_metrics,
    nearest_distances,
    reference_metrics,
)
from fastvar_trt.tools.measure.work import chain_multiply_adds, step_multiply_adds
from fastvar_trt.tools.scenes.renderer import render
from fastvar_trt.tools.scenes.world import random_scene
from fastvar_trt.tools.sheets import contact_sheet, error_map, saved_figure

PICTURES = Pictures((1, 2, 3), (0, 1, 2))


def flat(value: int, side: int = 64) -> NDArray[np.uint8]:
    return np.full((side, side, 3), value, dtype=np.uint8)


def test_psnr_of_a_constant_error() -> None:
    assert image_metrics(flat(100), flat(110)).psnr_db == pytest.approx(20 * math.log10(255 / 10), abs=1e-6)


def test_ssim_of_constant_images() -> None:
    # Without variance SSIM is its luminance term (Wang et al. 2004): (2ab + C1) / (a^2 + b^2 + C1).
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert image_metrics(flat(100), flat(150)).ssim == pytest.approx(expected, abs=1e-6)


def test_equal_images(rng: np.random.Generator) -> None:
    image = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
    metrics = image_metrics(image, image.copy())
    assert (metrics.psnr_db, metrics.ssim, metrics.vif) == (math.inf, 1.0, 1.0)


def test_metrics_fall_with_noise(rng: np.random.Generator) -> None:
    clean = render(random_scene(rng), (128, 128))
    results = []
    for sigma in (4.0, 16.0, 64.0):
        noisy = np.clip(clean + rng.normal(0, sigma, clean.shape), 0, 255).astype(np.uint8)
        results.append(image_metrics(clean, noisy))
    for name in ("psnr_db", "ssim", "vif"):
        values = [getattr(r, name) for r in results]
        assert values == sorted(values, reverse=True) and values[0] > 1.2 * values[-1], name


def test_the_mean_leaves_infinite_psnr_out(rng: np.random.Generator) -> None:
    image = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
    one = image_metrics(flat(100), flat(110))
    assert mean_metrics([image_metrics(image, image), one]).psnr_db == one.psnr_db


def test_images_of_different_sizes_are_refused() -> None:
    with pytest.raises(RequestError, match=r"got \(32, 32, 3\), expected \(64, 64, 3\)"):
        image_metrics(flat(0), flat(0, 32))


def test_distances_to_flat_references() -> None:
    distances = nearest_distances(np.stack([flat(0), flat(255)]), np.stack([flat(51), flat(255)]))
    np.testing.assert_allclose(distances, [0.2, 0.0], atol=1e-6)


def test_accuracy_counts_the_nearest_class() -> None:
    references = {3: np.stack([flat(0)]), 5: np.stack([flat(255)])}
    metrics = reference_metrics(np.stack([flat(10), flat(10), flat(250)]), [3, 5, 5], references)
    assert metrics.accuracy == pytest.approx(2 / 3)
    assert metrics.distance == pytest.approx((10 + 245 + 5) / 3 / 255, abs=1e-6)
    with pytest.raises(RequestError, match="none of class 4"):
        reference_metrics(np.stack([flat(0)]), [4], references)


def test_the_error_map_is_four_times_the_largest_error() -> None:
    a, b = flat(100, 2), flat(100, 2)
    b[0, 0] = (100, 90, 105)
    b[1, 1] = (0, 0, 200)
    expected = np.zeros((2, 2, 3), dtype=np.uint8)
    expected[0, 0], expected[1, 1] = 40, 255
    np.testing.assert_array_equal(error_map(a, b), expected)


def test_a_contact_sheet_shows_every_picture() -> None:
    sheet = np.asarray(contact_sheet(["a", "b"], [("one", [flat(10), flat(20)]), ("two", [flat(30), flat(40)])], 64))
    for value in (10, 20, 30, 40):
        assert (sheet == value).all(axis=-1).sum() >= 60 * 60
    wrapped = np.asarray(contact_sheet(["a", "b"], [("one " * 20, [flat(10), flat(20)]), ("two", [flat(30)] * 2)], 64))
    assert wrapped.shape[1] == sheet.shape[1] and wrapped.shape[0] > sheet.shape[0] + 2 * 64


def test_a_plot_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "plot.png"
    with saved_figure(path, (2, 1)) as figure:
        figure.subplots().plot([1, 2])
    before = path.read_bytes()
    assert Image.open(path).size == (220, 110)
    monkeypatch.setattr(Image.Image, "save", full)  # which matplotlib writes by
    with pytest.raises(RequestError, match="cannot be written: No space left"), saved_figure(path, (2, 1)):
        pass
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_counted_work_of_a_small_model(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    model, dense = manifest.model, DENSE.resolve(manifest.default.schedule, manifest.model.depth)
    assert (model.width, model.mlp_width, model.depth) == (128, 512, 2)
    # Scale 1: 9 tokens, 1 + 9 keys.
    projections = 9 * (4 * 128 * 128 + 2 * 128 * 512 + 2 * 128 * 10)
    assert step_multiply_adds(model, dense, 1) == 2 * 2 * projections + 9 * 128 * (
        model.vocab_size + model.code_channels
    )
    pruned = manifest.resolved_plan
    assert chain_multiply_adds(model, pruned) < chain_multiply_adds(model, dense)
    skipping = PruningPlan("skip", ((-1, 1.0),)).resolve(manifest.default.schedule, model.depth)
    assert step_multiply_adds(model, skipping, 3) == 0


def test_a_bundle_is_exported_again_with_another_plan(tiny_bundle: Path, tmp_path: Path) -> None:
    report = export_again(tiny_bundle, tmp_path / "dense", DENSE, batches=(1,))
    assert set(report.errors) == {"step_02.onnx", "step_03.onnx"}  # the others are the same graphs
    with Pipeline.load(tmp_path / "dense") as dense, Pipeline.load(tiny_bundle) as pruned:
        assert not verify_bundle(dense).failures
        a, b = draw_side_by_side([dense, pruned], PICTURES, {})
    comparison = compare(a, b, PICTURES)
    assert [comparison.token_agreement[k] for k in range(3)] == [1.0, 1.0, 1.0]  # nothing is pruned before the last
    assert comparison.token_agreement[3] < 1
    assert math.isfinite(comparison.mean.psnr_db)
    assert comparison.speedup == pytest.approx(np.median(np.array(a.seconds) / np.array(b.seconds)))


def test_the_sweep_agrees_with_the_runtime(tiny_bundle: Path, tmp_path: Path) -> None:
    study = tune.Study(tiny_bundle, PICTURES, cfg=1.5)
    result = tune.sweep(study, [TINY_PLAN, PruningPlan("all", ((-1, 0.75),), -2, 0)])
    assert [c.plan.name for c in result.candidates] == ["all", "tiny"]  # by rising work
    result = tune.measure_front(study, result, tmp_path)
    for candidate in result.candidates:
        if candidate.on_front:
            assert candidate.measured is not None
            assert candidate.measured.mean.ssim == pytest.approx(candidate.metrics.ssim, abs=1e-3)
    assert result.candidates[0].on_front


def test_candidates_need_a_cache_before_the_pruned_scales() -> None:
    plans = tune.candidate_plans([(0.5,), (0.4, 0.5)], [-2, -3], [0, 1])
    assert {(p.fractions, p.cache_scale) for p in plans} == {
        (((-1, 0.5),), -2),
        (((-1, 0.5),), -3),
        (((-2, 0.4), (-1, 0.5)), -3),
    }
    ends = tune.candidate_plans([(0.5,)], [-2], [0], [-3, -1])
    assert [(plan.name, plan.unguided_from) for plan in ends] == [
        ("0.5-cache2-layer0", None),
        ("0.5-cache2-layer0-unguided3", -3),
        ("0.5-cache2-layer0-unguided1", -1),
    ]
    for arguments, option in ((([2], [0]), "--cache-scales"), (([-2], [0], [-1, 2]), "--unguided-from")):
        with pytest.raises(PlanError, match=f"{option}: got 2, expected -1 or less"):
            tune.candidate_plans([(0.5,)], *arguments)


def candidate(work: float, ssim: float, held: int | None = None) -> tune.Candidate:
    share = None if held is None else Share(held, 10)
    return tune.Candidate(PruningPlan(f"{work}"), work, ImageMetrics(30.0, ssim, 1.0), None, 10, share)


def test_the_best_are_the_front_and_some_all_along_it() -> None:
    front = [candidate(0.1 * i, 0.5 + 0.05 * i) for i in range(1, 6)]
    behind = [candidate(0.1 * i + 0.05, 0.4 + 0.05 * i) for i in range(1, 6)]
    assert tune.best([*behind, *front], 5) == front
    assert tune.best([*behind, *front], 3) == [front[4], front[2], front[0]]
    assert tune.best([*behind, *front], 1) == [front[4]]
    assert tune.best([*behind, *front], 7) == [*front, behind[4], behind[0]]
    shown = [candidate(0.1, 0.9, held=5), candidate(0.2, 0.8, held=9), candidate(0.3, 0.95, held=8)]
    assert tune.best(shown, 2) == shown[:2], "compliance comes first"


def measured(
    one: tune.Candidate,
    ssim: float,
    speedup: float,
    references: tuple[ReferenceMetrics, ReferenceMetrics] | None = None,
) -> tune.Candidate:
    """That candidate on the front."""
    comparison = Comparison(PICTURES, (), ImageMetrics(30.0, ssim, 1.0), {}, speedup, (1.0, 0.5), references)
    return dataclasses.replace(one, on_front=True, measured=comparison)


def test_choose_takes_the_fastest_that_holds() -> None:
    dense, near, far = (ReferenceMetrics(distance, 0.5) for distance in (0.1, 0.108, 0.125))
    fast = measured(candidate(0.1, 0.9), 0.91, 3.0, (dense, far))
    slow = measured(candidate(0.2, 0.92), 0.93, 2.0, (dense, near))
    unmeasured = dataclasses.replace(candidate(0.3, 0.99), on_front=True)
    result = tune.Sweep((fast, slow, unmeasured))
    for min_ssim, max_drop, expected in (
        (0.0, 0.3, fast),
        (0.0, 0.1, slow),
        (0.92, 0.3, slow),
        (0.0, 0.05, None),
        (0.94, 0.3, None),
    ):
        assert tune.choose(result, min_ssim=min_ssim, max_drop=max_drop) == expected


def test_a_plan_may_lose_so_many_prompts() -> None:
    # The less work, the faster, and the fewer prompts hold.
    found = [measured(candidate(0.1 * (i + 1), 0.9, held=8 + i), 0.95, 9.0 - i) for i in range(3)]
    result = tune.Sweep(tuple(found), Share(10, 10))
    for max_loss, expected in ((0.0, 2), (0.11, 1), (0.21, 0)):
        assert tune.choose(result, min_ssim=0.9, max_drop=0, max_loss=max_loss) == found[expected]
    assert tune.choose(result, min_ssim=0.96, max_drop=0, max_loss=1) is None


def test_half_of_the_candidates_are_left_out_in_every_round() -> None:
    assert tune.rounds(8, 6, None) == tune.rounds(8, 6, 48) == [(range(8), 6)]
    assert tune.rounds(8, 6, 47) == [(range(4), 6), (range(4, 8), 3)]
    assert [alive for _, alive in tune.rounds(8, 6, 16)] == [6, 3, 2, 1, 1, 1, 1]
    with pytest.raises(PlanError, match="--budget 15: 6 candidates and 8 pictures need 16 at least"):
        tune.rounds(8, 6, 15)


@pytest.fixture(scope="module")
def other_size(export_once: Callable[..., tuple[Path, object]]) -> Path:
    from conftest import tiny_states

    source = VARSource.from_state(*tiny_states(patch_nums=(1, 2)))
    return export_once("other_size", source, ExportOptions())[0]


def test_compare_command(tiny_bundle: Path, other_size: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(tiny_bundle), str(tiny_bundle), "--class", "1", "--seeds", "2"]
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "c.png"), "--json", str(tmp_path / "c.json")])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "c.json").read_text())
    assert data == json.loads(done.output.splitlines()[-1])
    assert data["mean"] == {"psnr_db": None, "ssim": 1.0, "vif": 1.0} and data["images"] == 2
    assert set(data["token_agreement"].values()) == {1.0}
    assert Image.open(tmp_path / "c.png").width > 3 * 256
    quick = CliRunner().invoke(main, [*arguments, "--no-vif"])
    assert json.loads(quick.output.splitlines()[-1])["mean"] == {"psnr_db": None, "ssim": 1.0, "vif": None}

    ignored = CliRunner().invoke(main, [*arguments, "--greedy"])
    assert ignored.exit_code == 2 and "give one of --greedy and --seeds" in ignored.output
    refused = CliRunner().invoke(main, ["compare", str(tiny_bundle), str(other_size), "--class", "1"])
    assert refused.exit_code == 1 and "bundles of one model only" in refused.output
    refused = CliRunner().invoke(main, [*arguments, "--class", "99"])
    assert refused.exit_code == 1 and "class 99" in refused.output
    refused = CliRunner().invoke(main, [*arguments, "--references", str(tmp_path / "none")])
    assert refused.exit_code == 1 and "no PNG" in refused.output


def test_tune_command(tiny_bundle: Path, tmp_path: Path) -> None:
    for label in (1, 2):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        Image.fromarray(flat(100 * label)).save(tmp_path / "photos" / str(label) / "a.png")
    arguments = ["tune", str(tiny_bundle), "--class", "1", "--class", "2", "--seeds", "1", "--fractions", "0.5"]
    arguments += ["--cache-scales", "-2", "--first-layers", "0,1", "--unguided-from", "-2"]
    arguments += ["--references", str(tmp_path / "photos")]
    arguments += ["--out", str(tmp_path / "tuned")]
    marked = tmp_path / "marked.json"
    marked.write_text(json.dumps(PruningPlan("wasteful", ((-1, 0.1),), -2, 1).to_json()))
    done = CliRunner().invoke(main, [*arguments, "--min-ssim", "0", "--max-drop", "10", "--plan", str(marked)])
    assert done.exit_code == 0, done.output
    assert "wasteful" in done.output
    plan = PruningPlan.from_json(json.loads((tmp_path / "tuned" / "plan.json").read_text()))
    record = json.loads((tmp_path / "tuned" / "tune.json").read_text())
    assert record["chosen"] == plan.name and len(record["candidates"]) == 5
    place = json.loads((tmp_path / "tuned" / "plan.json").read_text())["measured"]
    (found,) = [c for c in record["candidates"] if c["plan"]["name"] == plan.name]
    assert (place["bundle"], place["images"]) == (str(tiny_bundle), 2)
    assert all(place[key] == found[key] for key in ("work", "metrics", "compliance", "measured"))
    assert place["measured"]["speedup"] > 0
    (extra,) = (candidate for candidate in record["candidates"] if candidate["is_marked"])
    assert extra["plan"]["name"] == "wasteful" and extra["measured"] is not None
    assert Image.open(tmp_path / "tuned" / "front.png").width > 500
    assert sorted(p.name for p in (tmp_path / "tuned").iterdir()) == ["front.png", "plan.json", "tune.json"]

    unknown = CliRunner().invoke(main, [*arguments, "--plan", "no-such-plan"])
    assert unknown.exit_code == 1 and "--plan 'no-such-plan': neither a preset" in unknown.output
    strict = CliRunner().invoke(main, [*arguments, "--first-layers", "0", "--min-ssim", "1"])
    assert strict.exit_code == 1 and "--min-ssim" in strict.output
    assert not (tmp_path / "tuned" / "plan.json").exists()
