"""ONNX Runtime's CUDA provider: sessions on one stream of one GPU, over one device copy of the weights.

Written against ONNX Runtime's API and tested on a GPU that is not there; it has not been run on a real one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.backends.base import BoundGraph, Buffer, View
from fastvar_trt.runtime.backends.on_cuda import CudaBackend
from fastvar_trt.runtime.backends.onnxruntime import import_onnxruntime
from fastvar_trt.runtime.errors import BackendError, UnavailableError
from fastvar_trt.runtime.manifest import GraphSpec, Manifest, TensorSpec
from fastvar_trt.runtime.precision import DTYPES

FLAVOUR = "onnxruntime_cuda"
CUDA_TARGET = "cuda"
BUILT_WITH = {"fastvar graphs": "1"}  # those that `fastvar build --target cuda` writes
_PROVIDER = "CUDAExecutionProvider"


class _BoundSession(BoundGraph):
    def __init__(self, name: str, session: Any, binding: Any, options: Any, keep: Sequence[Buffer]) -> None:
        self._name, self._session, self._binding, self._options = name, session, binding, options
        self._keep = keep

    def enqueue(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime raises its own types
            raise BackendError(f"{self._name}: ONNX Runtime failed: {error}") from error


class OnnxRuntimeCudaBackend(CudaBackend):
    """What `fastvar build --target cuda` made, on ONNX Runtime's CUDA provider.

    A graph of which ONNX Runtime would place a node on the CPU is refused at load.

    Args:
        device: `cuda` or `cuda:N`.
        capture: whether chains are captured as CUDA graphs; off by default, as not every kernel of the provider can be.
        cuda: the GPU; default: the real one, opened by `open`.
        onnxruntime: the package; default: imported by `open`.
    """

    def __init__(
        self, *, device: str = "cuda", capture: bool = False, cuda: Any = None, onnxruntime: Any = None
    ) -> None:
        super().__init__(FLAVOUR, device=device, capture=capture, cuda=cuda)
        self._ort: Any = onnxruntime
        self._sessions: dict[str, Any] = {}

    def open(self, bundle: Path, manifest: Manifest, *, check_hashes: bool) -> None:
        if self._ort is None:
            self._ort = import_onnxruntime()
        available = self._ort.get_available_providers()
        if _PROVIDER not in available:
            raise UnavailableError(
                f"onnxruntime {self._ort.__version__} has no {_PROVIDER} (it has {', '.join(available)}); uninstall "
                "onnxruntime, then pip install 'fastvar-trt[gpu]'"
            )
        self._open(bundle, manifest, BUILT_WITH, check_hashes=check_hashes, target=CUDA_TARGET)

    def close(self) -> None:
        self._sessions.clear()  # before the memory that they use
        super().close()

    def load(self, graph: GraphSpec) -> None:
        if graph.file in self._sessions:
            return
        ort, record = self._ort, self._engines.records[graph.file]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Without it a node that has no CUDA kernel would run on the CPU, and nobody would be told.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings = {
            "device_id": str(self._ordinal),
            "user_compute_stream": str(self._device.stream),
            "arena_extend_strategy": "kSameAsRequested",  # there is one arena per session
        }
        path = self._engines.folder / record.file
        try:
            # Without enable_fallback=0 the package would try again on the CPU by itself.
            session = ort.InferenceSession(str(path), options, providers=[(_PROVIDER, settings)], enable_fallback=0)
        except Exception as error:
            raise BackendError(f"{path.name}: ONNX Runtime cannot run it on {self._device.name}: {error}") from error
        if session.get_providers()[0] != _PROVIDER:
            raise BackendError(
                f"{path.name}: ONNX Runtime runs it on {session.get_providers()[0]}, not on {self._device.name}; check "
                "that CUDA and cuDNN are the versions that onnxruntime-gpu wants"
            )
        self._check_tensors(graph, record)
        self._sessions[graph.file] = session

    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        record = self._engines.records[graph.file]
        session = self._sessions[graph.file]
        binding = session.io_binding()

        def bind(put: Any, spec: TensorSpec, pointer: int) -> None:
            put(spec.name, "cuda", self._ordinal, DTYPES[spec.dtype].onnx, list(spec.shape), pointer)

        for spec in record.inputs:
            pointer = self._weights[spec.name] if spec.name in self._weights else inputs[spec.name].pointer
            bind(binding.bind_input, spec, pointer)
        for spec in record.outputs:
            if spec.name in outputs:
                bind(binding.bind_output, spec, outputs[spec.name].pointer)
        options = self._ort.RunOptions()
        # The chain waits once, at its end, not after every graph.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        keep = [view.buffer for view in (*inputs.values(), *outputs.values())]
        return _BoundSession(graph.file, session, binding, options, keep)
