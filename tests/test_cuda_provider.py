"""ONNX Runtime's CUDA provider, the real one, over CUDA libraries that compute nothing: what it takes and launches."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from conftest import INFINITY_PLAN, ROOT, TINY_PLAN, tiny_infinity
from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.export.passes.batch_left_operands import BatchLeftOperands
from fastvar_trt.runtime.manifest import read_manifest

SITE = ROOT / ".venv" / "gpu"  # `make test` installs onnxruntime-gpu there, and compiles the libraries
Counts = dict[str, dict[str, Any]]  # graph -> what it launched and copied, or why it was refused


@pytest.fixture(scope="module")
def bundles(
    tiny_source: VARSource,
    export_once: Callable[..., tuple[Path, ExportReport]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """Small bundles of two families in several precisions, built for `cuda`."""
    if not (SITE / "stubs").is_dir():
        pytest.skip(f"{SITE} is not there; `make test` makes it where a compiler is")
    folder = tmp_path_factory.mktemp("cuda")
    var, infinity = functools.partial(ExportOptions, TINY_PLAN), functools.partial(ExportOptions, INFINITY_PLAN)
    made = []
    for key, source, options in (  # those that other tests export are theirs
        ("tiny", tiny_source, var(batches=(1, 2))),
        ("tiny_fp16", tiny_source, var("fp16")),
        ("tiny_bf16", tiny_source, var("bf16")),
        ("tiny_w8", tiny_source, var("w8-fp16")),
        ("tiny_w8a8", tiny_source, var("w8a8-bf16", compare=False, integer_kv=True)),
        ("infinity", tiny_infinity(), infinity(batches=(1, 4))),
        ("infinity_fp16", tiny_infinity(), infinity("fp16")),
        ("infinity_bf16", tiny_infinity(), infinity("bf16", compare=False)),
    ):
        shared, _ = export_once(key, source, options)
        made.append(Path(shutil.copytree(shared, folder / key)))
        build_targets(made[-1], "cuda")
    return made


def run(mode: str, bundles: list[Path]) -> dict[str, Counts]:
    """What `on_cuda_stubs.py` counts, by the bundles' names."""
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, (SITE, tests)))
    done = subprocess.run(
        [sys.executable, tests / "on_cuda_stubs.py", SITE / "stubs", mode, *bundles],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "CUDAExecutionProvider" in found["providers"]
    return {path.name: found[str(path)] for path in bundles}


@pytest.fixture(scope="module")
def launched(bundles: list[Path]) -> dict[str, Counts]:
    return run("launch", bundles)


def test_every_node_has_a_cuda_kernel(bundles: list[Path], launched: dict[str, Counts]) -> None:
    for path in bundles:
        graphs = launched[path.name]["graphs"]
        refused = {file: reason for file, reason in graphs.items() if isinstance(reason, str)}
        assert not refused, path.name
        assert set(graphs) == {graph.file for graph in read_manifest(path).default.chain(1)}
        assert all(num_launches(counts) > 5 for counts in graphs.values())


def num_launches(counts: dict[str, int]) -> int:
    return sum(count for name, count in counts.items() if name.startswith("kernel "))


def test_nothing_is_copied_between_host_and_device(launched: dict[str, Counts]) -> None:
    """Such a copy cannot be part of a CUDA graph, and waits for the host otherwise."""
    for bundle, found in launched.items():
        for file, counts in found["graphs"].items():
            copies = {name for name in counts if "copy" in name}
            assert copies <= {"copy device to device"}, f"{bundle}/{file}"


def test_launches_do_not_grow(launched: dict[str, Counts]) -> None:
    """Kernels of two layers, counted with onnxruntime-gpu 1.31.1; a tenth more is room for another release."""
    limits = {"tiny_fp16": (123, 148, 171), "infinity_bf16": (176, 199, 238), "infinity": (146, 169, 202)}
    for bundle, expected in limits.items():
        graphs = launched[bundle]["graphs"]
        first, dense, pruned = (num_launches(graphs[f"step_{k:02d}.onnx"]) for k in (0, 2, 3))
        for got, limit in zip((first, dense, pruned), expected, strict=True):
            assert got <= 1.1 * limit, (bundle, first, dense, pruned)


def test_sessions_share_one_arena(launched: dict[str, Counts]) -> None:
    """The decoder needs the most, and has run: the steps then find all that they need."""
    for bundle, found in launched.items():
        assert found["allocations_after_the_decoder"] == 0, bundle


def test_a_session_is_one_launch_where_it_is_captured(bundles: list[Path]) -> None:
    for bundle, found in run("capture", bundles).items():
        for file, counts in found["graphs"].items():
            assert counts == {"graph launch": 1}, f"{bundle}/{file}"
        recorded = found["recorded"]
        assert recorded["capture"] == len(found["graphs"])
        assert {name for name in recorded if "copy" in name} <= {
            "captured copy device to device",
            "copy device to device",
        }, bundle


_LIBRARIES = """
import sys
from pathlib import Path
{stubs}
import onnxruntime
from fastvar_trt.runtime.backends.onnxruntime_cuda import _check_libraries
from fastvar_trt.runtime.errors import UnavailableError
try:
    _check_libraries(onnxruntime)
except UnavailableError as error:
    sys.exit(str(error))
"""


def test_a_missing_library_is_named(bundles: list[Path]) -> None:
    """ONNX Runtime itself would say that nodes are placed on the CPU."""

    def check(stubs: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, (SITE, Path(__file__).parent)))
        command = [sys.executable, "-c", _LIBRARIES.format(stubs=stubs)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
        )

    found = check(f"from cuda_stubs import Stubs; Stubs(Path({str(SITE / 'stubs')!r}))")
    assert found.returncode == 0, found.stderr
    missing = check("")
    if missing.returncode == 0:
        pytest.skip("CUDA is installed on this machine")
    assert re.search(r"cannot be loaded \(lib\w+\.so\.\d+: .*'fastvar-trt\[gpu\]' brings", missing.stderr)


def test_batches_are_spelt_out_on_the_left_only_where_they_lack() -> None:
    def value(name: str, *shape: int) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    a, x, b = value("a", 5, 4), value("x", 2, 3, 4, 6), value("b", 6, 7)
    left = ir.node("MatMul", [a, x], name="left")
    left.outputs[0].name, left.outputs[0].shape = "y", ir.Shape([2, 3, 5, 6])
    left.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    right = ir.node("MatMul", [left.outputs[0], b], name="right")
    right.outputs[0].name, right.outputs[0].shape = "z", ir.Shape([2, 3, 5, 7])
    right.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([a, x, b], right.outputs, nodes=[left, right], opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10)
    assert BatchLeftOperands()(model).modified
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    assert [node.op_type for node in graph] == ["Constant", "Expand", "MatMul", "MatMul"]
    assert not BatchLeftOperands()(model).modified
