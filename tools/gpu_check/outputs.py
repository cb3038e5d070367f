"""Every output of single graphs, engine beside ONNX Runtime on the CPU: which graph is wrong, and which of its outputs.

Polygraphy's `Comparator` compares; the graphs run on this project's backends, with the weights that these bind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.auxiliary import AuxiliaryGraph
from fastvar_trt.runtime.backends import Backend, create_backend
from fastvar_trt.runtime.errors import UnavailableError
from fastvar_trt.runtime.manifest import DECODER, F_HAT_OUT, GraphSpec, Manifest, read_manifest
from fastvar_trt.runtime.precision import DTYPES
from fastvar_trt.runtime.request import example_requests
from fastvar_trt.tools.gpu_check.checks import from_device
from fastvar_trt.tools.gpu_check.sections import Results
from fastvar_trt.tools.gpu_check.speed import check_built
from fastvar_trt.tools.measure.capture import capture_graph

_FLOATS = ("float32", "float16", "bfloat16")


def check_outputs(bundle: Path, backend: str) -> Results:
    """The first step, the first pruned one and the decoder, each given what it is given on the CPU.

    Of a pruned step's outputs the means are judged: near-ties of the selection may change places.
    """
    try:
        from polygraphy.backend.base import BaseRunner
        from polygraphy.comparator import Comparator, SimpleCompareFunc
    except ImportError as error:
        raise UnavailableError("polygraphy is not installed: pip install 'polygraphy>=0.53'") from error

    class Runner(BaseRunner):
        """A graph on an open backend."""

        def __init__(self, opened: Backend, graph: GraphSpec) -> None:
            super().__init__(name=backend)
            self._graph, self._run = graph, AuxiliaryGraph(opened, graph).run

        def get_input_metadata_impl(self) -> Any:
            from polygraphy.common import TensorMetadata

            metadata = TensorMetadata()
            for spec in self._graph.inputs:
                metadata.add(spec.name, dtype=np.dtype(DTYPES[spec.dtype].host), shape=spec.shape)
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            start = time.perf_counter()
            outputs = self._run(feed_dict)
            self.inference_time = time.perf_counter() - start
            return _as_floats(self._graph, outputs)

    check_built(bundle, backend)
    manifest = read_manifest(bundle)
    batch = min(manifest.batches)
    (request,) = example_requests(manifest, 1)
    tolerance = manifest.own_precision.tolerance
    results = []
    with _opened(bundle, manifest, backend) as there:
        for graph in _graphs(manifest, batch):
            captured = capture_graph(bundle, graph.name, request)
            expected = _as_floats(graph, captured["outputs"])
            largest = {name: float(np.abs(array).max(initial=0)) for name, array in expected.items()}
            runs = Comparator.run([Runner(there, graph)], data_loader=[captured["inputs"]])
            runs.add([expected], runtime=0.0, runner_name="onnxruntime, CPU")
            (found,) = Comparator.compare_accuracy(
                runs,
                compare_func=SimpleCompareFunc(
                    atol={name: tolerance.error * value for name, value in largest.items()},
                    rtol=0,
                    check_error_stat="mean",
                ),
            )
            ((compared,),) = found.values()
            results += [
                {
                    "graph": graph.name,
                    "output": name,
                    "mean error, of the largest": own.mean_absdiff / max(largest[name], 1e-30),
                    "max error, of the largest": own.max_absdiff / max(largest[name], 1e-30),
                    "ok": bool(own),
                }
                for name, own in compared.items()
            ]
    return results


def _graphs(manifest: Manifest, batch: int) -> Iterator[GraphSpec]:
    """One of each kind."""
    plan = manifest.resolved_plan
    wanted = {0, next((k for k in plan.steps if plan.is_pruned(k)), plan.steps[-1])}
    for graph in manifest.default.chain(batch):
        if graph.kind == DECODER or graph.scale in wanted:
            yield graph


@contextlib.contextmanager
def _opened(bundle: Path, manifest: Manifest, name: str) -> Iterator[Backend]:
    backend = create_backend(name, "cuda")
    try:
        backend.open(bundle, manifest, check_hashes=False)
        yield backend
    finally:
        backend.close()


def _as_floats(graph: GraphSpec, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The outputs that are numbers, in float32; but not f_hat, which follows of what is drawn, at a tie by rounding."""
    dtypes = {spec.name: spec.dtype for spec in graph.outputs if spec.dtype in _FLOATS and spec.name != F_HAT_OUT}
    return {name: from_device(array, dtypes[name]) for name, array in arrays.items() if name in dtypes}
