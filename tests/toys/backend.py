"""A backend that runs what the toy target made, plainly: arrays in, arrays out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fastvar_trt.runtime.backends import Backend, BackendEntry, BackendOption, BoundGraph, Buffer, View
from fastvar_trt.runtime.engines import EngineSet, usable_engines
from fastvar_trt.runtime.manifest import GraphSpec, Manifest
from fastvar_trt.runtime.precision import DTYPES
from toys.target import VERSION, ToyBuilder


class ToyBackend(Backend):
    """ONNX Runtime without bindings."""

    name = "toy"

    def __init__(self, greeting: str) -> None:
        self._greeting = greeting
        self._engines = EngineSet(Path())
        self._sessions: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "greeting": self._greeting}

    def open(self, bundle: Path, manifest: Manifest, *, check_hashes: bool) -> None:
        (target,) = ToyBuilder.target_names
        self._engines = usable_engines(bundle, manifest, ToyBuilder.folder, VERSION, target, check_hashes=check_hashes)

    def close(self) -> None:
        self._sessions.clear()

    def load(self, graph: GraphSpec) -> None:
        options = onnxruntime.SessionOptions()
        weights = str(self._engines.folder.parents[1])
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
        data = (self._engines.folder / self._engines.records[graph.file].file).read_bytes()
        self._sessions[graph.file] = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        owner = np.zeros(shape, dtype=dtype)
        return Buffer(shape, dtype, owner.ctypes.data, owner)

    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        return _Bound(self._sessions[graph.file], inputs, outputs)

    def upload(self, buffer: Buffer, array: Any) -> None:
        buffer.owner[...] = array

    def download(self, buffer: Buffer) -> Any:
        return buffer.owner.copy()

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_ms(self, start: float, stop: float) -> float:
        return (stop - start) * 1e3


class _Bound(BoundGraph):
    def __init__(self, session: Any, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> None:
        self._session, self._inputs, self._outputs = session, inputs, outputs

    def enqueue(self) -> None:
        names = list(self._outputs)
        results = self._session.run(names, {name: _array(view) for name, view in self._inputs.items()})
        for name, result in zip(names, results, strict=True):
            _array(self._outputs[name])[...] = result


def _array(view: View) -> Any:
    memory, dtype = view.buffer.owner, np.dtype(DTYPES[view.buffer.dtype].host)
    count, first = int(np.prod(view.shape)), view.pointer - memory.ctypes.data
    return memory.reshape(-1).view(np.uint8)[first : first + count * dtype.itemsize].view(dtype).reshape(view.shape)


def _create(device: str | None, profile: bool, greeting: str = "hello") -> Backend:
    return ToyBackend(greeting)


TOY = BackendEntry("toy", _create, (BackendOption("greeting", str, "What it says."),))
