"""The model repository for Triton, through a stand-in for its Python backend."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from conftest import INFINITY_PLAN, tiny_infinity
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.runtime import BackendError, ExportError, Pipeline, read_manifest
from fastvar_trt.runtime.backends import BACKENDS, BackendEntry
from fastvar_trt.serving.triton.repository import triton_config, write_triton_model
from fastvar_trt.tools.cli.export import main
from faulty_backend import FaultyBackend
from triton_stub import StubServer, model_config, running

Export = Callable[..., tuple[Path, ExportReport]]


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    # Of a copy: files are linked, and onnx_ir reads none that has several links.
    write_triton_model(Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundle") / tiny_bundle.name)), folder)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[StubServer]:
    with running(repository, "tiny") as stub:
        yield stub


def test_the_configuration_is_one(server: StubServer) -> None:
    config = server.config
    assert (config.backend, config.max_batch_size) == ("python", 2)
    assert list(config.dynamic_batching.preferred_batch_size) == [2]
    assert [spec.name for spec in config.input if not spec.optional] == ["LABEL"]
    assert list(config.output[0].dims) == [128, 128, 3]


def test_pictures_are_those_of_the_pipeline(server: StubServer, tiny_bundle: Path) -> None:
    with Pipeline.load(tiny_bundle) as pipe:
        expected = pipe.generate([3, 4], seeds=[7, 2**64 - 1], cfg=[None, 2.5], top_k=[None, 9]).images
    both = server.infer(
        {"LABEL": [[3]], "SEED": [[7]]}, {"LABEL": [[4]], "SEED": [[2**64 - 1]], "CFG": [[2.5]], "TOP_K": [[9]]}
    )
    np.testing.assert_array_equal(np.concatenate([found["IMAGE"] for found in both]), expected)
    assert [int(found["SEED_USED"][0, 0]) for found in both] == [7, 2**64 - 1]
    (one,) = server.infer({"LABEL": [[3], [4]], "SEED": [[7], [1]]})  # a client's own batch
    np.testing.assert_array_equal(one["IMAGE"][0], expected[0])
    drawn = [server.infer({"LABEL": [[3]]})[0] for _ in range(2)]
    assert drawn[0]["SEED_USED"][0, 0] != drawn[1]["SEED_USED"][0, 0]


def test_a_bad_request_does_not_spoil_its_neighbour(server: StubServer, tiny_bundle: Path) -> None:
    good, bad = server.infer({"LABEL": [[3]], "SEED": [[7]]}, {"LABEL": [[10]]})
    assert bad == {"error": "RequestError: class 10: this model has 10 classes, 0 to 9"}
    with Pipeline.load(tiny_bundle) as pipe:
        np.testing.assert_array_equal(good["IMAGE"], pipe.generate([3], seeds=[7]).images)


def test_a_backend_that_fails_once(repository: Path) -> None:
    backend = FaultyBackend()
    entry = BackendEntry("faulty", lambda device, profile: backend)
    with BACKENDS.registered(entry), running(repository, "tiny", backend="faulty") as server:
        backend.before = backend.fails(BackendError("the GPU is lost"), name="step_01", batch=2)
        both = server.infer({"LABEL": [[1]]}, {"LABEL": [[2]]})
        assert all(found["IMAGE"].shape == (1, 128, 128, 3) for found in both)  # drawn one by one
        (found,) = server.infer({"LABEL": [[1], [2]]})
        assert found == {"error": "BackendError: the GPU is lost"}


def test_models_of_text(export_once: Export, tmp_path: Path, rng: np.random.Generator) -> None:
    options = ExportOptions(plan=INFINITY_PLAN, batches=(1, 4))
    shared, _ = export_once("infinity", tiny_infinity(), options)
    bundle = Path(shutil.copytree(shared, tmp_path / "bundles" / shared.name))
    write_triton_model(bundle, tmp_path)
    features = [rng.standard_normal((count, 128)).astype(np.float32) for count in (3, 5)]
    with running(tmp_path, "infinity") as stub:
        assert list(stub.config.input[0].dims) == [-1, 128]
        found = stub.infer(
            {"TEXT_FEATURES": features[0][None], "SEED": [[1]]},
            {"TEXT_FEATURES": features[1][None], "NEGATIVE_TEXT_FEATURES": features[0][None], "SEED": [[2]]},
        )
    with Pipeline.load(bundle) as pipe:
        expected = pipe.generate(text_features=features, negative_text_features=[None, features[0]], seeds=[1, 2])
    np.testing.assert_array_equal(np.concatenate([f["IMAGE"] for f in found]), expected.images)


def test_prompts_are_inputs_where_the_bundle_has_its_text_encoder(export_once: Export) -> None:
    bundle, _ = export_once("infinity", tiny_infinity(), ExportOptions(plan=INFINITY_PLAN, batches=(1, 4)))
    manifest = read_manifest(bundle)
    encoder = dataclasses.replace(manifest.graphs[0], kind="text_encoder", scale=None)
    config = model_config(triton_config('a "b"', dataclasses.replace(manifest, auxiliary=(encoder,))))
    assert config.name == 'a "b"'
    assert [spec.name for spec in config.input][:2] == ["PROMPT", "NEGATIVE_PROMPT"]


def test_the_bundle_is_linked_and_its_replacement_is_not_seen(repository: Path, tiny_bundle: Path) -> None:
    held = repository / "tiny" / "1" / "bundle"
    assert {p.name for p in held.iterdir()} == {p.name for p in tiny_bundle.iterdir()}
    assert (held / "weights.safetensors").stat().st_nlink == 2


def test_a_model_is_replaced_by_force_only(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundle, bundle)
    command = ["bundle", "--from", str(bundle), "--triton", str(tmp_path / "r")]
    done = run(main, command)
    assert done.exit_code == 0, done.output
    assert "tritonserver --model-repository" in done.output
    again = run(main, command)
    assert again.exit_code == 1
    assert "exists already; give another folder, or --force" in again.output
    assert run(main, [*command, "--force"]).exit_code == 0
    assert run(main, [*command, "--prune", "none"]).exit_code == 2
    (tmp_path / "r" / "b" / "1" / "bundle" / "manifest.json").unlink()
    foreign = run(main, [*command, "--force"])
    assert foreign.exit_code == 1
    assert "holds no bundle, so --force does not replace it" in foreign.output

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(ExportError, match="No space left on device; nothing was kept"):
        write_triton_model(bundle, tmp_path / "r2")
    assert list((tmp_path / "r2").iterdir()) == []
