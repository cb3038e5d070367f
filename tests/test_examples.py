"""The examples run, on a small bundle of the model that comes with the package."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from conftest import ROOT
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.models.infinity.family import load_scenes
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.plan import PruningPlan
from fastvar_trt.tools.measure.evaluate import load_checker

Export = Callable[..., tuple[Path, ExportReport]]
PROMPT = "a red sphere on sand"


@pytest.fixture(scope="module")
def bundle(export_once: Export) -> Path:
    """256x256, its last scale pruned, with an image encoder."""
    plan = PruningPlan("half", ((-1, 0.5),), cache_scale=-2, first_layer=2)
    path, _ = export_once("small_scenes", load_scenes("0.06M").with_encoder(), ExportOptions(plan, compare=False))
    return path


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    for path in (ROOT / "examples").glob("*.py"):
        sys.modules.pop(path.stem, None)


def run(name: str, *arguments: object) -> Any:
    module = importlib.import_module(name)
    module.main(*map(str, arguments))
    return module


def test_batches_and_previews(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\n{'very ' * 60}blue cube\ntwo cubes on snow\n")
    run("batch_prompts", bundle, tmp_path / "prompts.txt", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0001.png", "0004.png"]
    told = capsys.readouterr().out
    assert "line 3 is left out: prompt: got" in told and "2 pictures in" in told
    run("stream_previews", bundle, PROMPT, tmp_path / "previews")
    names = sorted(p.name for p in (tmp_path / "previews").iterdir())
    assert names == ["picture.png", "scale_01.png", "scale_03.png", "scale_05.png"]
    with Pipeline.load(bundle) as pipe:
        expected = pipe.generate(prompts=[PROMPT], seeds=3).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "previews" / "picture.png")), expected)


def test_plans_backends_and_checkers(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("compare_plans", bundle, bundle, PROMPT)
    assert "times as fast, the same picture" in capsys.readouterr().out
    module = run("own_backend", bundle, PROMPT)
    try:
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == ["text_encoder 1", "condition 1", "step_00 1"] and lines[-1] == "decoder 1"
        with pytest.raises(ValueError, match="counting"):  # by name, once
            module.main(str(bundle), PROMPT)
    finally:
        module.BACKENDS._items.pop("counting")
    checker = load_checker("own_checker:check")
    light = np.full((8, 8, 3), 200, np.uint8)
    assert checker(light, {"brighter_than": 120}) == {"brightness": True}
    assert checker(light, {"brighter_than": 220}) == {"brightness": False}


def test_edits(bundle: Path, tmp_path: Path) -> None:
    with Pipeline.load(bundle) as pipe:
        drawn = pipe.generate(prompts=[PROMPT], seeds=1).images[0]
    Image.fromarray(drawn).save(tmp_path / "in.png")
    run("edit_picture", bundle, tmp_path / "in.png", "a blue cube on sand", tmp_path / "out")
    edited, first, second = (
        np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) for name in ("edited", "variation_1", "variation_2")
    )
    np.testing.assert_array_equal(edited[:, :170], drawn[:, :170])
    assert (edited[:, 180:] != drawn[:, 180:]).any() and (first != second).any()


def test_a_service_of_one_s_own(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUNDLE", str(bundle))
    module = importlib.import_module("fastapi_service")
    with TestClient(module.app) as client:
        answer = client.get("/picture", params={"prompt": PROMPT, "seed": 3})
        assert answer.status_code == 200
        assert client.get("/picture", params={"prompt": " "}).status_code == 422
    with Pipeline.load(bundle) as pipe:
        expected = pipe.generate(prompts=[PROMPT], seeds=3).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), expected)


def test_onnxruntime_alone_draws_the_same(bundle: Path) -> None:
    module = importlib.import_module("onnxruntime_alone")
    assert "fastvar_trt" not in Path(module.__file__).read_text()
    with Pipeline.load(bundle, engines="off") as pipe:
        expected = pipe.generate(prompts=[PROMPT], greedy=True).images[0]
    np.testing.assert_array_equal(module.draw(bundle, PROMPT), expected)


def test_every_example_is_listed_and_run() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    told = (ROOT / "examples" / "README.md").read_text()
    here = Path(__file__).read_text()
    assert all(f"`{name}.py`" in told and f'"{name}' in here for name in names)
