"""A backend that can be asked for by name: python own_backend.py BUNDLE "two blue cubes on snow".

It runs graphs by ONNX Runtime, and counts them; one of your own overrides `load` and `bind` of `Backend` altogether.
Once it is registered, `Pipeline.load(..., backend="counting")` and every `--backend` know it.
"""

import sys
from collections.abc import Mapping

from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.backends import BACKENDS, Backend, BackendEntry, BoundGraph, View
from fastvar_trt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fastvar_trt.runtime.manifest import GraphSpec


class CountingBackend(OnnxRuntimeBackend):
    """ONNX Runtime on the CPU that knows how often it ran each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        """As its base class does, with a count around it."""
        return _Counted(self, graph.name, super().bind(graph, inputs, outputs))


class _Counted(BoundGraph):
    def __init__(self, backend: CountingBackend, name: str, bound: BoundGraph) -> None:
        self._backend, self._name, self._bound = backend, name, bound

    def enqueue(self) -> None:
        self._backend.counts[self._name] = self._backend.counts.get(self._name, 0) + 1
        self._bound.enqueue()


def create(device: str | None, profile: bool) -> Backend:
    """Of the registry's entry."""
    return CountingBackend()


def main(bundle: str, prompt: str) -> None:
    """Draw with it."""
    BACKENDS.register(BackendEntry("counting", create))
    with Pipeline.load(bundle, backend="counting") as pipe:
        pipe.generate(prompts=[prompt])
        backend = pipe.backend
        assert isinstance(backend, CountingBackend)
        for name, count in backend.counts.items():
            print(name, count)


if __name__ == "__main__":
    main(*sys.argv[1:])
