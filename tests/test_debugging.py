"""`fastvar doctor`, and a graph that is captured and run by others."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator

from conftest import run, told_by
from fastvar_trt.runtime import Pipeline, RequestError
from fastvar_trt.runtime.request import Request
from fastvar_trt.tools.cli import main
from fastvar_trt.tools.measure.capture import capture_graph


def test_a_captured_graph_runs_without_us(tiny_bundle: Path, tmp_path: Path) -> None:
    """By ONNX Runtime through Polygraphy, in its default way: the same outputs."""
    out = tmp_path / "step 3"
    told = told_by(main, "capture", tiny_bundle, "--graph", "step_03", "--class", 4, "--seed", 2, "-o", out)
    assert f"polygraphy run {tiny_bundle / 'step_03.onnx'} --onnxrt --data-loader-script '{out}/load_data.py'\n" in told
    namespace: dict[str, object] = {"__file__": str(out / "load_data.py")}
    exec((out / "load_data.py").read_text(), namespace)
    with np.load(out / "outputs.npz") as arrays:
        expected = dict(arrays)
    with Pipeline.load(tiny_bundle) as pipe:
        np.testing.assert_array_equal(pipe.generate([4], seeds=2).tokens[3], expected["tokens"])
    runner = OnnxrtRunner(SessionFromOnnx(str(tiny_bundle / "step_03.onnx"), providers=["cpu"]))
    results = Comparator.run([runner], data_loader=namespace["load_data"]())  # type: ignore[operator]
    (_, iterations), *_ = results
    (iteration,) = iterations
    for name, array in expected.items():
        np.testing.assert_allclose(iteration[name], array, atol=1e-5, err_msg=name)


def test_polygraphy_s_command_takes_it(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "decoder"
    told_by(main, "capture", tiny_bundle, "--graph", "decoder", "-o", out)
    tool = "from polygraphy.tools import main; main()"
    arguments = ["run", tiny_bundle / "decoder.onnx", "--onnxrt", "--data-loader-script", out / "load_data.py"]
    found = subprocess.run(
        [sys.executable, "-c", tool, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0 and "PASSED" in found.stdout, found.stdout + found.stderr


def test_what_cannot_be_captured(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="graph: got 'step_09', expected one of condition, step_00"):
        capture_graph(tiny_bundle, "step_09", Request(label=1))
    found = run(main, "capture", tiny_bundle, "--graph", "decoder", "-o", tmp_path)
    assert found.exit_code == 1 and "exists already" in found.output
    (tmp_path / "file").touch()
    found = run(main, "capture", tiny_bundle, "--graph", "decoder", "-o", tmp_path / "file" / "out")
    assert found.exit_code == 1 and "file: cannot be made" in found.output


def test_a_capture_that_finds_no_room_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, *_: object, **__: object) -> None:
        file.write_bytes(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    found = run(main, "capture", tiny_bundle, "--graph", "decoder", "-o", tmp_path / "out")
    assert found.exit_code == 1 and "out: cannot be written: No space left on device" in found.output
    assert not list(tmp_path.iterdir())


def test_the_doctor_says_what_runs_here(tiny_bundle: Path) -> None:
    before = sorted(tiny_bundle.rglob("*"))
    told = told_by(main, "doctor", tiny_bundle)
    assert max(map(len, told.splitlines()[:-1])) <= 120
    report = json.loads(told.splitlines()[-1])
    assert report["extras"]["cpu"] and report["extras"]["export"] and report["backends"]["onnxruntime cpu"]
    assert f"onnxruntime {onnxruntime.__version__}" in told
    assert set(report["backends"]) == {"onnxruntime cpu", "onnxruntime cuda", "tensorrt_rtx cuda", "tensorrt cuda"}
    if not report["backends"]["tensorrt cuda"]:
        assert "pip install 'fastvar-trt[tensorrt]'" in " ".join(told.split())
    assert report["engines"][str(tiny_bundle)] == {}
    assert sorted(tiny_bundle.rglob("*")) == before
