"""What backends on an NVIDIA GPU share: memory, one copy of the weights, one stream, captured chains."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.backends.base import Backend, BoundGraph, Buffer, CapturedChain
from fastvar_trt.runtime.backends.cuda import CudaDevice, host_array
from fastvar_trt.runtime.engines import EngineRecord, EngineSet, device_memory, usable_engines
from fastvar_trt.runtime.errors import BackendError, BundleError, OutOfMemoryError
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, GraphSpec, Manifest, TensorSpec, check_same_tensors
from fastvar_trt.runtime.weights import TensorPlace, read_layout

_ALIGNMENT = 256  # bytes, of every tensor on the device: what cudaMalloc gives, and what vector loads want


class _GraphOfChain(CapturedChain):
    def __init__(self, device: Any, graph: Any, marks: Sequence[Any]) -> None:
        self._device, self._graph = device, graph
        self.marks = marks

    def launch(self) -> None:
        self._device.launch(self._graph)

    def close(self) -> None:
        for mark in self.marks:
            self._device.release(mark)
        self._device.destroy_graph(self._graph)


class CudaBackend(Backend):
    """Graphs whose large weights are inputs, on one GPU.

    Args:
        flavour: the folder of `engines/` that holds what this backend loads.
        device: `cuda` or `cuda:N`.
        capture: whether chains are captured as CUDA graphs after a warm-up.
        low_memory: see `Backend.low_memory`; nothing is captured then.
        cuda: the GPU; default: the real one, opened by `open`.
        one_stream: run on the process's stream for this GPU, with all other backends that do.
    """

    def __init__(
        self, flavour: str, *, device: str, capture: bool, low_memory: bool, cuda: Any, one_stream: bool = False
    ) -> None:
        kind, _, ordinal = device.partition(":")
        if kind != "cuda" or not (ordinal or "0").isdigit():
            raise BackendError(f"backend {flavour}: device: got {device!r}, expected 'cuda' or 'cuda:N'")
        self.name = flavour
        self._flavour = flavour
        self._ordinal = int(ordinal or 0)
        self._capture = capture and not low_memory
        self.low_memory = low_memory
        self._device: Any = cuda
        self._one_stream = one_stream
        self._bundle = Path()
        self._engines = EngineSet(Path())
        self._staying: list[str] = []  # files of graphs that are not on demand
        self._places: dict[str, TensorPlace] = {}
        self._weights: dict[str, int] = {}  # tensor -> device address
        self._allocations: list[int] = []
        self._held: dict[str, list[int]] = defaultdict(list)  # graph -> allocations that go with it
        self._brought: dict[str, list[str]] = defaultdict(list)  # graph -> weights that came with it
        self._scratch: dict[str, Buffer] = {}

    @property
    def can_capture(self) -> bool:
        return self._capture

    def activate(self) -> None:
        self._device.activate()

    def close(self) -> None:
        self._scratch.clear()
        if self._device is not None:
            self._device.activate()
            for pointer in self._allocations:
                self._device.free(pointer)
            self._device.close()
        self._device = None
        self._allocations.clear()
        self._weights.clear()
        self._held.clear()
        self._brought.clear()

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return Buffer(shape, dtype, self._allocate(TensorSpec("", shape, dtype).num_bytes), None)

    def free(self, buffer: Buffer) -> None:
        self._free(buffer.pointer)

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
        marks: list[Any] = []
        self._device.begin_capture()
        try:
            marks.append(self._device.record())
            for graph in bound:
                graph.enqueue()
                marks.append(self._device.record())
            captured = self._device.end_capture()
        except BaseException as error:
            self._device.abort_capture()
            for mark in marks:
                self._device.release(mark)
            if isinstance(error, BackendError):
                raise BackendError(
                    f"backend {self.name}: the chain cannot be captured as a CUDA graph ({error}); load with "
                    "capture=False (--no-capture)"
                ) from error
            raise
        return _GraphOfChain(self._device, captured, marks)

    def _open(
        self,
        bundle: Path,
        manifest: Manifest,
        built_with: Mapping[str, str],
        *,
        check_hashes: bool,
        target: str = "",
        build_target: str = "",
    ) -> None:
        """Take the GPU, check what the bundle has for it, and whether it fits.

        Args:
            bundle: its folder.
            manifest: its manifest.
            built_with: what is here of what the engines depend on.
            check_hashes: compare their content with the record.
            target: what they must have been built for; default: this GPU.
            build_target: what `fastvar build` calls it; default: the same.
        """
        if self._device is None:
            self._device = CudaDevice(self._ordinal, one_stream=self._one_stream)
        self._device.activate()
        self._bundle = bundle
        self._engines = usable_engines(
            bundle,
            manifest,
            self._flavour,
            built_with,
            target or self._device.target,
            build_target=build_target,
            check_hashes=check_hashes,
        )
        self._places = read_layout(bundle / WEIGHTS_FILE)
        self._staying = [graph.file for graph in manifest.graphs if not self.is_on_demand(graph)]
        parts = device_memory(manifest, self._engines, self._places, low_memory=self.low_memory)
        free = self._device.free_bytes()
        if sum(parts.values()) > free:
            of = ", ".join(f"{num_bytes / 2**20:.0f} of {name}" for name, num_bytes in parts.items())
            of += "" if parts["activations"] else ", which the builder could not know"
            less = "" if self.low_memory else "load with low_memory=True (--low-memory), "
            raise OutOfMemoryError(
                f"bundle {bundle}: needs {sum(parts.values()) / 2**20:.0f} MiB on the GPU ({of}), {free / 2**20:.0f} "
                f"MiB are free on {self._device.name}; {less}export with smaller --batch or a smaller "
                "--precision, or free the GPU"
            )

    def _check_tensors(self, graph: GraphSpec, record: EngineRecord) -> None:
        """That an engine has the tensors of the manifest, and weights: they are bound by their addresses.

        Raises:
            BundleError: it has others.
        """
        own = tuple(spec for spec in record.inputs if spec.name not in record.weights)
        for expected, got in ((graph.inputs, own), (graph.outputs, record.outputs)):
            check_same_tensors(record.file, expected, got, BundleError)

    def _allocate(self, num_bytes: int) -> int:
        pointer = int(self._device.allocate(num_bytes))
        self._allocations.append(pointer)
        return pointer

    def _free(self, pointer: int) -> None:
        self._allocations.remove(pointer)
        self._device.free(pointer)

    def _hold(self, graph: GraphSpec, num_bytes: int) -> int:
        """Memory that goes when the graph is unloaded."""
        pointer = self._allocate(num_bytes)
        self._held[graph.file].append(pointer)
        return pointer

    def synchronize(self) -> None:
        self._device.synchronize()

    def unload(self, graph: GraphSpec) -> None:
        for pointer in self._held.pop(graph.file, ()):
            self._free(pointer)
        for name in self._brought.pop(graph.file, ()):
            del self._weights[name]

    def _hold_weights(self, graph: GraphSpec) -> None:
        """Upload what an engine reads and none before it: one copy for all scales and batch sizes."""
        names = [name for name in self._engines.records[graph.file].weights if name not in self._weights]
        if not names:
            return
        offsets, total = {}, 0
        for name in names:
            offsets[name] = total
            total += math.ceil(self._places[name].num_bytes / _ALIGNMENT) * _ALIGNMENT
        pointer = self._hold(graph, total)
        mapped = np.memmap(self._bundle / WEIGHTS_FILE, dtype=np.uint8, mode="r")
        for name in names:
            place = self._places[name]
            self._device.upload(pointer + offsets[name], mapped[place.offset : place.offset + place.num_bytes])
            self._weights[name] = pointer + offsets[name]
            self._brought[graph.file].append(name)

    def _scratch_for(self, spec: TensorSpec) -> int:
        """Memory for an output that nobody reads; one for all graphs, as they run one after another."""
        buffer = self._scratch.get(spec.name)
        if buffer is None or buffer.num_bytes < spec.num_bytes:
            buffer = self._scratch[spec.name] = self.allocate(spec.shape, spec.dtype)
        return buffer.pointer
