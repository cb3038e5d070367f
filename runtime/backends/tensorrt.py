"""TensorRT: engines chained on one stream of one GPU, over one device copy of the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.backends.base import Backend, BoundGraph, Buffer, CapturedChain, View
from fastvar_trt.runtime.backends.cuda import CudaDevice, CudaOutOfMemoryError, host_array
from fastvar_trt.runtime.engines import EngineRecord, engines_folder, usable_engines
from fastvar_trt.runtime.errors import BackendError
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, GraphSpec, Manifest, TensorSpec, read_manifest

_ALIGNMENT = 256  # bytes, of every tensor on the device: what cudaMalloc gives, and what vector loads want
_INSTALL = {
    "tensorrt_rtx": "pip install 'fastvar-trt[rtx]'",
    "tensorrt": "pip install 'fastvar-trt[tensorrt]'",
}


@dataclasses.dataclass(frozen=True)
class _Engine:
    record: EngineRecord
    engine: Any  # ICudaEngine


class _BoundEngine(BoundGraph):
    def __init__(self, name: str, context: Any, stream: int, ranges: Any, keep: Sequence[Buffer]) -> None:
        self._name, self._context, self._stream, self._ranges = name, context, stream, ranges
        self._keep = keep

    def enqueue(self) -> None:
        with self._ranges(self._name):
            if not self._context.execute_async_v3(self._stream):
                raise BackendError(f"{self._name}: TensorRT could not run the engine; see its messages above")


class _CapturedChain(CapturedChain):
    def __init__(self, device: CudaDevice, graph: Any, marks: Sequence[Any]) -> None:
        self._device, self._graph = device, graph
        self.marks = marks

    def launch(self) -> None:
        self._device.launch(self._graph)

    def close(self) -> None:
        for mark in self.marks:
            self._device.release(mark)
        self._device.destroy_graph(self._graph)


class TensorRTBackend(Backend):
    """Engines that `fastvar build` made, on one NVIDIA GPU.

    Contexts run one after another, so they share the memory of activations. After a warm-up the chain is captured as
    one CUDA graph per batch size.

    Args:
        flavour: `tensorrt_rtx` or `tensorrt`.
        device: `cuda` or `cuda:N`.
        capture: whether chains are captured as CUDA graphs.
        cuda: the GPU; default: the real one, opened by `open`.
        tensorrt: the TensorRT package; default: imported by `open`.
    """

    def __init__(
        self,
        flavour: str = "tensorrt_rtx",
        *,
        device: str = "cuda",
        capture: bool = True,
        cuda: Any = None,
        tensorrt: Any = None,
    ) -> None:
        kind, _, ordinal = device.partition(":")
        if kind != "cuda" or not (ordinal or "0").isdigit():
            raise BackendError(f"backend {flavour}: device: got {device!r}, expected 'cuda' or 'cuda:N'")
        self.name = flavour
        self._ordinal = int(ordinal or 0)
        self._capture = capture
        self._device: Any = cuda
        self._trt: Any = tensorrt
        self._logger: Any = None
        self._runtime: Any = None
        self._bundle = Path()
        self._manifest: Manifest | None = None
        self._records: dict[str, EngineRecord] = {}
        self._engines: dict[str, _Engine] = {}
        self._weights: dict[str, int] = {}  # tensor -> device address
        self._allocations: list[int] = []
        self._activations = (0, 0)  # address and size of the memory that all contexts share
        self._contexts: list[Any] = []
        self._scratch: dict[str, Buffer] = {}

    @property
    def can_capture(self) -> bool:
        return self._capture

    def open(self, bundle: Path, precision: str, *, check_hashes: bool) -> None:
        if self._trt is None:
            try:
                self._trt = importlib.import_module(self.name)
            except ImportError as error:
                raise BackendError(f"{self.name} cannot be imported ({error}); {_INSTALL[self.name]}") from error
        if self._device is None:
            self._device = CudaDevice(self._ordinal)
        self._bundle = bundle
        self._manifest = read_manifest(bundle)
        target = self._device.target
        self._records = usable_engines(
            bundle, self._manifest, self.name, str(self._trt.__version__), target, check_hashes=check_hashes
        )
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)
        self._check_memory()
        self._upload_weights()

    def close(self) -> None:
        self._contexts.clear()
        self._engines.clear()
        self._scratch.clear()
        if self._device is not None:
            for pointer in self._allocations:
                self._device.free(pointer)
            self._device.close()
        self._allocations.clear()
        self._weights.clear()

    def load(self, graph: GraphSpec) -> None:
        if graph.file in self._engines:
            return
        record = self._records[graph.file]
        data = (engines_folder(self._bundle, self.name) / record.file).read_bytes()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(
                f"{record.file}: {self.name} {self._trt.__version__} on {self._device.name} ({self._device.target}) "
                f"could not load the engine; run `fastvar build {self._bundle} --target {self._device.target}`"
            )
        self._engines[graph.file] = _Engine(record, engine)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return Buffer(shape, dtype, self._allocate(TensorSpec("", shape, dtype).num_bytes), None)

    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        loaded = self._engines[graph.file]
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = loaded.engine.create_execution_context(strategy)
        if context is None:
            raise BackendError(f"{loaded.record.file}: TensorRT made no execution context; is the GPU's memory full?")
        pointer, size = self._shared_activations()
        context.set_device_memory(pointer, size)
        views = {**inputs, **outputs}
        keep = [view.buffer for view in views.values()]
        addresses = {name: view.pointer for name, view in views.items()}
        for spec in loaded.record.outputs:
            if spec.name not in addresses:  # not asked for, but TensorRT computes every output
                addresses[spec.name] = self._scratch_for(spec)
        for name in loaded.record.weights:
            addresses[name] = self._weights[name]
        for spec in (*loaded.record.inputs, *loaded.record.outputs):
            if not context.set_tensor_address(spec.name, addresses[spec.name]):
                raise BackendError(f"{loaded.record.file}: TensorRT refused the address of {spec.name}")
        self._contexts.append(context)
        return _BoundEngine(graph.name, context, self._device.stream, _range, keep)

    def upload(self, buffer: Buffer, array: NDArray[Any]) -> None:
        assert array.shape == buffer.shape, (array.shape, buffer.shape)
        self._device.upload(buffer.pointer, np.ascontiguousarray(array))

    def download(self, buffer: Buffer) -> NDArray[Any]:
        array = host_array(buffer.shape, buffer.dtype)
        self._device.download(array, buffer.pointer)
        return array

    def mark(self) -> Any:
        return self._device.record()

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        return float(self._device.elapsed_ms(start, stop))

    def release(self, mark: Any) -> None:
        self._device.release(mark)

    def capture(self, bound: Sequence[BoundGraph]) -> CapturedChain:
        self._device.synchronize()
        self._device.begin_capture()
        try:
            marks = [self._device.record()]
            for graph in bound:
                graph.enqueue()
                marks.append(self._device.record())
        except BaseException:
            self._device.abort_capture()
            raise
        return _CapturedChain(self._device, self._device.end_capture(), marks)

    def _allocate(self, num_bytes: int) -> int:
        pointer = self._device.allocate(num_bytes)
        self._allocations.append(pointer)
        return int(pointer)

    def _check_memory(self) -> None:
        """That the weights and all buffers fit, before the first of them is made.

        Raises:
            CudaOutOfMemoryError: they do not.
        """
        assert self._manifest is not None
        used = {name for record in self._records.values() for name in record.weights}
        weights = sum(end - start for name, (start, end, _) in self._weight_places().items() if name in used)
        buffers = sum(spec.num_bytes for graph in self._manifest.graphs for spec in graph.outputs)
        needed, free = weights + buffers, self._device.free_bytes()
        if needed > free:
            raise CudaOutOfMemoryError(
                f"bundle {self._bundle}: needs {needed / 2**20:.0f} MiB on the GPU ({weights / 2**20:.0f} of weights, "
                f"{buffers / 2**20:.0f} of buffers, activations not counted), {free / 2**20:.0f} MiB are free on "
                f"{self._device.name}; export with smaller --batch or --precision fp16, or free the GPU"
            )

    def _weight_places(self) -> dict[str, tuple[int, int, int]]:
        """Start and end in the weights file, and that file's data offset, by tensor."""
        with (self._bundle / WEIGHTS_FILE).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        base = 8 + length
        return {
            name: (entry["data_offsets"][0], entry["data_offsets"][1], base)
            for name, entry in entries.items()
            if name != "__metadata__"
        }

    def _upload_weights(self) -> None:
        """One copy of what the engines read, for all scales and batch sizes."""
        used = sorted({name for record in self._records.values() for name in record.weights})
        places = self._weight_places()
        offsets, total = {}, 0
        for name in used:
            offsets[name] = total
            start, end, _ = places[name]
            total += math.ceil((end - start) / _ALIGNMENT) * _ALIGNMENT
        pointer = self._allocate(total)
        mapped = np.memmap(self._bundle / WEIGHTS_FILE, dtype=np.uint8, mode="r")
        for name in used:
            start, end, base = places[name]
            self._device.upload(pointer + offsets[name], mapped[base + start : base + end])
            self._weights[name] = pointer + offsets[name]

    def _shared_activations(self) -> tuple[int, int]:
        """Memory for the activations of any loaded engine; the graphs of a chain are loaded before one is bound."""
        size = max(int(loaded.engine.device_memory_size_v2) for loaded in self._engines.values())
        if size > self._activations[1]:
            self._activations = (self._allocate(size), size)
            for context in self._contexts:
                context.set_device_memory(*self._activations)
        return self._activations

    def _scratch_for(self, spec: TensorSpec) -> int:
        """Memory for an output that nobody reads; one for all graphs, as they run one after another."""
        buffer = self._scratch.get(spec.name)
        if buffer is None or TensorSpec("", buffer.shape, buffer.dtype).num_bytes < spec.num_bytes:
            buffer = self._scratch[spec.name] = self.allocate(spec.shape, spec.dtype)
        return buffer.pointer


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    """An NVTX range, where the package `nvtx` is installed."""
    try:
        import nvtx
    except ImportError:
        yield
        return
    with nvtx.annotate(name, domain="fastvar"):
        yield
