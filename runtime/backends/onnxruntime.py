"""ONNX Runtime: one session per graph, one copy of the weights and of the activation memory for all of them."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.backends.base import Backend, BoundGraph, Buffer, View
from fastvar_trt.runtime.errors import BackendError, BundleError, UnavailableError
from fastvar_trt.runtime.manifest import (
    DTYPE_BYTES,
    ENGINES_FILE,
    ENGINES_FOLDER,
    WEIGHTS_FILE,
    FileSpec,
    GraphSpec,
    file_sha256,
    read_manifest,
)

CPU_TARGET = "cpu"

# ONNX TensorProto.DataType numbers: bound by pointer, so bfloat16 needs no numpy dtype.
ELEMENT_TYPE: Mapping[str, int] = {
    "float32": 1,
    "uint8": 2,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "bfloat16": 16,
}
_ORT_TYPE: Mapping[str, str] = {name: f"tensor({name})" for name in ELEMENT_TYPE} | {"float32": "tensor(float)"}
_NUMPY_DTYPE: Mapping[str, Any] = {name: name for name in DTYPE_BYTES} | {"bfloat16": "uint16"}
_ALIGNMENT = 64  # bytes; one cache line, and the widest vector load

_HALF_ON_CPU: Mapping[str, str] = {
    "bf16": "ONNX Runtime has no bfloat16 kernels for the CPU",
    "fp16": "ONNX Runtime computes it in fp32 on the CPU, with an fp32 copy of the weights for every graph",
}

_env_allocator_registered = False


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


def cpu_description(onnxruntime: Any) -> dict[str, str]:
    """What a prepacked engine depends on: the processor's name and the version of ONNX Runtime."""
    fields = cpu_fields()
    if fields:
        # The flags decide which kernels, and so which packing, ONNX Runtime picks.
        model = f"{fields.get('model name', '')} {fields.get('flags', fields.get('Features', ''))}"
    else:
        import platform

        model = f"{platform.machine()} {platform.processor()}"
    return {"onnxruntime": str(onnxruntime.__version__), "cpu": model}


class _BoundSession(BoundGraph):
    def __init__(self, session: Any, binding: Any, name: str, run_options: Any, keep: Any) -> None:
        self._session, self._binding, self._name = session, binding, name
        self._run_options = run_options
        self._keep = keep  # the buffers, which the binding knows by pointer only

    def enqueue(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._run_options)
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
        profile_to: a folder for ONNX Runtime's profiles of the operators, one file per graph; slower.
    """

    name = "onnxruntime"

    def __init__(
        self,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        engines: str = "auto",
        profile_to: Path | None = None,
    ) -> None:
        if device != "cpu":
            raise BackendError(f"backend onnxruntime: device: got {device!r}, expected 'cpu'")
        if num_threads is not None and num_threads < 1:
            raise BackendError(f"backend onnxruntime: num_threads: got {num_threads}, expected 1 or more")
        if engines not in ("auto", "off", "require"):
            raise BackendError(f"backend onnxruntime: engines: got {engines!r}, expected auto, off or require")
        self._num_threads = num_threads or num_cores()
        self._engines_mode = engines
        self._profile_to = profile_to
        self._ort: Any = None
        self._bundle = Path()
        self._prepacked: dict[str, str] = {}
        self._sessions: dict[str, Any] = {}

    @property
    def prepacked(self) -> bool:
        """True where the prepacked graphs of `engines/cpu` are in use."""
        return bool(self._prepacked)

    def open(self, bundle: Path, precision: str, *, check_hashes: bool) -> None:
        self._ort = import_onnxruntime()
        self._bundle = bundle
        if self._engines_mode != "off":
            self._prepacked, reason = prepacked_graphs(bundle, self._ort, check_hashes=check_hashes)
            if reason and (self._engines_mode == "require" or (bundle / ENGINES_FOLDER / CPU_TARGET).exists()):
                raise BackendError(
                    f"bundle {bundle}: the engines for the target cpu cannot be used: {reason}; run "
                    f"`fastvar build {bundle} --target cpu`, or load with engines='off' (--engines off)"
                )
        if precision != "fp32" and not self._prepacked:
            raise BackendError(
                f"bundle {bundle}: {precision}: {_HALF_ON_CPU[precision]}; run `fastvar build {bundle} --target cpu` "
                "(its graphs compute in fp32, over one copy of the weights), or export with --precision fp32"
            )

    def close(self) -> None:
        self._sessions.clear()

    def load(self, graph: GraphSpec) -> None:
        if graph.file in self._sessions:
            return
        ort = self._ort
        self._share_allocator()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_env_allocators", "1")
        # One pool per session: a finished session that goes on spinning takes the cores from the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._profile_to is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profile_to / Path(graph.file).stem)
        path = self._bundle / graph.file
        if self._prepacked:
            path = self._bundle / ENGINES_FOLDER / CPU_TARGET / self._prepacked[graph.file]
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

    def operator_times(self) -> dict[str, dict[str, float]]:
        """By the operators' types; needs `profile_to`, and ends the profiling."""
        if self._profile_to is None:
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
        array: NDArray[Any] = np.empty(shape, dtype=_NUMPY_DTYPE[dtype])
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
                bind(name, "cpu", 0, ELEMENT_TYPE[view.buffer.dtype], list(view.shape), view.pointer)
        keep = [view.buffer for view in (*inputs.values(), *outputs.values())]
        return _BoundSession(session, binding, graph.file, self._ort.RunOptions(), keep)

    def upload(self, buffer: Buffer, array: NDArray[Any]) -> None:
        assert array.shape == buffer.shape and array.dtype == buffer.owner.dtype, (array.shape, buffer.shape)
        buffer.owner[...] = array

    def download(self, buffer: Buffer) -> NDArray[Any]:
        return buffer.owner.copy()

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_ms(self, start: float, stop: float) -> float:
        return (stop - start) * 1e3

    def _share_allocator(self) -> None:
        # Sessions run one after another, so one arena holds the activations of all of them. It is registered
        # with ONNX Runtime's process-wide environment, which takes one allocator per device.
        global _env_allocator_registered
        if _env_allocator_registered:
            return
        ort = self._ort
        memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        try:
            # max_mem 0: no limit; strategy 1: grow by what is asked for, not by powers of two.
            ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, 1, -1, -1))
        except Exception as error:
            if "already" not in str(error):  # registered by the program that embeds us: it is then shared as well
                raise BackendError(f"onnxruntime: the shared allocator was refused: {error}") from error
        _env_allocator_registered = True


def _check_tensors(graph: GraphSpec, session: Any) -> None:
    """That the graph has the tensors of the manifest: they are bound by their addresses.

    Raises:
        BundleError: it has others.
    """
    for specs, found in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
        expected = {(spec.name, spec.shape, _ORT_TYPE[spec.dtype]) for spec in specs}
        got = {(tensor.name, tuple(tensor.shape), tensor.type) for tensor in found}
        for name, shape, kind in sorted(expected ^ got, key=str):
            where = "manifest" if (name, shape, kind) in expected else "graph"
            raise BundleError(
                f"{graph.file}: only the {where} has the tensor {name}, {kind} of {shape}; copy the bundle again, or "
                "export it again"
            )


def prepacked_graphs(bundle: Path, onnxruntime: Any, *, check_hashes: bool) -> tuple[dict[str, str], str]:
    """The usable prepacked graphs of `engines/cpu` by the graph file they were built from.

    Args:
        bundle: its folder.
        onnxruntime: the module.
        check_hashes: compare the SHA-256 of the files, too; else their sizes only.

    Returns:
        ({graph file: prepacked file}, "") or ({}, why there are none).
    """
    folder = bundle / ENGINES_FOLDER / CPU_TARGET
    record = folder / ENGINES_FILE
    if not record.is_file():
        return {}, "none were built"
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        built_for, weights_sha256 = dict(data["built_for"]), str(data["weights_sha256"])
        files = {str(entry["graph"]): str(entry["file"]) for entry in data["engines"]}
        sources = {str(entry["graph"]): str(entry["graph_sha256"]) for entry in data["engines"]}
        built = {str(name): FileSpec(**spec) for name, spec in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{record.name} is damaged ({error})"
    here = cpu_description(onnxruntime)
    for key, value in here.items():
        if built_for.get(key) != value:
            return {}, f"built for another {key}"
    for name, spec in built.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != spec.num_bytes:
            return {}, f"{name} is missing or truncated"
        if check_hashes and file_sha256(path) != spec.sha256:
            return {}, f"{name} is damaged"
    if not set(files.values()) <= set(built):
        return {}, f"{record.name} is damaged (an engine is not among its files)"
    manifest = read_manifest(bundle)
    if weights_sha256 != manifest.files[WEIGHTS_FILE].sha256:
        return {}, "built from other weights"
    for graph in manifest.graphs:
        if graph.file not in sources:
            return {}, f"there is none of {graph.file}"
        if sources[graph.file] != manifest.files[graph.file].sha256:
            return {}, f"{graph.file} has changed since"
    return files, ""
