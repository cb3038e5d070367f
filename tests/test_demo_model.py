"""The checkpoint that comes with the package: what it is, and that it draws what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.models.registry import load_plan
from fastvar_trt.export.models.var.demo import DEMO_FOLDER, demo_source
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.plan import DENSE
from fastvar_trt.tools.cli.pictures import load_references
from fastvar_trt.tools.measure.compare import Pictures, compare, draw_side_by_side
from fastvar_trt.tools.measure.quality import reference_metrics
from fastvar_trt.tools.train_demo.photographs import PHOTOGRAPHS

CLASSES, SEEDS = list(range(len(PHOTOGRAPHS))) * 2, [0] * len(PHOTOGRAPHS) + [1] * len(PHOTOGRAPHS)
PICTURES = Pictures(tuple(CLASSES), tuple(SEEDS))


@pytest.fixture(scope="module")
def demo_bundle(export_once: Callable[..., tuple[Path, ExportReport]]) -> Path:
    return export_once("demo", demo_source(), ExportOptions(plan=load_plan("fastvar-demo")))[0]


def test_the_card_says_what_the_files_are() -> None:
    source, card = demo_source(), json.loads((DEMO_FOLDER / "card.json").read_text())
    assert [c["name"] for c in card["classes"]] == [p.name for p in PHOTOGRAPHS] and source.config.num_classes == len(
        PHOTOGRAPHS
    )
    assert list(source.config.patch_nums) == card["config"]["patch_nums"]
    assert source.config.depth == card["config"]["depth"] and source.config.width == card["config"]["width"]
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) < 30e6


def test_it_draws_its_classes(demo_bundle: Path) -> None:
    with Pipeline.load(demo_bundle) as pipe:
        images = pipe.generate(CLASSES, seeds=SEEDS, cfg=pipe.manifest.sampling.cfg).images
    metrics = reference_metrics(images, CLASSES, load_references("photographs", CLASSES, 256))
    assert metrics.accuracy >= 0.9
    assert np.ptp(images.reshape(len(images), -1), axis=1).min() > 100  # no grey picture among them


def test_pruned_pictures_are_near_the_dense_ones(demo_bundle: Path, tmp_path: Path) -> None:
    from fastvar_trt.export.exporter import export_again

    export_again(demo_bundle, tmp_path / "dense", DENSE)
    with Pipeline.load(tmp_path / "dense") as dense, Pipeline.load(demo_bundle) as pruned:
        a, b = draw_side_by_side([dense, pruned], PICTURES, {})
    comparison = compare(a, b, PICTURES)
    assert comparison.mean.ssim > 0.8
    assert all(value == 1.0 for scale, value in comparison.token_agreement.items() if scale < 8)
