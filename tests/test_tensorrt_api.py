"""What we call of enterprise TensorRT, which cannot be installed here, exists in its published stubs.

By name only: the stubs of 10.13 are no valid Python for a type checker.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("export/build/tensorrt/engine.py", "export/build/tensorrt/flavour.py", "runtime/backends/tensorrt.py")
# Variables that hold objects of TensorRT, as these files name them.
OBJECTS = {
    "trt",
    "builder",
    "network",
    "parser",
    "config",
    "context",
    "_trt",
    "_runtime",
    "_context",
    "engine",
    "module",
}
# Of TensorRT for RTX only; the flavour that is asked decides.
RTX_ONLY = {
    "num_compute_capabilities",
    "set_compute_capability",
    "ComputeCapability",
    "REQUIRE_USER_ALLOCATION",
    "create_runtime_cache",
    "set_runtime_cache",
    "is_stream_capturable",
}


def used_names(path: Path) -> set[str]:
    """Attributes that are read or set on objects of TensorRT, chains of them included (trt.DataType.FLOAT)."""

    def is_tensorrt(node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in OBJECTS
        return isinstance(node, ast.Attribute) and (node.attr in OBJECTS or is_tensorrt(node.value))

    tree = ast.parse(path.read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_tensorrt(node.value)}
    return names - OBJECTS - RTX_ONLY - {"__version__", "__init__", "record"}


@pytest.mark.parametrize("file", FILES)
def test_the_stubs_know_every_name(file: str) -> None:
    try:
        files = importlib.metadata.files("tensorrt-stubs") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed")
    stubs = "\n".join(Path(str(f.locate())).read_text() for f in files if f.name.endswith(".pyi"))
    names = used_names(ROOT / file)
    assert names, "the walk finds what is called"
    unknown = {name for name in names if not re.search(rf"^\s*(def|class) {name}\b|^\s*{name}\s*[:=]", stubs, re.M)}
    assert not unknown


def test_tensorrt_for_rtx_has_what_is_its_own() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    owners = (trt, trt.IBuilderConfig, trt.BuilderFlag, trt.IRuntimeConfig, trt.IExecutionContext)
    assert not {name for name in RTX_ONLY if not any(hasattr(owner, name) for owner in owners)}
    assert hasattr(trt.ICudaEngine, "create_runtime_config") and hasattr(trt.IRuntimeCache, "deserialize")
