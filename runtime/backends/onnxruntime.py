"""ONNX Runtime: one session per graph, one copy of the weights and of the activation memory for all of them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.backends.base import (
    LOW_MEMORY,
    Backend,
    BackendEntry,
    BackendOption,
    BoundGraph,
    Buffer,
    View,
)
from fastvar_trt.runtime.engines import EngineSet, engines_folder, usable_engines
from fastvar_trt.runtime.errors import BackendError, BundleError, UnavailableError
from fastvar_trt.runtime.manifest import GraphSpec, Manifest, TensorSpec, check_same_tensors
from fastvar_trt.runtime.precision import DTYPES

CPU_TARGET = "cpu"
_CPU_GRAPHS = "3"  # those that `fastvar build --target cpu` writes

# As ONNX Runtime calls the dtypes of sessions' inputs and outputs.
_ORT_TYPE: Mapping[str, str] = {f"tensor({name})": name for name in DTYPES} | {"tensor(float)": "float32"}
_ALIGNMENT = 64  # bytes; one cache line, and the widest vector load

_HALF_ON_CPU: Mapping[str, str] = {
    "bfloat16": "ONNX Runtime has no bfloat16 kernels for the CPU",
    "float16": "ONNX Runtime computes it in fp32 on the CPU, with an fp32 copy of the weights for every graph",
}

_arenas: set[tuple[str, int]] = set()  # devices of which ONNX Runtime's environment has one


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # systems without affinities


def import_onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            "onnxruntime is not installed; install one of the extras: pip install 'fastvar-trt[cpu]' or "
            "'fastvar-trt[gpu]' (both provide the module onnxruntime, so only one of them)"
        ) from error
    return onnxruntime


def cpu_fields() -> dict[str, str]:
    """What Linux says of the processor (`model name`, `flags`, ...); nothing on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return {}
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_has_vnni() -> bool:
    """Whether products of uint8 and int8 are added in 32 bits: on x86-64 with VNNI, and everywhere else."""
    flags = cpu_fields().get("flags", "").split()
    return not flags or any(flag.endswith("_vnni") for flag in flags)


def cpu_built_with(onnxruntime: Any) -> dict[str, str]:
    """What a prepacked graph depends on: the processor, the version of ONNX Runtime, and what `build` makes of it."""
    fields = cpu_fields()
    if fields:
        # The flags decide which kernels, and so which packing, ONNX Runtime picks.
        flags = fields.get("flags", fields.get("Features", ""))
        model = f"{fields.get('model name', '')} (flags {hashlib.sha256(flags.encode()).hexdigest()[:12]})"
    else:
        import platform

        model = f"{platform.machine()} {platform.processor()}"
    return {"onnxruntime": str(onnxruntime.__version__), "processor": model, "fastvar graphs": _CPU_GRAPHS}


class BoundSession(BoundGraph):
    """A session with all its buffers bound; `keep` are these, which the binding knows by pointer only."""

    def __init__(self, name: str, session: Any, binding: Any, options: Any, keep: Sequence[Buffer]) -> None:
        self._name, self._session, self._binding, self._options = name, session, binding, options
        self._keep = keep

    def enqueue(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime raises its own types, derived from Exception or RuntimeError
            raise BackendError(f"{self._name}: ONNX Runtime failed: {error}") from error


class OnnxRuntimeBackend(Backend):
    """Graphs on ONNX Runtime's CPU provider.

    Two modes, chosen when the bundle is opened: the bundle's own graphs, with the weights mapped from
    `weights.safetensors` and used in place; or, where `fastvar build --target cpu` has been run for this
    processor and this ONNX Runtime, the prepacked graphs of `engines/cpu`, which are faster.

    Args:
        device: `cpu`.
        num_threads: threads of one operator; default: one per core that this process may use.
        engines: `auto` takes fresh prepacked graphs where there are any, `off` never does, `require` raises
            where there are none.
        low_memory: see `Backend.low_memory`; the arena then gives back what such a graph took.
        profile: take ONNX Runtime's times of the operators; slower.
    """

    name = "onnxruntime"

    def __init__(
        self,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        engines: str = "auto",
        low_memory: bool = False,
        profile: bool = False,
    ) -> None:
        if device != "cpu":
            raise BackendError(f"backend onnxruntime: device: got {device!r}, expected 'cpu'")
        if num_threads is not None and num_threads < 1:
            raise BackendError(f"backend onnxruntime: num_threads: got {num_threads}, expected 1 or more")
        if engines not in ("auto", "off", "require"):
            raise BackendError(f"backend onnxruntime: engines: got {engines!r}, expected auto, off or require")
        if profile and low_memory:
            raise BackendError(
                "backend onnxruntime: takes times of operators with all graphs loaded; leave low_memory out"
            )
        self._num_threads = num_threads or num_cores()
        self._engines_mode = engines
        self.low_memory = low_memory
        self._profiles = tempfile.TemporaryDirectory() if profile else None  # one file per graph
        self._ort: Any = None
        self._bundle = Path()
        self._prepacked: EngineSet | None = None
        self._sessions: dict[str, Any] = {}

    @property
    def on_cpu(self) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "prepacked": self._prepacked is not None}

    def open_graphs(self, folder: Path) -> None:
        """Run the graphs of a folder as they are, whatever their precision: for checks of single graphs."""
        self._ort = import_onnxruntime()
        self._bundle = folder

    def open(self, bundle: Path, manifest: Manifest, *, check_hashes: bool) -> None:
        self.open_graphs(bundle)
        if self._engines_mode == "require" or (
            self._engines_mode == "auto" and engines_folder(bundle, CPU_TARGET).exists()
        ):
            try:
                self._prepacked = usable_engines(
                    bundle, manifest, CPU_TARGET, cpu_built_with(self._ort), CPU_TARGET, check_hashes=check_hashes
                )
            except BundleError as error:
                raise BackendError(f"{error}, or load with engines='off' (--engines off)") from error
        precision = manifest.own_precision
        if precision.computed in _HALF_ON_CPU and self._prepacked is None:
            raise BackendError(
                f"bundle {bundle}: {precision.name}: {_HALF_ON_CPU[precision.computed]}; run `fastvar build {bundle} "
                "--target cpu` (its graphs compute in fp32, over one copy of the weights), or export with --precision "
                "fp32"
            )

    def close(self) -> None:
        self._sessions.clear()
        if self._profiles is not None:
            self._profiles.cleanup()

    def load(self, graph: GraphSpec) -> None:
        if graph.file in self._sessions:
            return
        ort = self._ort
        share_arena("Cpu", 0, ort.create_and_register_allocator, ort)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_env_allocators", "1")
        # One pool per session: a finished session that goes on spinning takes the cores from the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._profiles is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._profiles.name) / Path(graph.file).stem)
        path = self._bundle / graph.file
        if self._prepacked is not None:
            path = self._prepacked.folder / self._prepacked.records[graph.file].file
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        else:
            # Prepacking would give every session its own copy of the weights.
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"{path.name}: ONNX Runtime cannot load it: {error}") from error
        _check_tensors(graph, session)
        self._sessions[graph.file] = session
        _return_freed_memory()

    def unload(self, graph: GraphSpec) -> None:
        self._sessions.pop(graph.file, None)
        _return_freed_memory()

    def operator_times(self) -> dict[str, dict[str, float]]:
        """By the operators' types; needs `profile`, and ends the profiling."""
        if self._profiles is None:
            return super().operator_times()
        result = {}
        for file, session in self._sessions.items():
            sums: dict[str, float] = defaultdict(float)
            for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                    sums[event["args"]["op_name"]] += event["dur"] / 1e3
            result[file] = dict(sums)
        return result

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        array: NDArray[Any] = np.empty(shape, dtype=DTYPES[dtype].host)
        num_bytes = max(array.nbytes, 1)
        raw = np.zeros(num_bytes + _ALIGNMENT, dtype=np.uint8)
        offset = -raw.ctypes.data % _ALIGNMENT
        owner = raw[offset : offset + array.nbytes].view(array.dtype).reshape(shape)
        return Buffer(shape, dtype, owner.ctypes.data if array.nbytes else raw.ctypes.data, owner)

    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        session = self._sessions[graph.file]
        binding = session.io_binding()
        for views, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, view in views.items():
                bind(name, "cpu", 0, DTYPES[view.buffer.dtype].onnx, list(view.shape), view.pointer)
        keep = [view.buffer for view in (*inputs.values(), *outputs.values())]
        options = self._ort.RunOptions()
        if self.is_on_demand(graph):
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return BoundSession(graph.file, session, binding, options, keep)

    def upload(self, buffer: Buffer, array: NDArray[Any]) -> None:
        assert array.shape == buffer.shape and array.dtype == buffer.owner.dtype, (array.shape, buffer.shape)
        buffer.owner[...] = array

    def download(self, buffer: Buffer) -> NDArray[Any]:
        return buffer.owner.copy()

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_ms(self, start: float, stop: float) -> float:
        return (stop - start) * 1e3


def share_arena(device: str, ordinal: int, register: Callable[[Any, Any], None], onnxruntime: Any) -> None:
    """One arena for the activations of all sessions of the process on a device, as they run one after another.

    It is registered with ONNX Runtime's process-wide environment, which takes one per device, and once only.

    Args:
        device: `Cpu` or `Cuda`, as ONNX Runtime calls its memory.
        ordinal: which one.
        register: called with where the memory is (`OrtMemoryInfo`) and how the arena grows (`OrtArenaCfg`).
        onnxruntime: the package.

    Raises:
        BackendError: ONNX Runtime refused it.
    """
    if (device, ordinal) in _arenas:
        return
    ort = onnxruntime
    memory = ort.OrtMemoryInfo(device, ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ordinal, ort.OrtMemType.DEFAULT)
    try:
        # max_mem 0: no limit; strategy 1: grow by what is asked for, not by powers of two.
        register(memory, ort.OrtArenaCfg(0, 1, -1, -1))
    except Exception as error:
        if "already" not in str(error):  # registered by the program that embeds us: it is then shared as well
            raise BackendError(f"onnxruntime: the shared allocator was refused: {error}") from error
    _arenas.add((device, ordinal))


def _return_freed_memory() -> None:
    """Give back to the system what a session has freed while it was made; does nothing where the C library cannot.

    glibc would keep it: per session, up to the size of its largest matrix.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _check_tensors(graph: GraphSpec, session: Any) -> None:
    """That the graph has the tensors of the manifest: they are bound by their addresses.

    Raises:
        BundleError: it has others.
    """
    for specs, found in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
        got = tuple(TensorSpec(t.name, tuple(t.shape), _ORT_TYPE.get(t.type, t.type)) for t in found)
        check_same_tensors(graph.file, specs, got, BundleError)


def _create(device: str | None, profile: bool, **options: Any) -> Backend:
    if device is None or not device.startswith("cuda"):
        if options.pop("capture", False):
            raise BackendError("backend onnxruntime on the CPU: cannot capture; leave it out")
        return OnnxRuntimeBackend(device=device or "cpu", profile=profile, **options)
    from fastvar_trt.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

    if profile:
        raise BackendError("ONNX Runtime's profiler is read on the CPU only")
    if "num_threads" in options or options.pop("engines", "auto") == "off":
        raise BackendError(
            f"backend onnxruntime on {device}: takes neither num_threads nor engines='off'; leave them out"
        )
    return OnnxRuntimeCudaBackend(device=device, **options)


NUM_THREADS = BackendOption("num_threads", int, "Threads per operator; default: one per core.", flag="--threads")
ENGINES = BackendOption(
    "engines",
    str,
    "On the CPU: whether to use what `fastvar build --target cpu` made; default: auto.",
    ("auto", "off", "require"),
)
CAPTURE = BackendOption("capture", bool, "On a GPU: run the chain as one CUDA graph.")


def _on_cpu() -> str:
    return f"{cpu_fields().get('model name', 'the CPU')}, onnxruntime {import_onnxruntime().__version__}"


def _on_cuda() -> str:
    from fastvar_trt.runtime.backends.onnxruntime_cuda import check_cuda

    return check_cuda(import_onnxruntime())


ENTRY = BackendEntry(
    "onnxruntime",
    _create,
    (NUM_THREADS, ENGINES, CAPTURE, LOW_MEMORY),
    {"cpu": _on_cpu, "cuda": _on_cuda},
)
