"""TensorRT: engines chained on one stream of one GPU, over one device copy of the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.backends.base import (
    LOW_MEMORY,
    Backend,
    BackendEntry,
    BackendOption,
    BoundGraph,
    Buffer,
    CapturedChain,
    View,
)
from fastvar_trt.runtime.backends.cuda import gpu_name
from fastvar_trt.runtime.backends.on_cuda import CudaBackend
from fastvar_trt.runtime.backends.onnxruntime import CAPTURE, ENGINES
from fastvar_trt.runtime.engines import EngineRecord
from fastvar_trt.runtime.errors import BackendError, UnavailableError
from fastvar_trt.runtime.manifest import GraphSpec, Manifest

TENSORRT_FLAVOURS = RTX_FLAVOUR, ENTERPRISE_FLAVOUR = "tensorrt_rtx", "tensorrt"
CURRENT_TARGET = "current"  # enterprise TensorRT builds for the GPU that it finds, and for no other
_LOGGER = logging.getLogger("fastvar_trt.runtime")
_INSTALL = {
    RTX_FLAVOUR: "pip install 'fastvar-trt[rtx]'",
    ENTERPRISE_FLAVOUR: "pip install 'fastvar-trt[tensorrt]'",
}


@dataclasses.dataclass(frozen=True)
class _Engine:
    record: EngineRecord
    engine: Any  # ICudaEngine
    is_on_demand: bool


class _BoundEngine(BoundGraph):
    """An execution context with all addresses set."""

    def __init__(self, name: str, context: Any, stream: int, keep: Sequence[Buffer]) -> None:
        self.context = context
        self._name, self._stream = name, stream
        self._keep = keep

    def enqueue(self) -> None:
        with nvtx_range(self._name):
            if not self.context.execute_async_v3(self._stream):
                raise BackendError(f"{self._name}: TensorRT could not run the engine; see its messages above")

    def check_capturable(self) -> None:
        """That it allocates and compiles nothing while it runs.

        Raises:
            BackendError: it does.
        """
        # Enterprise TensorRT has no such question, and captures what it runs.
        if hasattr(self.context, "is_stream_capturable") and not self.context.is_stream_capturable(self._stream):
            raise BackendError(f"{self._name}: TensorRT says that the engine cannot be captured; build it again")


def import_tensorrt(flavour: str) -> Any:
    """The package `tensorrt_rtx` or `tensorrt`.

    Raises:
        UnavailableError: it is not installed, or its libraries cannot be loaded.
    """
    try:
        module = importlib.import_module(flavour)
        _ = module.__version__  # its stubs alone make an empty package of that name
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"{flavour} cannot be imported ({error}); {_INSTALL[flavour]}") from error
    return module


class TensorRTBackend(CudaBackend):
    """Engines that `fastvar build` made, on one NVIDIA GPU.

    Contexts run one after another, so they share the memory of activations. After a warm-up the chain is captured as
    one CUDA graph per batch size. TensorRT for RTX compiles its kernels when a context is made; they are kept on disk,
    so that only the first process pays.

    Args:
        flavour: `tensorrt_rtx` or `tensorrt`.
        device: `cuda` or `cuda:N`.
        capture: whether chains are captured as CUDA graphs.
        cuda: the GPU; default: the real one, opened by `open`.
        kernel_cache: folder of the compiled kernels; `off`: none; default: `fastvar-trt` in the user's cache folder.
        low_memory: see `Backend.low_memory`; chains are then not captured.
        profile: take the times of every engine's layers for `operator_times`; each run then waits for its end.
        tensorrt: the TensorRT package; default: imported by `open`.
    """

    def __init__(
        self,
        flavour: str = "tensorrt_rtx",
        *,
        device: str = "cuda",
        capture: bool = True,
        kernel_cache: str | None = None,
        low_memory: bool = False,
        profile: bool = False,
        cuda: Any = None,
        tensorrt: Any = None,
    ) -> None:
        if profile and low_memory:
            raise BackendError(f"backend {flavour}: takes times of layers with all graphs loaded; leave low_memory out")
        super().__init__(flavour, device=device, capture=capture and not profile, low_memory=low_memory, cuda=cuda)
        self._layer_times: dict[str, dict[str, float]] | None = {} if profile else None
        self._profilers: list[Any] = []  # TensorRT keeps no reference
        self._trt: Any = tensorrt
        self._logger: Any = None
        self._runtime: Any = None
        self._loaded: dict[str, _Engine] = {}
        self._activations = (0, 0)  # address and size of the memory that all contexts share
        self._sharing: weakref.WeakSet[_BoundEngine] = weakref.WeakSet()  # the memory of activations
        self._lent: dict[str, Buffer] = {}  # by graph on demand
        self._cache_folder = _cache_folder(kernel_cache)
        self._kernels: Any = None  # IRuntimeCache, of all engines
        self._kernels_on_disk = b""
        self._num_bound, self._num_kept = 0, 0  # contexts that were made, and those whose kernels are on disk

    def open(self, bundle: Path, manifest: Manifest, *, check_hashes: bool) -> None:
        if self._trt is None:
            self._trt = import_tensorrt(self._flavour)
        self._open(
            bundle,
            manifest,
            {self._flavour: str(self._trt.__version__)},
            check_hashes=check_hashes,
            build_target=CURRENT_TARGET if self._flavour == ENTERPRISE_FLAVOUR else "",
        )
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)

    def close(self) -> None:
        self._kernels, self._kernels_on_disk, self._num_bound, self._num_kept = None, b"", 0, 0
        self._loaded.clear()
        self._runtime = None
        self._activations = (0, 0)
        super().close()

    def load(self, graph: GraphSpec) -> None:
        if graph.file in self._loaded:
            return
        record = self._engines.records[graph.file]
        data = (self._engines.folder / record.file).read_bytes()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(
                f"{record.file}: {self._flavour} {self._trt.__version__} on {self._device.name} "
                f"({self._device.target}) could not load the engine; run `fastvar build {self._bundle} --target "
                f"{self._device.target}`"
            )
        self._check_tensors(graph, record)
        self._hold_weights(graph)
        self._loaded[graph.file] = _Engine(record, engine, self.is_on_demand(graph))

    def lend(self, graph: GraphSpec, memory: Buffer | None) -> None:
        if memory is not None:
            self._lent[graph.file] = memory

    def num_activation_bytes(self, graph: GraphSpec) -> int:
        return self._engines.records[graph.file].activation_bytes

    def unload(self, graph: GraphSpec) -> None:
        self._lent.pop(graph.file, None)
        self._loaded.pop(graph.file, None)
        super().unload(graph)

    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        loaded = self._loaded[graph.file]
        context = loaded.engine.create_execution_context(self._runtime_config(loaded.engine))
        self._num_bound += 1
        if context is None:
            raise BackendError(f"{loaded.record.file}: TensorRT made no execution context; is the GPU's memory full?")
        if self.is_on_demand(graph):
            size = int(loaded.engine.device_memory_size_v2)
            lent = self._lent.pop(graph.file, None)
            fits = lent is not None and lent.shape[0] >= size
            context.set_device_memory(lent.pointer if lent is not None and fits else self._hold(graph, size), size)
        else:
            context.set_device_memory(*self._shared_activations())
        views = {**inputs, **outputs}
        addresses = {name: view.pointer for name, view in views.items()}
        for spec in loaded.record.outputs:
            if spec.name not in addresses:  # not asked for, but TensorRT computes every output
                addresses[spec.name] = self._scratch_for(spec)
        for name in loaded.record.weights:
            addresses[name] = self._weights[name]
        for spec in (*loaded.record.inputs, *loaded.record.outputs):
            if not context.set_tensor_address(spec.name, addresses[spec.name]):
                raise BackendError(f"{loaded.record.file}: TensorRT refused the address of {spec.name}")
        if self._layer_times is not None:
            self._profilers.append(_layer_profiler(self._trt, self._layer_times.setdefault(graph.file, {})))
            context.profiler = self._profilers[-1]
        bound = _BoundEngine(graph.name, context, self._device.stream, [view.buffer for view in views.values()])
        if not self.is_on_demand(graph):
            self._sharing.add(bound)
        return bound

    def capture(self, bound: Sequence[BoundGraph]) -> CapturedChain:
        for graph in bound:
            assert isinstance(graph, _BoundEngine)
            graph.check_capturable()
        return super().capture(bound)

    def keep_compiled(self) -> None:
        """Write the kernels that were compiled to disk, where there are new ones."""
        if self._kernels is None or self._num_kept == self._num_bound:
            return
        self._num_kept = self._num_bound
        path = self._kernel_file()
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            data = bytes(self._kernels.serialize())
            if data != self._kernels_on_disk:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(data)
                partial.replace(path)
                self._kernels_on_disk = data
        except Exception as error:  # the next process compiles again: no image is lost for it
            _LOGGER.warning("%s: compiled kernels cannot be kept: %s", path, error)

    def _runtime_config(self, engine: Any) -> Any:
        """How a context is made: on memory that we give it, with the kernels that are known already."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Enterprise engines hold their kernels.
        if self._cache_folder is not None and hasattr(config, "create_runtime_cache"):
            if self._kernels is None:
                self._kernels = config.create_runtime_cache()
                with contextlib.suppress(OSError):  # there are none
                    data = self._kernel_file().read_bytes()
                    # It checks itself whether they are for this GPU, driver and version.
                    self._kernels_on_disk = data if self._kernels.deserialize(data) else b""
            config.set_runtime_cache(self._kernels)
        return config

    def _kernel_file(self) -> Path:
        """One file per GPU, driver and version of TensorRT."""
        assert self._cache_folder is not None
        parts = (self._flavour, self._trt.__version__, self._device.name, self._device.driver)
        return self._cache_folder / ("-".join(re.sub(r"\W+", "_", str(part)) for part in parts) + ".kernels")

    def operator_times(self) -> dict[str, dict[str, float]]:
        """By TensorRT's names of layers, which may be several fused; needs `profile`."""
        return super().operator_times() if self._layer_times is None else self._layer_times

    def _shared_activations(self) -> tuple[int, int]:
        """Memory for the activations of any loaded engine; the graphs of a chain are loaded before one is bound."""
        size = max(
            int(loaded.engine.device_memory_size_v2) for loaded in self._loaded.values() if not loaded.is_on_demand
        )
        # Engines that are loaded later, of other sizes, need no more then.
        size = max(size, max((self._engines.records[file].activation_bytes for file in self._staying), default=0))
        if size > self._activations[1]:  # what captured chains use stays allocated until `close`
            self._activations = (self._allocate(size), size)
            for bound in self._sharing:
                bound.context.set_device_memory(*self._activations)
        return self._activations


def _cache_folder(given: str | None) -> Path | None:
    """Where compiled kernels are kept; None: nowhere."""
    if given is not None:
        return None if given == "off" else Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvar-trt"
    except RuntimeError:  # a user without a home
        return None


def _layer_profiler(trt: Any, times: dict[str, float]) -> Any:
    """An `IProfiler` that adds up ms by layer in `times`."""

    class LayerProfiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # as TensorRT's bindings ask of subclasses

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0.0) + ms

    return LayerProfiler()


@contextlib.contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """An NVTX range of the domain `fastvar`, where the package `nvtx` is installed."""
    try:
        import nvtx
    except ImportError:
        yield
        return
    with nvtx.annotate(name, domain="fastvar"):
        yield


KERNEL_CACHE = BackendOption(
    "kernel_cache", str, "TensorRT for RTX: folder that keeps compiled kernels, or `off`; default: in ~/.cache."
)


def _entry(flavour: str) -> BackendEntry:
    def create(device: str | None, profile: bool, **options: Any) -> Backend:
        if options.pop("engines", "auto") == "off":
            raise BackendError(f"backend {flavour}: runs engines only; leave engines='off' out")
        return TensorRTBackend(flavour, device=device or "cuda", profile=profile, **options)

    def check() -> str:
        version = import_tensorrt(flavour).__version__
        return f"{gpu_name()}, {flavour} {version}"

    return BackendEntry(flavour, create, (ENGINES, CAPTURE, KERNEL_CACHE, LOW_MEMORY), {"cuda": check})


RTX, ENTERPRISE = _entry(RTX_FLAVOUR), _entry(ENTERPRISE_FLAVOUR)
