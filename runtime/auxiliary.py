"""A graph outside of the chains, with buffers of its own: the encoders of text and of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from fastvar_trt.runtime.backends import Backend, BoundGraph, Buffer
from fastvar_trt.runtime.manifest import GraphSpec


class AuxiliaryGraph:
    """A graph on an open backend; loaded at its first run."""

    def __init__(self, backend: Backend, graph: GraphSpec) -> None:
        self._backend, self._graph = backend, graph
        self._buffers: dict[str, Buffer] = {}
        try:
            for spec in (*graph.inputs, *graph.outputs):
                self._buffers[spec.name] = backend.allocate(spec.shape, spec.dtype)
        except BaseException:  # the next request may have more room
            for buffer in self._buffers.values():
                backend.free(buffer)
            raise
        self._bound: BoundGraph | None = None

    @property
    def num_buffer_bytes(self) -> int:
        """Memory of inputs and outputs."""
        return sum(buffer.num_bytes for buffer in self._buffers.values())

    def _load(self) -> BoundGraph:
        graph = self._graph
        try:
            self._backend.load(graph)
            return self._backend.bind(
                graph,
                {spec.name: self._buffers[spec.name].view() for spec in graph.inputs},
                {spec.name: self._buffers[spec.name].view() for spec in graph.outputs},
            )
        except BaseException:
            if self._backend.is_on_demand(graph):
                self._backend.unload(graph)
            raise

    def release(self) -> None:
        """Unload it, where it is on demand; it is loaded again for the next run."""
        if self._bound is not None and self._backend.is_on_demand(self._graph):
            self._backend.activate()
            self._backend.synchronize()
            self._bound = None
            self._backend.unload(self._graph)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs of all inputs, both by name; copies."""
        backend = self._backend
        backend.activate()
        for name, array in inputs.items():
            backend.upload(self._buffers[name], array)
        if self._bound is None:
            self._bound = self._load()
        self._bound.enqueue()
        return {spec.name: backend.download(self._buffers[spec.name]).copy() for spec in self._graph.outputs}
