"""A backend around another, which runs what a test asks for before a graph: errors, waits, counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fastvar_trt.runtime.backends import Backend, BoundGraph, Buffer, View, create_backend
from fastvar_trt.runtime.manifest import GraphSpec, Manifest

Hook = Callable[[GraphSpec], None]


class FaultyBackend(Backend):
    """ONNX Runtime on the CPU, or another backend, whose `before` is called before every graph.

    Attributes:
        before: what may raise, or wait.
    """

    name = "faulty"

    def __init__(self, inner: Backend | None = None) -> None:
        self.inner = inner or create_backend("onnxruntime")
        self.before: Hook = lambda graph: None

    def open(self, bundle: Path, manifest: Manifest, *, check_hashes: bool) -> None:
        self.inner.open(bundle, manifest, check_hashes=check_hashes)

    def close(self) -> None:
        self.inner.close()

    def load(self, graph: GraphSpec) -> None:
        self.inner.load(graph)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return self.inner.allocate(shape, dtype)

    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        return _Hooked(self, graph, self.inner.bind(graph, inputs, outputs))

    def upload(self, buffer: Buffer, array: Any) -> None:
        self.inner.upload(buffer, array)

    def download(self, buffer: Buffer) -> Any:
        return self.inner.download(buffer)

    def mark(self) -> Any:
        return self.inner.mark()

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        return self.inner.elapsed_ms(start, stop)

    def fails(self, error: Exception, *, name: str, batch: int) -> Hook:
        """A hook that raises at one graph of one batch size."""

        def raising(graph: GraphSpec) -> None:
            if (graph.name, graph.batch) == (name, batch):
                raise error

        return raising


class _Hooked(BoundGraph):
    def __init__(self, backend: FaultyBackend, graph: GraphSpec, inner: BoundGraph) -> None:
        self._backend, self._graph, self._inner = backend, graph, inner

    def enqueue(self) -> None:
        self._backend.before(self._graph)
        self._inner.enqueue()


class Gate:
    """Holds one graph of every chain of a faulty backend until it is opened: by default the first."""

    def __init__(self, backend: FaultyBackend, patch: pytest.MonkeyPatch, name: str = "condition") -> None:
        self.entered, self.open = threading.Event(), threading.Event()

        def held(graph: GraphSpec) -> None:
            if graph.name == name:
                self.entered.set()
                assert self.open.wait(60)

        patch.setattr(backend, "before", held)
