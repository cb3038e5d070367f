"""ONNX Runtime's CUDA provider: sessions on one stream of one GPU, over one device copy of the weights.

Tested with the real package over CUDA libraries that compute nothing; it has not been run on a real GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.backends.base import BoundGraph, View
from fastvar_trt.runtime.backends.cuda import gpu_name
from fastvar_trt.runtime.backends.on_cuda import CudaBackend
from fastvar_trt.runtime.backends.onnxruntime import BoundSession, import_onnxruntime, share_arena
from fastvar_trt.runtime.errors import BackendError, UnavailableError
from fastvar_trt.runtime.manifest import GraphSpec, Manifest, TensorSpec
from fastvar_trt.runtime.precision import DTYPES

FLAVOUR = "onnxruntime_cuda"
CUDA_TARGET = "cuda"
BUILT_WITH = {"fastvar graphs": "2"}  # those that `fastvar build --target cuda` writes
_PROVIDER = "CUDAExecutionProvider"


class OnnxRuntimeCudaBackend(CudaBackend):
    """What `fastvar build --target cuda` made, on ONNX Runtime's CUDA provider.

    A graph of which ONNX Runtime would place a node on the CPU is refused at load. Activations of all sessions of the
    process share one arena, and so all run on one stream: what one has freed, another may take while it is still used.

    Args:
        device: `cuda` or `cuda:N`.
        capture: run every session as one CUDA graph, of ONNX Runtime's own making: it cannot capture several sessions
            in a graph of the caller's (the process ends). It keeps them by thread: the first run in each records anew.
            Off by default.
        low_memory: see `Backend.low_memory`; the arena then gives back what such a graph took.
        cuda: the GPU; default: the real one, opened by `open`.
        onnxruntime: the package; default: imported by `open`, with the libraries that pip has installed beside it.
    """

    def __init__(
        self,
        *,
        device: str = "cuda",
        capture: bool = False,
        low_memory: bool = False,
        cuda: Any = None,
        onnxruntime: Any = None,
    ) -> None:
        super().__init__(FLAVOUR, device=device, capture=False, low_memory=low_memory, cuda=cuda, one_stream=True)
        self._graphs_of_sessions = capture and not low_memory
        self._ort: Any = onnxruntime
        self._sessions: dict[str, Any] = {}
        self._num_bound: Counter[str] = Counter()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "onnxruntime": self._ort.__version__, "capture": self._graphs_of_sessions}

    def open(self, bundle: Path, manifest: Manifest, *, check_hashes: bool) -> None:
        if self._ort is None:
            self._ort = import_onnxruntime()
            _check_libraries(self._ort)
        _check_provider(self._ort)
        self._open(bundle, manifest, BUILT_WITH, check_hashes=check_hashes, target=CUDA_TARGET)
        provider_options = {"device_id": str(self._ordinal)}
        share_arena(
            "Cuda",
            self._ordinal,
            lambda memory, arena: self._ort.create_and_register_allocator_v2(
                _PROVIDER, memory, provider_options, arena
            ),
            self._ort,
        )

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
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Not from the arena: what CUDA graphs of other sessions write would be among it.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        settings = {
            "device_id": str(self._ordinal),
            "user_compute_stream": str(self._device.stream),
            "use_tf32": "0",  # products in fp32 are those that half precision has been kept out of
            "enable_cuda_graph": str(int(self._graphs_of_sessions)),
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
        self._hold_weights(graph)
        self._sessions[graph.file] = session

    def unload(self, graph: GraphSpec) -> None:
        self._sessions.pop(graph.file, None)
        super().unload(graph)

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
        if self.is_on_demand(graph):
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self._ordinal}")
        if self._graphs_of_sessions:  # one for every set of addresses
            self._num_bound[graph.file] += 1
            options.add_run_config_entry("gpu_graph_id", str(self._num_bound[graph.file]))
        keep = [view.buffer for view in (*inputs.values(), *outputs.values())]
        return BoundSession(graph.file, session, binding, options, keep)


def check_cuda(onnxruntime: Any) -> str:
    """The GPU, and with what it would be used.

    Raises:
        UnavailableError: there is none, or no provider for it.
    """
    _check_provider(onnxruntime)
    _check_libraries(onnxruntime)
    return f"{gpu_name()}, onnxruntime {onnxruntime.__version__}"


def _check_provider(onnxruntime: Any) -> None:
    available = onnxruntime.get_available_providers()
    if _PROVIDER not in available:
        raise UnavailableError(
            f"onnxruntime {onnxruntime.__version__} has no {_PROVIDER} (it has {', '.join(available)}); pip uninstall "
            "onnxruntime, then pip install 'fastvar-trt[gpu]'"
        )


def _check_libraries(onnxruntime: Any) -> None:
    """That the CUDA provider finds its libraries: ONNX Runtime itself would say that nodes are placed on the CPU.

    Raises:
        UnavailableError: one is missing; its name.
    """
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # what it does not find is named below
            onnxruntime.preload_dlls()
    folder = Path(onnxruntime.__file__).parent / "capi"
    provider = folder / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():  # another system, or a package without the provider, which has its own message
        return
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(provider))
        ctypes.CDLL("libcudnn.so.9")  # which it looks for when a convolution is to be run
    except OSError as error:
        raise UnavailableError(
            f"onnxruntime {onnxruntime.__version__}: its CUDA provider cannot be loaded ({error}); pip install "
            "'fastvar-trt[gpu]' brings CUDA's libraries, the driver is NVIDIA's"
        ) from error
