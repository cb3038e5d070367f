"""The rewrite of attention for the CPU: the same results, without its scores in memory, on every ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from conftest import ROOT, TINY_PLAN, thorough, tiny_infinity
from fastvar_trt.export.build.base import build_bundle
from fastvar_trt.export.build.cpu import CpuBuilder
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.passes import flash_attention
from fastvar_trt.runtime import Pipeline, read_manifest
from fastvar_trt.runtime.verify import verify_bundle

SCRIPT = Path(__file__).parent / "attention_memory.py"
PYTHONS = {"newest": Path(sys.executable), "oldest": ROOT / ".venv" / "oldest" / "bin" / "python"}


@pytest.mark.parametrize("release", sorted(PYTHONS))
def test_scores_are_not_held(release: str) -> None:
    """64 MiB of them."""
    python = PYTHONS[release]
    if not python.exists():
        pytest.skip(f"{python} is not there; `make test` makes it")
    done = subprocess.run([python, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["error"] < 1e-5
    assert found["with"] < 16 < 60 < found["without"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", thorough("bf16")])
def test_a_rewritten_bundle_draws_the_same(
    precision: str,
    export_once: Callable[..., tuple[Path, ExportReport]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of its attentions without a mask, which are too small to be rewritten otherwise."""
    options = ExportOptions(plan=TINY_PLAN, precision=precision)
    original, _ = export_once(f"flash_{precision}", tiny_infinity(), options)
    bundle = Path(shutil.copytree(original, tmp_path / "b"))
    monkeypatch.setattr(flash_attention, "_MIN_SCORE_BYTES", 0)
    build_bundle(bundle, CpuBuilder())
    manifest = read_manifest(bundle)
    for graph in manifest.default.chain(1):
        model = onnx.load(bundle / "engines" / "cpu" / graph.file, load_external_data=False)
        kinds = [node.op_type for node in model.graph.node]
        if graph.file.startswith("step"):
            assert kinds.count("MultiHeadAttention") == manifest.model.depth, graph.file
    with Pipeline.load(bundle, engines="require") as pipe:
        assert not verify_bundle(pipe).failures
