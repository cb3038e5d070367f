"""`fastvar build --target cpu`: prepacked weights, when they are used and when they are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from conftest import TINY_PLAN, changed_json, thorough
from fastvar_trt.export.build import cpu as module
from fastvar_trt.export.build.base import BuildReport, build_bundle
from fastvar_trt.export.build.cpu import PACKED_FILE, CpuBuilder
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import BackendError, ExportError, Pipeline, read_manifest
from fastvar_trt.runtime.manifest import MANIFEST_FILE, WEIGHTS_FILE, FileSpec
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.tools.cli import main as fastvar


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "b"))
    result = CliRunner().invoke(fastvar, ["build", str(bundle), "--target", "cpu"])
    assert result.exit_code == 0, result.output
    assert "12 graphs for cpu built in" in result.output
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "b"))


def build_cpu(bundle: Path) -> BuildReport:
    return build_bundle(bundle, CpuBuilder())


def uses_engines(pipe: Pipeline) -> bool:
    return bool(pipe.backend.describe()["prepacked"])


def test_engines_compute_what_the_graphs_compute(built: Path) -> None:
    with Pipeline.load(built, engines="off") as plain, Pipeline.load(built, engines="require") as packed:
        assert not uses_engines(plain)
        assert uses_engines(packed)
        expected, got = (p.generate([1, 2, 3], seeds=4, return_float_images=True) for p in (plain, packed))
    for k in range(4):
        np.testing.assert_array_equal(got.tokens[k], expected.tokens[k])
    np.testing.assert_allclose(got.float_images, expected.float_images, atol=1e-5)


def test_all_graphs_share_one_packed_file(built: Path) -> None:
    folder = built / "engines" / "cpu"
    assert {p.name for p in folder.iterdir()} == {
        PACKED_FILE,
        "engines.json",
        *(g.file for g in read_manifest(built).graphs),
    }
    # The original matrices and their packed form, once each, for 12 graphs.
    assert (folder / PACKED_FILE).stat().st_size < 2.5 * (built / WEIGHTS_FILE).stat().st_size


def test_fresh_engines_are_not_built_again(built: Path) -> None:
    assert not build_cpu(built).built
    result = CliRunner().invoke(fastvar, ["build", str(built), "--target", "cpu"])
    assert "up to date" in result.output
    with Pipeline.load(built) as pipe:  # the default uses them
        assert uses_engines(pipe)


def _change_graph(bundle: Path) -> None:
    """Another export in the same folder: the graph's hash is no longer the one that was built from."""
    with changed_json(bundle / "engines" / "cpu" / "engines.json") as data:
        data["engines"][3]["graph_sha256"] = "0" * 64


def _change_weights(bundle: Path) -> None:
    """Another checkpoint of the same sizes: graphs, sizes and offsets are the same, weights and their hash are not."""
    path = bundle / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with changed_json(bundle / MANIFEST_FILE) as manifest:
        manifest["files"][WEIGHTS_FILE] = dataclasses.asdict(FileSpec.of(path))


def _drop_engine(bundle: Path) -> None:
    with changed_json(bundle / "engines" / "cpu" / "engines.json") as data:
        del data["engines"][4]


def _other_processor(bundle: Path) -> None:
    with changed_json(bundle / "engines" / "cpu" / "engines.json") as data:
        data["engines"][0]["built_with"]["processor"] = "another"


def _damage(bundle: Path) -> None:
    path = bundle / "engines" / "cpu" / PACKED_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_change_graph, "step_02.onnx was built from another step_02.onnx"),
        (_change_weights, "was built from another weights.safetensors"),
        (_drop_engine, "there is none for step_03.onnx"),
        (_other_processor, "was built with processor another, here is"),
        (_damage, "weights.prepacked: its SHA-256 is not that on record"),
        (lambda bundle: (bundle / "engines" / "cpu" / "step_01.onnx").unlink(), "step_01.onnx is missing"),
        (lambda bundle: (bundle / "engines" / "cpu" / "engines.json").write_text("{"), "engines.json: damaged"),
    ],
)
def test_engines_that_do_not_fit_are_refused_and_built_again(
    bundle: Path, harm: Callable[[Path], Any], reason: str
) -> None:
    harm(bundle)
    for mode in ("auto", "require"):  # nothing falls back silently
        with pytest.raises(BackendError, match=f"{reason}.*fastvar build"):
            Pipeline.load(bundle, engines=mode)
    with Pipeline.load(bundle, engines="off") as pipe:
        assert not uses_engines(pipe)
    assert build_cpu(bundle).built
    with Pipeline.load(bundle, engines="require") as pipe:
        assert uses_engines(pipe)


def test_required_engines_that_were_never_built(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="no engines of cpu were built; run `fastvar build"):
        Pipeline.load(tiny_bundle, engines="require")


def test_a_failed_build_keeps_the_engines_of_before(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _other_processor(bundle)
    before = sorted(p.name for p in (bundle / "engines" / "cpu").iterdir())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.onnx, "save", full)
    with pytest.raises(ExportError, match="No space left on device; what was built before is kept"):
        build_cpu(bundle)
    assert sorted(p.name for p in (bundle / "engines" / "cpu").iterdir()) == before
    assert [p.name for p in (bundle / "engines").iterdir()] == ["cpu"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from fastvar_trt.export.build.registry import build_targets
def progress(graph, phase, share):
    if (graph, phase) == ("step_01.onnx", "build"):
        os.kill(os.getpid(), signal.SIGKILL)
build_targets(Path(sys.argv[1]), "cpu", progress)
"""


@pytest.mark.parametrize("again", [True, False])
def test_a_killed_build_leaves_nothing_after_the_next(built: Path, tmp_path: Path, again: bool) -> None:
    """Nor before it, outside `engines/`; and the next build clears away even where it finds nothing to build."""
    bundle = Path(shutil.copytree(built, tmp_path / "b"))
    before = {p.name for p in bundle.iterdir()}
    _other_processor(bundle)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(bundle)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert {p.name for p in bundle.iterdir()} == before
    assert len(list((bundle / "engines").iterdir())) > 1
    if not again:
        shutil.copytree(built / "engines" / "cpu", bundle / "engines" / "cpu", dirs_exist_ok=True)
    assert bool(build_cpu(bundle).built) == again
    assert [p.name for p in (bundle / "engines").iterdir()] == ["cpu"]
    with Pipeline.load(bundle, engines="require") as pipe:
        assert not verify_bundle(pipe).failures


def test_a_bundle_that_lost_graphs_keeps_engines_for_the_others(built: Path, tmp_path: Path) -> None:
    """Engines share a file here: one that is used no more takes the others with it, and they are built anew."""
    bundle = Path(shutil.copytree(built, tmp_path / "b"))
    manifest = read_manifest(bundle)
    variant = dataclasses.replace(manifest.default, graphs=tuple(manifest.default.chain(1)))
    smaller = dataclasses.replace(manifest, batches=(1,), variants=(variant,))
    (bundle / MANIFEST_FILE).write_text(json.dumps(smaller.to_json()))
    assert len(build_cpu(bundle).built) == 6
    with Pipeline.load(bundle, engines="require") as pipe:
        assert not verify_bundle(pipe).failures


@pytest.mark.parametrize("precision", ["fp16", thorough("bf16")])
def test_half_precision_needs_engines_on_the_cpu(
    precision: str,
    tiny_source: VARSource,
    export_once: Callable[..., tuple[Path, ExportReport]],
    tmp_path: Path,
) -> None:
    original, _ = export_once(f"tiny_{precision}", tiny_source, ExportOptions(plan=TINY_PLAN, precision=precision))
    bundle = Path(shutil.copytree(original, tmp_path / "b"))
    with pytest.raises(BackendError, match=f"{precision}: ONNX Runtime .* CPU.*; run `fastvar build"):
        Pipeline.load(bundle)
    build_cpu(bundle)
    result = CliRunner().invoke(fastvar, ["verify", str(bundle), "--engines", "require"])
    assert result.exit_code == 0, result.output
