"""The one command for machines with a GPU, on a machine without: it says what it skipped, and fails what fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from fastvar_trt.runtime.errors import BackendError, UnavailableError
from fastvar_trt.tools import gpu_check


def unavailable(*_: Any) -> Any:
    raise UnavailableError("no NVIDIA driver")


def test_without_a_gpu_everything_is_skipped(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_check, "CudaDevice", unavailable)
    done = CliRunner().invoke(gpu_check.main, ["--out", str(tmp_path / "check")])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "check" / "gpu_check.json").read_text())
    assert [s["name"] for s in data["sections"]][:2] == ["GPU", "CUDA kernels against the oracle"]
    assert len(data["sections"]) == 8 and all(s["skipped"] and not s["failed"] for s in data["sections"])
    assert "Skipped: no NVIDIA driver" in (tmp_path / "check" / "gpu_check.md").read_text()


def test_what_fails_is_not_skipped(tmp_path: Path, monkeypatch: Any) -> None:
    def broken() -> Any:
        raise BackendError("the chain captured as a CUDA graph does not compute what it computes uncaptured")

    monkeypatch.setattr(gpu_check, "CudaDevice", unavailable)
    monkeypatch.setattr(gpu_check, "check_kernels", broken)
    done = CliRunner().invoke(gpu_check.main, ["--out", str(tmp_path)])
    assert done.exit_code == 1 and "failed: CUDA kernels against the oracle" in done.output


def test_differing_results_fail_a_section() -> None:
    section = gpu_check.run_section("x", lambda: [{"ok": True}, {"ok": False}])
    assert section.failed and not section.skipped
