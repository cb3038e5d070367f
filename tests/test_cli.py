"""The commands, from checkpoint files to pictures, and everything that a user can get wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from conftest import TINY_PATCH_NUMS, changed_json, run, tiny_states
from fastvar_trt.runtime import Pipeline, read_manifest
from fastvar_trt.runtime.manifest import MANIFEST_FILE, REFERENCE_FILE, WEIGHTS_FILE, FileSpec
from fastvar_trt.tools.cli import main as fastvar
from fastvar_trt.tools.cli.export import main as fastvar_export


def refused(result: Result, *messages: str, exit_code: int = 1) -> None:
    """That a command ended with that code and a message of one line, not with a traceback."""
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for message in messages:
        assert message in result.output


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "b"))


def last_json(result: Result) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(result.output.strip().splitlines()[-1])
    return data


def test_from_checkpoint_files_to_a_picture(tmp_path: Path) -> None:
    state, vae_state = tiny_states(patch_nums=(1, 3, 6), depth=1)
    torch.save(state, tmp_path / "var.pth")
    torch.save(vae_state, tmp_path / "vae.pth")
    plan = {"pruned": [{"scale": -1, "fraction": 0.25}], "cache_scale": 1}
    (tmp_path / "quarter.json").write_text(json.dumps(plan))
    out = tmp_path / "deep" / "b"
    exported = subprocess.run(
        [
            *(sys.executable, "-c", "from fastvar_trt.tools.cli.export import main; main()", "var", "--out", out),
            *("--checkpoint", tmp_path / "var.pth", "--vae", tmp_path / "vae.pth"),
            *("--prune", tmp_path / "quarter.json", "--max-top-k", "0"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert exported.returncode == 0, exported.stderr
    assert "5 graphs" in exported.stdout
    assert "Warning" not in exported.stderr
    assert read_manifest(out).default.plan.name == "quarter"

    result = run(fastvar, "verify", out)
    assert result.exit_code == 0, result.output
    assert "1 of 1 images compared to their end" in result.output

    tokens, png = tmp_path / "t.npz", tmp_path / "made" / "t.png"
    result = run(fastvar, "generate", out, "--class", 3, "--class", 1, "--class", 3, "--save-tokens", tokens, "-o", png)
    assert result.exit_code == 0, result.output
    assert "27/36" in result.output  # tokens kept of total
    assert last_json(result)["images"] == 3
    assert Image.open(png).size == (2 * 96, 2 * 96)  # a grid of 2 x 2
    with np.load(tokens) as saved, Pipeline.load(out) as pipe:
        expected = pipe.generate([3, 1, 3], return_float_images=True)
        assert sorted(saved) == ["f_hat", "image", "step_00", "step_01", "step_02"]
        np.testing.assert_array_equal(saved["step_02"], expected.tokens[2])
        np.testing.assert_array_equal(saved["f_hat"], expected.f_hat)
        np.testing.assert_array_equal(saved["image"], expected.float_images)
    drawn = np.asarray(Image.open(png))
    np.testing.assert_array_equal(drawn[:96, 96:], expected.images[1])
    assert (drawn[96:, 96:] == 0).all()


def test_inspect(bundle: Path) -> None:
    result = run(fastvar, "inspect", bundle, "--tensors")
    assert result.exit_code == 0, result.output
    assert "2 layers x 128" in result.output
    assert "past_k_1" in result.output
    data = json.loads(run(fastvar, "inspect", bundle, "--json").output)
    assert data["variants"][0]["schedule"] == [[n, n] for n in TINY_PATCH_NUMS]


def test_inspect_shows_what_can_be_read(bundle: Path) -> None:
    (bundle / "engines" / "cpu").mkdir(parents=True)
    (bundle / "engines" / "cpu" / "engines.json").write_text("{}")
    done = run(fastvar, "inspect", bundle, "--tensors")
    assert done.exit_code == 0
    assert "engines.json: damaged" in done.output and "step_02.onnx" in done.output


@pytest.mark.parametrize("command", [["verify"], ["generate", "--class", "1", "-o", "x.png"], ["inspect"]])
def test_a_bundle_that_is_none(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(fastvar, *command, tmp_path / "absent"), "no such folder")
    (tmp_path / "empty").mkdir()
    refused(run(fastvar, *command, tmp_path / "empty"), "no manifest.json in it")
    assert not (tmp_path / "x.png").exists()


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        (WEIGHTS_FILE, _damage, "weights.safetensors: its SHA-256 is not that on record"),
        (WEIGHTS_FILE, _truncate, "weights.safetensors: got "),
        ("step_02.onnx", Path.unlink, "step_02.onnx is missing"),
        ("step_02.onnx", _damage, "step_02.onnx: its SHA-256"),
        (MANIFEST_FILE, _truncate, "manifest.json: cannot be read as JSON"),
    ],
)
def test_damaged_bundles(bundle: Path, file: str, harm: Any, message: str, tmp_path: Path) -> None:
    harm(bundle / file)
    png = tmp_path / "x.png"
    png.write_bytes(b"the picture of before")
    refused(run(fastvar, "verify", bundle), message)
    refused(run(fastvar, "generate", bundle, "--class", 1, "-o", png), message)
    assert png.read_bytes() == b"the picture of before"


def test_a_manifest_of_another_version(bundle: Path) -> None:
    with changed_json(bundle / MANIFEST_FILE) as data:
        data["format_version"] = 99
    refused(run(fastvar, "verify", bundle), "format version: got 99, this release reads 2", "export the bundle again")


def test_a_manifest_of_format_1_names_the_command_that_makes_it_anew(bundle: Path) -> None:
    old = {"format_version": 1, "model": {"family": "var"}, "plan": {"name": "none"}, "precision": "fp16"}
    (bundle / MANIFEST_FILE).write_text(json.dumps({**old, "batches": [1, 4]}))
    command = (
        f"fastvar-export var --checkpoint FILE --vae FILE --prune none --precision fp16 --batch 1,4 --out {bundle}"
    )
    refused(run(fastvar, "verify", bundle), "format version: got 1, this release reads 2", command)


def _without_condition(data: dict[str, Any]) -> None:
    graphs = data["variants"][0]["graphs"]
    data["variants"][0]["graphs"] = [g for g in graphs if g["kind"] != "condition"]


def _without_a_step(data: dict[str, Any]) -> None:
    graphs = data["variants"][0]["graphs"]
    data["variants"][0]["graphs"] = [g for g in graphs if g["scale"] != 2]


def _in_another_order(data: dict[str, Any]) -> None:
    graphs = data["variants"][0]["graphs"]
    graphs[1], graphs[2] = graphs[2], graphs[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_condition, "got 0 of condition for batch 1, expected 1"),
        (_without_a_step, "got 0 of step_02 for batch 1, expected 1"),
        (_in_another_order, "those of batch 1 are not in the order in which they run"),
        (lambda data: data.update(variants=[]), "variants: expected one or more"),
        (lambda data: data.update(variants=data["variants"] * 2), "variants: expected one or more, each with a name"),
        (lambda data: data.update(batches=[]), "batches: got [], expected one or more"),
        (lambda data: data.update(batches=[1, 2, 3]), "got 0 of condition for batch 3, expected 1"),
        (lambda data: data["model"].update(condition="sound"), "'sound' is not a valid Condition"),
        (lambda data: data.update(precision="fp3"), "precision: got 'fp3'"),
        (lambda data: data["model"].update(num_classes="10"), "model.num_classes: got '10'"),
        (lambda data: data["sampling"].update(max_top_k=97), "sampling.max_top_k: got 97, expected 1 to 96"),
        (lambda data: data["variants"][0]["schedule"].pop(), "got 1 of step_03 for batch 1, expected 0"),
        (lambda data: data["files"].pop(WEIGHTS_FILE), "weights.safetensors is missing"),
        (lambda data: data["files"].pop("step_02.onnx"), "step_02.onnx is missing"),
    ],
)
def test_a_manifest_that_contradicts_itself(bundle: Path, change: Any, message: str) -> None:
    with changed_json(bundle / MANIFEST_FILE) as data:
        change(data)
    refused(run(fastvar, "inspect", bundle), "manifest.json: damaged", message)


@pytest.mark.parametrize("key", ["variants", "model", "files", "sampling"])
def test_a_manifest_without_a_field(bundle: Path, key: str) -> None:
    with changed_json(bundle / MANIFEST_FILE) as data:
        del data[key]
    refused(run(fastvar, "inspect", bundle), "damaged", key)


def test_verify_finds_a_bundle_that_computes_something_else(bundle: Path) -> None:
    with np.load(bundle / REFERENCE_FILE) as data:
        reference = dict(data)
    reference["logits_01"][0, 3, 5] += 0.1
    np.savez(bundle / REFERENCE_FILE, **reference)
    with changed_json(bundle / MANIFEST_FILE) as data:
        data["files"][REFERENCE_FILE] = dataclasses.asdict(FileSpec.of(bundle / REFERENCE_FILE))
    refused(
        run(fastvar, "verify", bundle), "does not compute what PyTorch computed: batch 1, step 1: logits differ by 0.1"
    )


def test_generate_refuses_what_it_cannot_draw(bundle: Path, tmp_path: Path) -> None:
    png = tmp_path / "x.png"
    refused(run(fastvar, "generate", bundle, "--class", 10, "-o", png), "class 10: this model has 10 classes, 0 to 9")
    refused(run(fastvar, "generate", bundle, "--class", 1, "--top-p", 3, "-o", png), "top_p: got 3.0")
    refused(run(fastvar, "generate", bundle, "--class", 1, "-o", tmp_path), "cannot be written")
    refused(run(fastvar, "generate", bundle, "-o", png), "give --class, --prompt or --text-features", exit_code=2)
    refused(run(fastvar, "generate", bundle, "--class", "cat", "-o", png), "not a valid integer", exit_code=2)
    refused(run(fastvar, "generate", bundle, "--class", 1, "--seed", -1, "-o", png), "--seed", exit_code=2)
    assert not png.exists()


def test_a_picture_that_cannot_be_saved_leaves_the_old_one(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png = tmp_path / "x.png"
    png.write_bytes(b"before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    refused(run(fastvar, "generate", bundle, "--class", 1, "-o", png), "x.png: cannot be written: No space left")
    assert png.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "x.png"]


def test_export_refuses_what_it_cannot_export(bundle: Path, tmp_path: Path) -> None:
    state, vae_state = tiny_states(depth=3)
    var, vae, out = tmp_path / "var.pth", tmp_path / "vae.pth", tmp_path / "out"
    torch.save(state, var)
    torch.save(vae_state, vae)
    base = ("var", "--checkpoint", var, "--vae", vae, "--out")
    refused(run(fastvar_export, "var", "--out", out), "Missing option '--checkpoint'", exit_code=2)
    refused(run(fastvar_export, "scenes", "--vae", vae, "--out", out), "No such option '--vae'", exit_code=2)
    refused(run(fastvar_export, "bundle", "--out", out), "Missing option '--from'", exit_code=2)
    refused(run(fastvar_export, "scenes", "--from", out, "--out", out), "No such option '--from'", exit_code=2)
    refused(run(fastvar_export, "bundle", "--from", out, "--out", out), "--out needs --prune", exit_code=2)
    unused = ("--out", out, "--lora-scale", 2)
    for source in (("bundle", "--from", bundle), ("var", "--checkpoint", var, "--vae", vae)):
        refused(run(fastvar_export, *source, *unused), "--lora-scale needs --lora", exit_code=2)
    refused(run(fastvar_export, "bundle", "--from", out), "give --out", exit_code=2)
    refused(run(fastvar_export, "stable-diffusion", "--out", out), "No such command 'stable-diffusion'", exit_code=2)
    refused(run(fastvar_export, *base, out, "--batch", "1,x"), "whole numbers separated by commas", exit_code=2)
    refused(run(fastvar_export, *base, out, "--batch", "0"), "expected sizes of 1 or more")
    refused(run(fastvar_export, *base, out, "--prune", "fastest"), "neither a preset (none, fastvar-var,")
    refused(run(fastvar_export, *base, out, "--config", "{"), "--config: neither JSON nor a JSON file")
    refused(run(fastvar_export, "var", "--checkpoint", vae, "--vae", vae, "--out", out), "not a VAR transformer")
    refused(run(fastvar_export, "var", "--checkpoint", tmp_path / "no", "--vae", vae, "--out", out), "no such file")
    before = sorted(p.name for p in bundle.iterdir())
    refused(run(fastvar_export, *base, bundle), "exists already; give another folder, or --force")
    refused(run(fastvar_export, *base, var), "exists already")
    refused(run(fastvar_export, *base, var, "--force"), "not a bundle, so --force does not replace it")
    refused(run(fastvar_export, *base, var / "b"), "cannot be written")
    assert sorted(p.name for p in bundle.iterdir()) == before
    assert not out.exists()


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["verify"], ["inspect"], ["build"]], ids=lambda c: " ".join(c) or "fastvar"
)
def test_help(command: list[str]) -> None:
    result = run(fastvar, *command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert not command or f"fastvar {command[0]} out/b" in result.output  # an example
    assert "fastvar-export var --checkpoint" in run(fastvar_export, "--help").output


def test_a_bundle_gets_another_plan(tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(fastvar_export, "bundle", "--from", tiny_bundle, "--batch", "1", "--out", tmp_path / "one")
    assert done.exit_code == 0, done.output
    assert "6 graphs (0 traced)" in done.output
    assert read_manifest(tmp_path / "one").batches == (1,)
    arguments = ("bundle", "--from", tiny_bundle, "--prune", "none", "--batch", "1")
    done = run(fastvar_export, *arguments, "--out", tmp_path / "dense")
    assert done.exit_code == 0, done.output
    assert "6 graphs (2 traced)" in done.output
    assert read_manifest(tmp_path / "dense").default.plan.name == "none"
    assert run(fastvar, "verify", tmp_path / "dense").exit_code == 0
    refused(run(fastvar_export, *arguments, "--out", tmp_path / "dense"), "exists already")
