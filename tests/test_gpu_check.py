"""The one command for machines with a GPU: on a machine without, and on stand-ins for GPU, TensorRT and PyTorch's."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import gpu_sections
from conftest import INFINITY_PLAN, TINY_PLAN, thorough, tiny_infinity, tiny_states
from fake_gpu import VERSION, FakeCuda, FakeOnnxRuntime, FakeTensorRT, fake_build_engine
from fastvar_trt.export.build.tensorrt import builder
from fastvar_trt.export.build.tensorrt.flavour import Flavour
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.plugins import oracle
from fastvar_trt.runtime.auxiliary import AuxiliaryGraph
from fastvar_trt.runtime.backends import cuda, on_cuda, onnxruntime_cuda, tensorrt
from fastvar_trt.runtime.errors import BackendError, UnavailableError
from fastvar_trt.tools.gpu_check import checks, cli, speed
from fastvar_trt.tools.gpu_check.models import MODELS, CheckedModel
from fastvar_trt.tools.gpu_check.outputs import check_outputs
from fastvar_trt.tools.gpu_check.sections import run_section
from fastvar_trt.tools.gpu_check.speed import summary


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["--no-isolate", *arguments])


def sections_of(folder: Path) -> dict[str, dict[str, Any]]:
    data = json.loads((folder / "gpu_check.json").read_text())
    return {section["name"]: section for section in data["sections"]}


def unavailable(*_: Any) -> Any:
    raise UnavailableError("no NVIDIA driver")


def test_without_a_gpu_everything_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CudaDevice", unavailable)
    done = run("--out", str(tmp_path / "check"))
    assert done.exit_code == 0, done.output
    sections = sections_of(tmp_path / "check")
    assert list(sections) == ["GPU", "CUDA kernels against the oracle", "Models"]
    assert all(s["skipped"] and not s["failed"] for s in sections.values())
    assert "Skipped: no NVIDIA driver" in (tmp_path / "check" / "gpu_check.md").read_text()


def test_what_fails_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise BackendError("CUDA: an illegal memory access was encountered")

    monkeypatch.setattr(checks, "CudaDevice", unavailable)
    monkeypatch.setattr(cli, "check_kernels", broken)
    done = run("--out", str(tmp_path))
    assert done.exit_code == 1 and "failed: CUDA kernels against the oracle" in done.output


def test_differing_results_fail_a_section() -> None:
    section = run_section("x", lambda: [{"ok": True}, {"ok": False}], 60, isolate=False)
    assert section.failed and not section.skipped


def test_sections_run_in_processes_of_their_own() -> None:
    fine = run_section("fine", gpu_sections.succeed, 120)
    assert fine.results[0]["pid"] != os.getpid() and not fine.failed
    crashed = run_section("crash", gpu_sections.crash, 120)
    assert crashed.failed == "its process ended with exit code -6 and left no result"
    assert run_section("hang", gpu_sections.hang, 8).failed == "took longer than 8 s, and was ended"
    assert "no time is left" in run_section("late", gpu_sections.succeed, -1).skipped


def test_models_and_sizes_are_checked(tmp_path: Path) -> None:
    refused = run("--model", "scenes,dall-e", "--out", str(tmp_path))
    assert refused.exit_code == 2 and "got 'dall-e', expected one or more of scenes, var-d16" in refused.output
    refused = run("--model", "var-d16,infinity-2b", "--size", "1M,3K", "--out", str(tmp_path))
    assert refused.exit_code == 2 and "--size: got '3K'" in refused.output
    assert cli._models("infinity-2b, var-d16", "1M, 2K") == {"var-d16": ["256"], "infinity-2b": ["1M", "2K"]}
    assert cli._models("var-d36", None) == {"var-d36": ["512"]}
    assert next(iter(MODELS)) == "scenes" and {"infinity-2b", "var-d36"} < set(MODELS)


def test_every_size_has_bundles_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[tuple[str, str]] = []
    timed: list[tuple[str, str]] = []
    monkeypatch.setattr(cli, "BACKENDS", {})
    monkeypatch.setattr(cli, "_compare", lambda check, bundles: None)

    def export(check: Any, name: str, size: str, folder: Path) -> dict[str, Path]:
        exported.append((name, size))
        return {"dense": folder / f"{name}_{size}"}

    monkeypatch.setattr(cli, "_export", export)
    monkeypatch.setattr(cli, "_time", lambda check, title, bundles, runs: timed.append((title, bundles["dense"].name)))
    wanted = {"scenes": ["1M", "2K"], "var-d16": ["256"]}
    cli._check_models(cli._Check(tmp_path, float("inf"), isolate=False), wanted, 1)
    assert exported == [("scenes", "1M"), ("scenes", "2K"), ("var-d16", "256")]
    assert timed == [("scenes 1M", "scenes_1M"), ("scenes 2K", "scenes_2K"), ("var-d16 256", "var-d16_256")]


class FakeKernels:
    """`CacheKernels` by the oracle, on the memory of a GPU that is not there."""

    def __init__(self, architecture: str, stream: int) -> None:
        self.architecture = architecture

    def close(self) -> None:
        pass

    def pivotal_tokens(
        self, dtype: str, x: int, out: int, *_: int, batch: int, length: int, channels: int, keep: int
    ) -> None:
        values = _values(x, (batch, length, channels), dtype)
        _at(out, (batch, keep), "int64")[:] = oracle.pivotal_tokens(values, keep)

    def gather_tokens(
        self, dtype: str, x: int, indices: int, out: int, *, batch: int, length: int, keep: int, channels: int
    ) -> None:
        rows = _at(indices, (batch, keep), "int64")
        _store(out, oracle.gather_tokens(_values(x, (batch, length, channels), dtype), rows), dtype)

    def restore_tokens(
        self,
        dtype: str,
        y: int,
        indices: int,
        cached: int,
        out: int,
        *,
        batch: int,
        keep: int,
        channels: int,
        residual: int | None = None,
        **sides: int,
    ) -> None:
        full = oracle.restore_tokens(
            _values(y, (batch, keep, channels), dtype),
            _at(indices, (batch, keep), "int64"),
            _values(cached, (batch, sides["cached_h"] * sides["cached_w"], channels), dtype),
            **sides,
        )
        if residual is None:
            _store(out, full, dtype)
        else:
            _store(out, _at(residual, full.shape, "float32") + full.astype(np.float32), "float32")


def _values(pointer: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (_at(pointer, shape, "uint16").astype(np.uint32) << 16).view(np.float32)
    return _at(pointer, shape, dtype)


def _store(pointer: int, values: np.ndarray, dtype: str) -> None:
    if dtype == "bfloat16":
        _at(pointer, values.shape, "uint16")[:] = values.astype(np.float32).view(np.uint32) >> 16
    else:
        _at(pointer, values.shape, dtype)[:] = values


def _at(pointer: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(pointer), dtype=dtype).reshape(shape)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A machine with a GPU, TensorRT for RTX, ONNX Runtime and PyTorch for it, none of which is there."""
    device = FakeCuda(total_bytes=8 << 30)
    for module in (checks, speed, cuda, on_cuda):
        monkeypatch.setattr(module, "CudaDevice", lambda ordinal=0, **_: device)
    monkeypatch.setattr(FakeCuda, "close", lambda self: None)  # one device, opened again and again
    monkeypatch.setattr(checks, "CacheKernels", FakeKernels)
    monkeypatch.setattr(checks, "_TIMINGS", 1)
    monkeypatch.setattr(checks, "_REPEATS", 1)
    monkeypatch.setattr(builder, "build_engine", fake_build_engine)
    version = type("module", (), {"__version__": VERSION})

    def load_flavour(cls: type[Flavour], name: str) -> Flavour:
        if name == "tensorrt":
            raise UnavailableError("tensorrt is not installed")
        return cls(name, version)

    def import_tensorrt(name: str) -> FakeTensorRT:
        if name == "tensorrt":
            raise UnavailableError("tensorrt is not installed")
        return FakeTensorRT(device)

    monkeypatch.setattr(Flavour, "load", classmethod(load_flavour))
    monkeypatch.setattr(tensorrt, "import_tensorrt", import_tensorrt)
    monkeypatch.setattr(onnxruntime_cuda, "import_onnxruntime", lambda: FakeOnnxRuntime(device))
    for module in (speed, checks):
        monkeypatch.setattr(module, "torch_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield device
    assert not device.memory, "device memory is given back"


def test_it_runs_through_on_stand_ins(gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small models in place of the scene model and a big one, in fp32, since the stand-ins compute on the CPU."""
    small = VARSource.from_state(*tiny_states(patch_nums=(1, 3, 5)))
    models = {
        "scenes": CheckedModel("scenes", ("80",), lambda _: small, lambda _: TINY_PLAN, "fp32", compares=True),
        "big": CheckedModel(
            "big", ("s",), lambda _: tiny_infinity(((1, 1), (2, 3), (4, 5))), lambda _: INFINITY_PLAN, "fp32"
        ),
    }
    monkeypatch.setattr(cli, "MODELS", models)
    monkeypatch.setattr(cli, "_ROUNDS", 2)
    monkeypatch.setattr(speed, "_WARM_UPS", 0)
    out = tmp_path / "out"
    done = run("--model", "big,scenes", "--runs", "1", "--out", str(out))
    assert done.exit_code == 0, done.output
    sections = sections_of(out)
    kernels = sections["CUDA kernels against the oracle"]["results"]
    assert len(kernels) == 15 and all(row["ok"] and row["indices equal"] == 1 for row in kernels)
    for backend in ("onnxruntime, cuda", "tensorrt_rtx"):
        for label in ("pruned", "dense"):
            rows = sections[f"{backend}, scenes_80_{label}, against PyTorch and the CPU"]["results"]
            assert [row["captured"] for row in rows] == ["no", "yes"]
            for row in rows:
                assert row["ok"] and row["verify"] == "holds" and row["tokens, second run"] == "the same"
                assert row["logits off, of the largest"] < 1e-4 and row["device MiB"] > 0
            rows = sections[f"{backend}, scenes_80_{label}, outputs of single graphs, by Polygraphy"]["results"]
            assert all(row["ok"] and row["max error, of the largest"] < 1e-4 for row in rows)
            compared = {(row["graph"], row["output"]) for row in rows}
            assert compared >= {
                ("step_00", "logits"),
                ("step_00", "new_k_0"),
                ("step_02", "logits"),
                ("decoder", "image"),
            }
    assert sections["tensorrt, current, scenes_80_dense, built"]["skipped"] == "tensorrt is not installed"
    for backend in ("onnxruntime", "tensorrt_rtx"):
        rows = sections[f"{backend}, big_s_pruned, against PyTorch"]["results"]
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert all(row["ok"] and row["of the largest"] < 1e-4 and row["tokens equal"] == 1.0 for row in rows)
    assert [name for name in sections if name.startswith("Speed")] == ["Speed of scenes 80", "Speed of big s"]
    for name in ("scenes 80", "big s"):
        rows = {row["variant"]: row for row in sections[f"Speed of {name}"]["results"]}
        ours = [
            f"{b}{c}, {p}"
            for p in ("pruned", "dense")
            for b in ("tensorrt_rtx", "onnxruntime")
            for c in (", captured", "")
        ]
        for variant in (*ours, *(f"PyTorch {how}, {p}" for how in ("eager", "compiled") for p in ("pruned", "dense"))):
            assert rows[variant]["rounds"] == 2 and rows[variant]["ms"] > 0, variant
            assert float(rows[variant]["of PyTorch eager"]) > 0
        assert rows["tensorrt_rtx, captured, dense"]["by graph ms"].keys() >= {"condition", "decoder"}
        assert rows["tensorrt, captured, dense"]["skipped"] == "nothing could be built for tensorrt on this machine"
    assert Image.open(out / "gpu_check.png").size[0] > 400
    report = (out / "gpu_check.md").read_text()
    assert "## Speed of big s" in report and "of PyTorch eager" in report
    assert gpu.num_launches > 0

    right = AuxiliaryGraph.run

    def wrong(graph: AuxiliaryGraph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        spoilt = right(graph, inputs)
        return {name: array * 1.1 if name == "new_k_1" else array for name, array in spoilt.items()}

    monkeypatch.setattr(AuxiliaryGraph, "run", wrong)
    rows = check_outputs(out / "bundles" / "scenes_80_dense", "tensorrt_rtx")
    assert [(row["graph"], row["output"]) for row in rows if not row["ok"]] == [("step_00", "new_k_1")]


@pytest.mark.parametrize("spoilt", ["pivotal_tokens", thorough("gather_tokens"), thorough("restore_tokens")])
def test_a_wrong_kernel_is_found(gpu: FakeCuda, spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(FakeKernels, spoilt)

    def wrong(
        self: FakeKernels, dtype: str, x: int, *pointers: int, batch: int, keep: int, channels: int, **sizes: int
    ) -> None:
        right(self, dtype, x, *pointers, batch=batch, keep=keep, channels=channels, **sizes)
        out = pointers[-1] if spoilt != "pivotal_tokens" else pointers[0]
        _at(out, (64,), "uint16")[:] += 77

    monkeypatch.setattr(FakeKernels, spoilt, wrong)
    section = run_section("kernels", checks.check_kernels, 60, isolate=False)
    assert section.failed == "results differ, see the table" and not any(row["ok"] for row in section.results)


def test_ratios_are_to_pytorch_dense_of_the_same_round() -> None:
    def rounds(*times: list[float]) -> list[dict[str, Any]]:
        return [
            {"ms": ms, "load_s": 2.0 + i, "first_s": 3.0, "by_graph_ms": {}, "device_bytes": 1 << 20}
            for i, ms in enumerate(times)
        ]

    rows = summary(
        {
            "PyTorch eager, pruned": rounds([70.0], [7.0]),
            "PyTorch eager, dense": rounds([100.0, 102.0, 98.0], [10.0]),
            "ours, pruned": rounds([50.0], [4.0]),
        },
        {"tensorrt": "not installed"},
    )
    ratios = {row["variant"]: row["of PyTorch eager"] for row in rows}
    assert ratios == {
        "PyTorch eager, pruned": "1.43",
        "PyTorch eager, dense": "1.00",
        "ours, pruned": "2.25",
        "tensorrt": "-",
    }
    assert rows[2]["load, first time s"] == 2.0 and rows[2]["load, later s"] == 3.0
