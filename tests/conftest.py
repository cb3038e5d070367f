"""Shared fixtures: goldens (skipped by name where they are absent) and small bundles, exported once."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import gc
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Before torch and ONNX Runtime count the cores: workers that share all of them spend their time waiting for each other.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if _WORKER and hasattr(os, "sched_setaffinity"):
    _CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_CORES[int(_WORKER) % len(_CORES)]})

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.numpy import load_file
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as DriverService
from torch.onnx._internal.exporter._registration import ONNXRegistry

import onnx_programs
from fastvar_trt.export.exporter import ExportOptions, ExportReport, export_model, tool_versions
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.models.source import Source
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime.plan import PruningPlan
from fastvar_trt.tools.random_checkpoints import random_checkpoint, random_infinity_checkpoint

# Every export asks for torch's table of ONNX functions, and it takes half a second to make; it never changes.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
# A sixth of the time of an export goes into looking for garbage among what torch has imported.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

ROOT = Path(__file__).parents[1]
GOLDEN_FOLDER = ROOT.parent / "shared" / "golden"

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

# Four scales to 8x8, two layers: seconds to export, and everything that a large model has.
TINY_PATCH_NUMS = (1, 3, 5, 8)
TINY_PLAN = PruningPlan("tiny", fractions=((-1, 0.5),), cache_scale=-2, first_layer=1)


def thorough(*values: Any) -> Any:
    """A case that `make test` leaves to `make test-all`: it takes long, and one much like it is in both."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: what is left at the end, workers can share."""
    items.sort(key=lambda item: item.path.name not in ("test_golden.py", "test_scene_model.py"))


def run(command: Any, *arguments: object) -> Result:
    """A command of click."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def told_by(command: Any, *arguments: object) -> str:
    """What a command says that does not fail."""
    done = run(command, *arguments)
    assert done.exit_code == 0, f"{arguments[0]}: {done.output}"
    return done.output


@contextlib.contextmanager
def changed_json(path: Path) -> Iterator[Any]:
    """What a JSON file holds; what the block makes of it is written back."""
    data = json.loads(path.read_text())
    yield data
    path.write_text(json.dumps(data))


class Golden:
    """A folder of `golden/`: the case, its checkpoint files, and what the public reference code computed."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN_FOLDER / name
        if not self.folder.is_dir():
            pytest.skip(f"golden {name} is not beside the project")
        self.case: dict[str, Any] = json.loads((self.folder / "case.json").read_text())
        self.expected = load_file(self.folder / "expected.safetensors")
        self.checkpoint, self.vae = self.folder / "var.pth", self.folder / "vae.pth"

    def source(self) -> VARSource:
        return VARSource.from_files(self.checkpoint, self.vae)


def tiny_states(**changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State dicts of the tiny model in the official keys."""
    sizes: dict[str, Any] = {"depth": 2, "width": 128, "num_heads": 2, "patch_nums": TINY_PATCH_NUMS, "vocab_size": 96}
    return random_checkpoint(**(sizes | changes))


# Maps that are not square, two of them alike in height.
INFINITY_MAPS = ((1, 1), (2, 3), (4, 5), (4, 8))
INFINITY_SPAN = (8, 16)
INFINITY_PLAN = PruningPlan("half", ((-1, 0.5),), cache_scale=-2, first_layer=1)


def tiny_infinity(maps: tuple[tuple[int, int], ...] = INFINITY_MAPS, **changes: Any) -> InfinitySource:
    """A small Infinity with random weights, its text 128 wide and 12 tokens long."""
    sizes: dict[str, Any] = {"depth": 2, "width": 128, "num_heads": 2, "block_chunks": 1}
    sizes |= {"text_width": 128, "text_length": 12}
    return InfinitySource.from_state(*random_infinity_checkpoint(**(sizes | changes)), maps, INFINITY_SPAN)


@pytest.fixture(scope="session")
def tiny_source() -> VARSource:
    return VARSource.from_state(*tiny_states())


@pytest.fixture(scope="session")
def export_once() -> Callable[..., tuple[Path, ExportReport]]:
    """Export a bundle, or hand out what an earlier test, or an earlier run of this code, exported of the same."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    for folder in _CACHE.parent.iterdir():
        if folder != _CACHE and time.time() - folder.stat().st_mtime > _KEPT_S:
            shutil.rmtree(folder, ignore_errors=True)

    def export(key: str, source: Source, options: ExportOptions) -> tuple[Path, ExportReport]:
        folder = _CACHE / _content_hash(source, options)
        folder.mkdir(exist_ok=True)
        path, report_file = folder / key, folder / f"{key}.report"
        with (folder / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not report_file.exists():
                report_file.write_bytes(pickle.dumps(export_model(source, path, options, force=True)))
            report: ExportReport = pickle.loads(report_file.read_bytes())
        return path, report

    return export


@functools.cache
def _code_hash() -> str:
    """Of what a bundle depends on besides its source: the project's code, and the libraries' versions."""
    digest = hashlib.sha256(repr(tool_versions()).encode())
    for top in ("export", "plugins", "runtime"):
        for path in sorted((ROOT / top).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _content_hash(source: Source, options: ExportOptions) -> str:
    digest = hashlib.sha256(repr(options).encode())
    for field in dataclasses.fields(source):  # type: ignore[arg-type]  # all sources are dataclasses
        _update(digest, getattr(source, field.name))
    return digest.hexdigest()[:16]


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(str(value.dtype).encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(key.encode())
            _update(digest, value[key])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _update(digest, getattr(value, field.name))
    else:
        digest.update(repr(value).encode())


_CACHE = ROOT / "build" / "test_bundles" / _code_hash()
onnx_programs.keep_in(ROOT / "build" / "onnx_programs")
_KEPT_S = 24 * 3600.0  # bundles of other states of the code


@pytest.fixture(scope="session")
def editing_bundle(export_once: Callable[..., tuple[Path, ExportReport]]) -> Path:
    """The tiny model with its image encoder, batch sizes 1 and 2; its plan skips a scale."""
    source = VARSource.from_state(*tiny_states(with_encoder=True)).with_encoder()
    plan = PruningPlan("skipping", fractions=((-2, 0.5), (-1, 1.0)), cache_scale=-3, first_layer=1)
    path, _ = export_once("editing", source, ExportOptions(plan=plan, batches=(1, 2)))
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_source: VARSource, export_once: Callable[..., tuple[Path, ExportReport]]) -> Path:
    """The tiny model, pruned, batch sizes 1 and 2."""
    path, _ = export_once("tiny", tiny_source, ExportOptions(plan=TINY_PLAN, batches=(1, 2)))
    return path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # No sandbox: it does not start as root, which CI is; the page is our own.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}/profile",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=DriverService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
