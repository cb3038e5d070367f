"""Run by `test_cuda_provider.py` in an environment with onnxruntime-gpu: bundles on it, over CUDA's stubs, as JSON.

    python on_cuda_stubs.py STUBS capture|launch BUNDLE...

Each bundle must have been built for `cuda`. Kernels compute nothing, so results mean nothing; what is launched and
copied in the third run of every graph is counted, and what all graphs do in their first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cuda_stubs import Stubs

stubs = Stubs(Path(sys.argv[1]))  # before what loads CUDA's libraries: hence E402 below

import onnxruntime  # noqa: E402

from fake_gpu import FakeCuda  # noqa: E402
from fastvar_trt.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend  # noqa: E402
from fastvar_trt.runtime.chain import Chain, memory_of  # noqa: E402
from fastvar_trt.runtime.errors import BackendError  # noqa: E402
from fastvar_trt.runtime.manifest import read_manifest  # noqa: E402
from fastvar_trt.runtime.precision import PRECISIONS  # noqa: E402


def counts(bundle: Path, *, capture: bool) -> dict[str, object]:
    """What is counted of one bundle."""
    manifest = read_manifest(bundle)
    backend = OnnxRuntimeCudaBackend(cuda=FakeCuda(total_bytes=64 << 30), onnxruntime=onnxruntime, capture=capture)
    backend.open(bundle, manifest, check_hashes=False)
    graphs: dict[str, object] = {}
    for graph in manifest.graphs:
        try:
            backend.load(graph)
        except BackendError as error:
            graphs[graph.file] = " ".join(str(error).split())
    if graphs:
        return {"graphs": graphs}
    own = manifest.default.chain(manifest.batches[0])
    chain = Chain(backend, own, PRECISIONS[manifest.precision].tolerance, memory_of(backend, [own]))
    bound = list(zip(chain._graphs, chain._bound[frozenset()], strict=True))
    stubs.start()
    bound[-1][1].enqueue()  # the decoder
    recorded = stubs.stop()
    stubs.start()
    for _, session in bound[:-1]:
        session.enqueue()
    first = stubs.stop()
    for name, count in first.items():
        recorded[name] += count
    for graph, session in bound:
        session.enqueue()
        stubs.start()
        session.enqueue()
        graphs[graph.file] = stubs.stop()
    backend.close()
    return {"graphs": graphs, "recorded": recorded, "allocations_after_the_decoder": first["cudaMalloc"]}


found: dict[str, object] = {"providers": onnxruntime.get_available_providers()}
found |= {path: counts(Path(path), capture=sys.argv[2] == "capture") for path in sys.argv[3:]}
print(json.dumps(found))
