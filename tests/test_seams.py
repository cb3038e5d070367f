"""A backbone, a backend, a precision and a target from outside the package: a module and a registration each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient

from conftest import TINY_PLAN
from fastvar_trt.export.build.registry import TARGETS, Target, build_targets
from fastvar_trt.export.exporter import ExportOptions, ExportReport, load_bundle_model
from fastvar_trt.export.models.matrix import FORMATS
from fastvar_trt.export.models.registry import FAMILIES, load_plan
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import Pipeline, Request, RequestError, Service, read_manifest
from fastvar_trt.runtime.backends import BACKENDS
from fastvar_trt.runtime.engines import read_engines
from fastvar_trt.runtime.manifest import MANIFEST_FILE, WEIGHTS_FILE
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.runtime.weights import read_layout
from fastvar_trt.serving.http.app import create_app
from fastvar_trt.tools.cli import command as cli_command
from fastvar_trt.tools.cli import main as fastvar
from fastvar_trt.tools.cli.export import main as fastvar_export
from toys.backbone import FAMILY, ToySource
from toys.backend import TOY
from toys.precision import FORMAT, TOY8
from toys.target import ToyBuilder

Export = Callable[..., tuple[Path, ExportReport]]


@pytest.fixture
def toy_precision() -> Iterator[None]:
    with FORMATS.registered(FORMAT), PRECISIONS.registered(TOY8):
        yield


@pytest.fixture
def toy_target() -> Iterator[None]:
    with TARGETS.registered(Target("toy", ToyBuilder)):
        yield


def test_a_backbone(export_once: Export, tmp_path: Path) -> None:
    """Bits from classes, pruned: exported, verified, drawn, served, described and given another plan."""
    with FAMILIES.registered(FAMILY):
        bundle = tmp_path / "b"
        done = CliRunner().invoke(fastvar_export, ["toy", "--sides", "1,2,4", "--out", str(bundle)])
        assert done.exit_code == 0, done.output
        assert "fastvar-export toy --sides" in CliRunner().invoke(fastvar_export, ["--help"]).output
        assert read_manifest(bundle).default.plan == load_plan("toy-half")
        with Pipeline.load(bundle) as pipe:
            assert not verify_bundle(pipe).failures
            drawn = pipe.generate([0, 1, 2], seeds=5)
            assert drawn.images.shape == (3, 16, 16, 3) and drawn.tokens[2].shape == (3, 16, 4)
            assert (drawn.images[0] != drawn.images[1]).any()
            with pytest.raises(RequestError, match="draws bits, which have two values"):
                pipe.generate([0], top_k=3)
            with TestClient(create_app(Service(Pipeline.load(bundle)))) as client:
                schema = client.get("/openapi.json").json()["components"]["schemas"]["ImageBody"]
                assert schema["properties"]["label"]["maximum"] == 2 and "top_k" not in schema["properties"]
                assert client.post("/v1/images", json={"label": 1}).status_code == 200
        assert "3 classes, 4 bits per token" in CliRunner().invoke(fastvar, ["inspect", str(bundle)]).output
        model, _ = load_bundle_model(bundle)
        assert model.schedule == ((1, 1), (2, 2), (4, 4))
    bundle, _ = export_once("toy_half", ToySource(), ExportOptions(plan=load_plan("none"), precision="fp16"))
    assert read_manifest(bundle).precision == "fp16"


@pytest.mark.usefixtures("toy_precision")
def test_a_precision(tiny_source: VARSource, tiny_bundle: Path, export_once: Export) -> None:
    """Quantised matrices lie once in the weights file, and the graphs compute what PyTorch computes with them."""
    bundle, report = export_once("toy8", tiny_source, ExportOptions(plan=TINY_PLAN, precision="toy8"))
    assert max(error.relative_error for error in report.errors.values()) < PRECISIONS["fp32"].tolerance.error / 10
    ours, fp32 = (read_layout(path / WEIGHTS_FILE) for path in (bundle, tiny_bundle))
    matrices = {name.removesuffix("_q"): place for name, place in ours.items() if name.endswith(".weight_q")}
    assert matrices and not matrices.keys() & ours.keys()
    assert all(fp32[name].num_bytes == 4 * place.num_bytes for name, place in matrices.items())
    with Pipeline.load(bundle) as quantised, Pipeline.load(tiny_bundle) as full:
        assert not verify_bundle(quantised).failures
        a, b = (pipe.generate([1], seeds=1, return_logits=True) for pipe in (quantised, full))
    assert a.logits is not None and b.logits is not None
    difference = np.abs(a.logits[0] - b.logits[0]).max() / np.abs(b.logits[0]).max()
    assert 1e-4 < difference < 0.1  # rounded, and not to something else


@pytest.mark.usefixtures("toy_target")
def test_a_target_and_a_backend(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    done = CliRunner().invoke(fastvar, ["build", str(bundle), "--target", "toy,cpu"])
    assert done.exit_code == 0, done.output
    assert "12 graphs for toy built in" in done.output and "12 graphs for cpu built in" in done.output
    shown = CliRunner().invoke(fastvar, ["inspect", str(bundle)]).output
    assert "step_03_b1.toy" in shown and "weights.prepacked" in shown
    with BACKENDS.registered(TOY):
        with Pipeline.load(bundle, backend="toy", greeting="good day") as toy, Pipeline.load(bundle) as usual:
            assert toy.backend.describe() == {"backend": "toy", "greeting": "good day"}
            assert not verify_bundle(toy).failures
            requests = [Request(label=i, seed=i, cfg=2.0) for i in range(3)]
            np.testing.assert_array_equal(toy.draw(requests).tokens[3], usual.draw(requests).tokens[3])
        help_text = CliRunner().invoke(_with_runtime_options(), ["--help"]).output
        assert "--greeting" in help_text and "toy" in help_text
    (report,) = build_targets(bundle, "toy")
    assert not report.built and len(report.kept) == 12
    for scale in (1, 2):
        (bundle / "engines" / "toy" / f"step_{scale:02d}_b1.toy").write_bytes(b"damaged")

    def stop(graph: str, phase: str, share: float) -> None:
        if (graph, phase) == ("step_02.onnx", "build"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_targets(bundle, "toy", stop)
    assert len(read_engines(bundle, "toy").records) == 12  # what was there stays on record until it is replaced
    (report,) = build_targets(bundle, "toy")
    assert [record.graph for record in report.built] == ["step_02.onnx"]
    (bundle / "engines" / "toy" / "step_01_b2.toy").write_bytes(b"damaged")
    (report,) = build_targets(bundle, "toy")
    assert [record.graph for record in report.built] == ["step_01_b2.onnx"]


def _with_runtime_options() -> object:
    import click

    @click.command()
    @cli_command.runtime_options
    def run(runtime: cli_command.RuntimeOptions) -> None:
        """Nothing."""

    return run


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="cpu: is registered already"):
        TARGETS.register(Target("cpu", ToyBuilder))
    assert "toy" not in TARGETS


def test_a_bundle_of_two_variants(
    tiny_source: VARSource, tiny_bundle: Path, export_once: Export, tmp_path: Path
) -> None:
    """Over one weights file: two plans, the graphs that they share once, each drawn as in a bundle of its own."""
    dense, _ = export_once("dense", tiny_source, ExportOptions(batches=(1, 2)))
    manifests = [read_manifest(path) for path in (tiny_bundle, dense)]
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    own = {name for name, spec in manifests[1].files.items() if manifests[0].files.get(name) != spec}
    renamed = {name: f"dense_{name}" for name in own if name.startswith("step_")}
    for name, other in renamed.items():
        shutil.copyfile(dense / name, bundle / other)
    graphs = tuple(
        dataclasses.replace(graph, file=renamed.get(graph.file, graph.file)) for graph in manifests[1].default.graphs
    )
    variants = (
        dataclasses.replace(manifests[0].default, name="pruned"),
        dataclasses.replace(manifests[1].default, name="dense", graphs=graphs),
    )
    files = {**manifests[0].files, **{other: manifests[1].files[name] for name, other in renamed.items()}}
    both = dataclasses.replace(manifests[0], variants=variants, files=files)
    (bundle / MANIFEST_FILE).write_text(json.dumps(both.to_json()))
    assert len(both.graphs) == len(manifests[0].graphs) + len(renamed) < 2 * len(manifests[0].graphs)
    with Pipeline.load(bundle) as pipe, Pipeline.load(dense) as alone, Pipeline.load(tiny_bundle) as first:
        for name, reference in (("dense", alone), ("pruned", first), (None, first)):
            ours = pipe.generate([1, 2, 3], seeds=4, variant=name)
            np.testing.assert_array_equal(ours.images, reference.generate([1, 2, 3], seeds=4).images)
        assert set(pipe.buffer_shapes) == {(name, batch) for name in ("pruned", "dense") for batch in (1, 2)}
        with pytest.raises(RequestError, match="variant: got 'half', this bundle holds pruned, dense"):
            pipe.generate([1], variant="half")
