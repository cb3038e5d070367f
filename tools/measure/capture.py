"""What one graph of a chain takes and gives, saved to be looked at by others: Polygraphy, ONNX Runtime alone."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.export.folders import temporary_folder
from fastvar_trt.runtime.backends import BoundGraph, View
from fastvar_trt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.manifest import GraphSpec, read_manifest
from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.runtime.precision import DTYPES
from fastvar_trt.runtime.request import Request

_LOADER = '''"""For `polygraphy run --data-loader-script`."""

from pathlib import Path

import numpy as np


def load_data():
    """The inputs of one run."""
    with np.load(Path(__file__).with_name("inputs.npz")) as arrays:
        yield dict(arrays)
'''


class _CapturingBackend(OnnxRuntimeBackend):
    """ONNX Runtime on the CPU, which keeps what one graph takes and gives.

    Attributes:
        inputs, outputs: by name, of its last run.
    """

    def __init__(self, graph: str, engines: str) -> None:
        super().__init__(engines=engines)
        self._graph_name = graph
        self.inputs: dict[str, NDArray[Any]] = {}
        self.outputs: dict[str, NDArray[Any]] = {}

    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        bound = super().bind(graph, inputs, outputs)
        return _Captured(self, bound, inputs, outputs) if graph.name == self._graph_name else bound


class _Captured(BoundGraph):
    def __init__(
        self, backend: _CapturingBackend, bound: BoundGraph, inputs: Mapping[str, View], outputs: Mapping[str, View]
    ) -> None:
        self._backend, self._bound, self._views = backend, bound, (inputs, outputs)

    def enqueue(self) -> None:
        inputs, outputs = self._views
        self._backend.inputs = {name: _copied(view) for name, view in inputs.items()}
        self._bound.enqueue()
        self._backend.outputs = {name: _copied(view) for name, view in outputs.items()}


def _copied(view: View) -> NDArray[Any]:
    """What lies there, as numpy knows it: of dtypes that it does not know, the bits."""
    dtype = np.dtype(DTYPES[view.buffer.dtype].host)
    count = int(np.prod(view.shape, dtype=np.int64))
    memory: Any = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(view.pointer)
    return np.frombuffer(memory, dtype=dtype).reshape(view.shape).copy()


def capture_graph(bundle: Path, graph: str, request: Request) -> dict[str, dict[str, Any]]:
    """Draw one picture on the CPU, and keep what one of its graphs takes and gives.

    Args:
        bundle: its folder; its smallest batch size is run.
        graph: its name in timings: `condition`, `step_03`, `decoder`.
        request: the picture.

    Returns:
        `inputs` and `outputs`, arrays by name.

    Raises:
        RequestError: the chain has no such graph.
    """
    # As it was exported; the CPU computes half precision only in what `fastvar build --target cpu` makes of it.
    is_half = read_manifest(bundle).own_precision.computed != "float32"
    backend = _CapturingBackend(graph, "require" if is_half else "off")
    with Pipeline.load(bundle, backend=backend) as pipe:
        chain = pipe.manifest.default.chain(min(pipe.manifest.batches))
        known = [own.name for own in chain]
        if graph not in known:
            raise RequestError(f"graph: got {graph!r}, expected one of {', '.join(known)}")
        pipe.draw([request], return_logits=True, return_float_images=True)
    return {"inputs": backend.inputs, "outputs": backend.outputs}


def write_capture(folder: Path, captured: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
    """`inputs.npz`, `outputs.npz` and `load_data.py` for Polygraphy, in a folder that is made.

    Raises:
        RequestError: it cannot be written; nothing is left of it then.
    """
    try:
        with temporary_folder(folder) as partial:
            for name, arrays in captured.items():
                np.savez(partial / f"{name}.npz", allow_pickle=False, **arrays)
            (partial / "load_data.py").write_text(_LOADER, encoding="utf-8")
            partial.rename(folder)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be written: {error.strerror or error}") from error
