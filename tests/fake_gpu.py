"""A GPU that is not there: host memory for device memory, ONNX Runtime for TensorRT's engines.

What TensorRT would be handed (weights as inputs, addresses, one stream, captured graphs) is what these take, so that
the backend and the scale loop above it run here as they do on a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from fastvar_trt.export.build.tensorrt.engine import BuiltEngine
from fastvar_trt.runtime.errors import OutOfMemoryError
from fastvar_trt.runtime.manifest import TensorSpec

VERSION = "0.fake"
_NUMPY = {1: "float32", 2: "uint8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}
_NAMES = {v: k for k, v in _NUMPY.items()}


class FakeCuda:
    """`CudaDevice` on the host. Work runs when it is queued, or, captured, when its graph is launched."""

    def __init__(self, target: str = "sm86", total_bytes: int = 1 << 30) -> None:
        self.name, self.target, self.stream = "a GPU that is not there", target, 1
        self.driver = 13000
        self.total_bytes = total_bytes
        self.memory: dict[int, NDArray[Any]] = {}
        self.num_allocations, self.num_launches = 0, 0
        self.num_events, self.num_graphs = 0, 0  # that are alive
        self.num_activations = 0
        self.captured: list[Callable[[], None]] | None = None
        self.spoil_captures = False

    def queue(self, work: Callable[[], None]) -> None:
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def close(self) -> None:
        self.stream = 0

    def free_bytes(self) -> int:
        return self.total_bytes - sum(array.nbytes for array in self.memory.values())

    def allocate(self, num_bytes: int) -> int:
        assert self.captured is None, "allocation inside a capture"
        if num_bytes > self.free_bytes():
            raise OutOfMemoryError(f"{self.name}: out of memory")
        array = np.zeros(max(num_bytes, 1), dtype=np.uint8)
        self.memory[array.ctypes.data] = array
        self.num_allocations += 1
        return int(array.ctypes.data)

    def free(self, pointer: int) -> None:
        del self.memory[pointer]

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        assert self.captured is None and array.flags.c_contiguous
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def download(self, array: NDArray[Any], pointer: int) -> None:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def synchronize(self) -> None:
        assert self.captured is None

    def record(self) -> list[float]:
        event = [0.0]
        self.num_events += 1
        self.queue(lambda: event.__setitem__(0, time.perf_counter()))
        return event

    def elapsed_ms(self, start: list[float], stop: list[float]) -> float:
        return (stop[0] - start[0]) * 1e3

    def release(self, event: list[float]) -> None:
        self.num_events -= 1

    def activate(self) -> None:
        self.num_activations += 1

    def begin_capture(self) -> None:
        self.captured = []

    def end_capture(self) -> list[Callable[[], None]]:
        work, self.captured = self.captured, None
        assert work is not None
        self.num_graphs += 1
        return work[: len(work) // 2] if self.spoil_captures else work

    def abort_capture(self) -> None:
        self.captured = None

    def launch(self, graph: list[Callable[[], None]]) -> None:
        self.num_launches += 1
        for work in graph:
            work()

    def destroy_graph(self, graph: Any) -> None:
        self.num_graphs -= 1


class FakeTensorRT:
    """The part of the package `tensorrt_rtx` that the backend uses; an engine's data is an ONNX model."""

    __version__ = VERSION

    class Logger:
        WARNING = 2

        def __init__(self, severity: int) -> None:
            pass

    class IProfiler:
        def report_layer_time(self, layer_name: str, ms: float) -> None:
            raise NotImplementedError

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "user-managed"

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.num_compiled = 0  # contexts whose kernels no cache had
        self.can_capture = True

    def Runtime(self, logger: Any) -> FakeTensorRT:
        return self

    def deserialize_cuda_engine(self, data: bytes) -> _Engine | None:
        return _Engine(self, self._cuda, data) if data.startswith(b"\x08") else None  # how an ONNX model begins


class _Kernels:
    """`IRuntimeCache`: which engines were compiled."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.known)).encode()

    def deserialize(self, data: bytes) -> bool:
        try:
            self.known = set(json.loads(data))
        except ValueError:  # of another GPU, driver or version
            return False
        return True


class _RuntimeConfig:
    strategy = ""
    kernels: _Kernels | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> _Kernels:
        return _Kernels()

    def set_runtime_cache(self, kernels: _Kernels) -> None:
        self.kernels = kernels


class _Engine:
    device_memory_size_v2 = 4096

    def __init__(self, trt: FakeTensorRT, cuda: FakeCuda, data: bytes) -> None:
        self._trt, self._cuda = trt, cuda
        self._hash = hashlib.sha256(data).hexdigest()
        self._model = onnx.load_from_string(data)

    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig()

    def create_execution_context(self, config: _RuntimeConfig) -> _Context:
        assert config.strategy == "user-managed"
        known = set() if config.kernels is None else config.kernels.known
        self._trt.num_compiled += self._hash not in known
        known.add(self._hash)
        return _Context(self._cuda, self._model, self._trt.can_capture)


class _Context:
    def __init__(self, cuda: FakeCuda, model: onnx.ModelProto, can_capture: bool) -> None:
        self._cuda, self._model, self._can_capture = cuda, model, can_capture
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] = (0, 0)
        self.profiler: Any = None

    def is_stream_capturable(self, stream: int) -> bool:
        return self._can_capture

    def set_device_memory(self, pointer: int, size: int) -> None:
        self._memory = (pointer, size)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._cuda.stream and self._memory[1] >= 4096 and self._memory[0] in self._cuda.memory
        self._cuda.queue(self._run)
        return True

    def _run(self) -> None:
        if self.profiler is not None:
            for node in self._model.graph.node:
                self.profiler.report_layer_time(node.op_type, 0.5)
        binding = self._session.io_binding()
        for values, bind in (
            (self._model.graph.input, binding.bind_input),
            (self._model.graph.output, binding.bind_output),
        ):
            for value in values:
                tensor = value.type.tensor_type
                shape = [d.dim_value for d in tensor.shape.dim]
                bind(value.name, "cpu", 0, tensor.elem_type, shape, self._addresses[value.name])
        self._session.run_with_iobinding(binding)


class FakeOnnxRuntime:
    """The part of `onnxruntime` that the CUDA backend uses: sessions on the CPU that say they are on the GPU."""

    __version__ = onnxruntime.__version__
    __file__ = onnxruntime.__file__
    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions
    OrtMemoryInfo = onnxruntime.OrtMemoryInfo
    OrtAllocatorType = onnxruntime.OrtAllocatorType
    OrtMemType = onnxruntime.OrtMemType
    OrtArenaCfg = onnxruntime.OrtArenaCfg

    def __init__(self, cuda: FakeCuda, providers: tuple[str, ...] = ("CUDAExecutionProvider",)) -> None:
        self._cuda, self._providers = cuda, providers

    def create_and_register_allocator_v2(self, provider: str, *arguments: Any) -> None:
        assert provider == "CUDAExecutionProvider"

    def get_available_providers(self) -> list[str]:
        return [*self._providers, "CPUExecutionProvider"]

    def InferenceSession(self, path: str, options: Any, providers: list[Any], enable_fallback: int) -> _Session:
        ((name, settings),) = providers
        assert name == "CUDAExecutionProvider" and enable_fallback == 0
        assert settings["device_id"] == "0" and settings["user_compute_stream"] == "1"
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        on_cpu = onnxruntime.SessionOptions()  # which must not be told to have no CPU
        on_cpu.intra_op_num_threads = 1
        return _Session(self._cuda, onnxruntime.InferenceSession(path, on_cpu, providers=["CPUExecutionProvider"]))


class _Session:
    def __init__(self, cuda: FakeCuda, session: Any) -> None:
        self._cuda, self._session = cuda, session

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> _Binding:
        return _Binding(self._session.io_binding())

    def run_with_iobinding(self, binding: _Binding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self._cuda.queue(lambda: self._session.run_with_iobinding(binding.on_cpu))


class _Binding:
    def __init__(self, on_cpu: Any) -> None:
        self.on_cpu = on_cpu

    def bind_input(self, name: str, device: str, ordinal: int, *rest: Any) -> None:
        assert (device, ordinal) == ("cuda", 0)
        self.on_cpu.bind_input(name, "cpu", 0, *rest)

    def bind_output(self, name: str, device: str, ordinal: int, *rest: Any) -> None:
        assert (device, ordinal) == ("cuda", 0)
        self.on_cpu.bind_output(name, "cpu", 0, *rest)


def fake_build_engine(
    flavour: Any, graph: bytes, name: str, targets: Any, progress: Callable[[str, float], None]
) -> BuiltEngine:
    """`build_engine` without TensorRT: the engine is the model that the parser would have been handed."""
    progress("Building", 0.5)
    model = onnx.load_from_string(graph)
    for node in model.graph.node:
        for attribute in [a for a in node.attribute if a.name == "TRT_decomposable"]:
            node.attribute.remove(attribute)  # ONNX Runtime does not know it
    inputs, outputs = (
        tuple(
            TensorSpec(
                value.name,
                tuple(d.dim_value for d in value.type.tensor_type.shape.dim),
                _NUMPY[value.type.tensor_type.elem_type],
            )
            for value in values
        )
        for values in (model.graph.input, model.graph.output)
    )
    return BuiltEngine(model.SerializeToString(), inputs, outputs, (), 4096)
