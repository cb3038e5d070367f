"""One copy of the weights for all sessions, prepacked or not, on the oldest and the newest ONNX Runtime that we allow.

A minor release of it broke this without an error: what it cannot map, it copies, once per session.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from conftest import ROOT, thorough
from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import read_manifest
from fastvar_trt.runtime.manifest import WEIGHTS_FILE
from fastvar_trt.runtime.weights import read_layout
from fastvar_trt.tools.random_checkpoints import random_checkpoint

SCRIPT = Path(__file__).parent / "weights_memory.py"
# `make test` puts the oldest ONNX Runtime that pyproject.toml allows there, over the packages of this environment.
OLDEST = ROOT / ".venv" / "oldest" / "bin" / "python"
PYTHONS = {"newest": Path(sys.executable), "oldest": OLDEST}


@pytest.fixture(scope="module")
def wide_source() -> VARSource:
    """One layer of 1024 channels: 91 MiB of weights in three steps.

    The head's odd width puts what follows it in the packed file off any larger alignment than its own.
    """
    sizes = {"depth": 1, "width": 1024, "patch_nums": (1, 2, 3), "vocab_size": 80, "shared_aln": True}
    return VARSource.from_state(*random_checkpoint(**sizes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wide_bundle(wide_source: VARSource, export_once: Callable[..., tuple[Path, ExportReport]]) -> Path:
    return export_once("wide", wide_source, ExportOptions())[0]


def run(python: Path, bundle: Path, mode: str) -> str:
    done = subprocess.run([python, SCRIPT, bundle, mode], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("release", sorted(PYTHONS))
def test_no_session_copies_the_weights(wide_bundle: Path, tmp_path: Path, release: str, mode: str) -> None:
    python = PYTHONS[release]
    if not python.exists():
        pytest.skip(f"{python} is not there; `make test` makes it")
    bundle = Path(shutil.copytree(wide_bundle, tmp_path / "b"))
    if mode == "require":
        run(python, bundle, "build")
    found = json.loads(run(python, bundle, mode))
    if release == "oldest":
        assert found["onnxruntime"] == _floor()
    weights = read_manifest(bundle).files[WEIGHTS_FILE].num_bytes
    assert found["anonymous_bytes"] < 0.4 * weights, "three sessions that copy hold 1.5 times the weights"


def _floor() -> str:
    """The oldest release of ONNX Runtime that the extra `cpu` allows."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (requirement,) = extras["cpu"]
    found = re.fullmatch(r"onnxruntime>=([\d.]+)", requirement)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("precision", ["w8", thorough("w4"), "w8a8"])
@pytest.mark.parametrize("release", sorted(PYTHONS))
def test_no_session_copies_weights_of_few_bits(
    wide_source: VARSource,
    export_once: Callable[..., tuple[Path, ExportReport]],
    tmp_path: Path,
    release: str,
    precision: str,
) -> None:
    """Prepacked ones; without, ONNX Runtime dequantises whole matrices, in one arena for all sessions."""
    python = PYTHONS[release]
    if not python.exists():
        pytest.skip(f"{python} is not there; `make test` makes it")
    shared, _ = export_once(f"wide_{precision}", wide_source, ExportOptions(precision=precision, compare=False))
    bundle = Path(shutil.copytree(shared, tmp_path / "b"))
    run(python, bundle, "build")
    found = json.loads(run(python, bundle, "require"))
    matrices = sum(
        place.num_bytes for name, place in read_layout(bundle / WEIGHTS_FILE).items() if name.endswith("weight_q")
    )
    assert found["anonymous_bytes"] < matrices, "three sessions that copy hold three times the matrices"


def test_packed_blobs_can_be_mapped(wide_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(wide_bundle, tmp_path / "b"))
    build_targets(bundle, "cpu")
    offsets = set()
    for graph in read_manifest(bundle).graphs:
        model = onnx.load(bundle / "engines" / "cpu" / graph.file, load_external_data=False)
        for initializer in model.graph.initializer:
            for entry in initializer.external_data:
                if entry.key == "offset":
                    offsets.add(int(entry.value))
                elif entry.key.startswith("prepacked_"):
                    offsets |= {int(place.split(";")[0]) for place in entry.value.split("|")[1:]}
    assert len(offsets) > 10
    assert all(offset % 4096 == 0 for offset in offsets)
