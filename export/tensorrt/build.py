"""All engines of a bundle: what is missing or stale is built, each is written when it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastvar_trt.export.tensorrt.engine import BuiltEngine, build_engine
from fastvar_trt.export.tensorrt.flavour import ENTERPRISE, Flavour, flavour_of
from fastvar_trt.export.tensorrt.graphs import TensorRTGraph, tensorrt_graph
from fastvar_trt.plugins.tensorrt_plugin import register_plugins
from fastvar_trt.runtime.backends.cuda import CudaDevice
from fastvar_trt.runtime.engines import EngineRecord, engines_folder, read_engines, write_records
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, FileSpec, GraphSpec, TensorSpec, check_files, read_manifest


@dataclasses.dataclass(frozen=True)
class TensorRTReport:
    """What a build did.

    Attributes:
        flavour: the TensorRT package.
        targets: that every engine now runs on.
        built: engines that were built, in order.
        kept: engines that were there and fresh.
        seconds: of the whole build.
    """

    flavour: str
    targets: tuple[str, ...]
    built: tuple[EngineRecord, ...]
    kept: tuple[EngineRecord, ...]
    seconds: float


def build_tensorrt(
    bundle: Path,
    targets: Sequence[str],
    progress: Callable[[str, str, float], None] = lambda graph, phase, share: None,
) -> TensorRTReport:
    """Build the engines of every graph of a bundle.

    Engines run on all their targets; where the bundle has engines for other targets already, the new ones are built
    for those, too. An interrupted build keeps what it finished and what was there.

    Args:
        bundle: its folder.
        targets: compute capabilities (`sm86`, ...) for TensorRT for RTX, or `current` for enterprise TensorRT.
        progress: called with the graph file, TensorRT's phase (`done` at the end) and the share of it that is done.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
        BackendError: the TensorRT package is not installed.
        ExportError: an unknown target, a graph that TensorRT refuses, or a full disk.
    """
    begin = time.perf_counter()
    flavour = Flavour.load(flavour_of(targets))
    if flavour.name == ENTERPRISE:
        register_plugins()
        targets = (_gpu_target(),)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=True)
    folder = engines_folder(bundle, flavour.name)
    records = read_engines(bundle, flavour.name)
    wanted = set(targets)
    for record in records.values():
        if record.version == flavour.version and flavour.name != ENTERPRISE:
            wanted |= set(record.targets)
    all_targets = tuple(sorted(wanted, key=lambda target: (len(target), target)))
    known_files = {record.file for record in records.values()}
    built, kept = [], []
    for graph in manifest.graphs:
        known = records.get(graph.file)
        if (
            known is not None
            and known.version == flavour.version
            and set(targets) <= set(known.targets)
            and not known.stale_reason(manifest, folder, check_hash=True)
        ):
            kept.append(known)
            continue
        prepared = tensorrt_graph(bundle / graph.file, plugins=flavour.name == ENTERPRISE)
        engine = build_engine(
            flavour,
            prepared,
            graph.file,
            all_targets,
            lambda phase, share, file=graph.file: progress(file, phase, share),  # type: ignore[misc]
        )
        inputs, outputs = _check_tensors(graph, prepared, engine)
        path = folder / f"{Path(graph.file).stem}.engine"
        with _writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            content = _write(path, engine.data)
        new = EngineRecord(
            graph=graph.file,
            file=path.name,
            content=content,
            flavour=flavour.name,
            version=flavour.version,
            targets=all_targets,
            graph_sha256=manifest.files[graph.file].sha256,
            weights_sha256=manifest.files[WEIGHTS_FILE].sha256,
            weights=prepared.weights,
            inputs=inputs,
            outputs=outputs,
            kernels={
                "total": engine.num_kernels,
                "attention": engine.num_attention,
                "gemm_bias_gelu": engine.num_gemm_gelu,
            },
            seconds=round(engine.seconds, 3),
        )
        records[graph.file] = new
        built.append(new)
        with _writing(folder):
            write_records(folder, list(records.values()))
        progress(graph.file, "done", 1.0)
    graphs = {graph.file for graph in manifest.graphs}
    if set(records) - graphs:  # of an export that was replaced
        records = {file: record for file, record in records.items() if file in graphs}
        with _writing(folder):
            write_records(folder, list(records.values()))
    for name in known_files - {record.file for record in records.values()}:
        (folder / name).unlink(missing_ok=True)
    common = set(all_targets).intersection(*(record.targets for record in records.values()))
    everywhere = tuple(target for target in all_targets if target in common)
    return TensorRTReport(flavour.name, everywhere, tuple(built), tuple(kept), time.perf_counter() - begin)


def _gpu_target() -> str:
    """The compute capability of this machine's GPU: enterprise TensorRT builds for no other."""
    device = CudaDevice()
    try:
        return device.target
    finally:
        device.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be written: {error.strerror or error}; the engines before are kept"
        ) from error


def _check_tensors(
    graph: GraphSpec, prepared: TensorRTGraph, engine: BuiltEngine
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """That the engine reads and writes what the manifest says, dtypes included; its inputs and outputs."""
    weights = set(prepared.weights)
    found = {
        is_input: tuple(TensorSpec(t.name, t.shape, t.dtype) for t in engine.tensors if t.is_input == is_input)
        for is_input in (True, False)
    }
    for is_input, expected in ((True, graph.inputs), (False, graph.outputs)):
        ours = {spec.name: spec for spec in found[is_input] if not (is_input and spec.name in weights)}
        for spec in expected:
            got = ours.pop(spec.name, None)
            if got != spec:
                raise ExportError(f"{graph.file}: the engine's tensor {spec.name}: got {got}, expected {spec}")
        if ours:
            raise ExportError(f"{graph.file}: the engine has unexpected tensors: {', '.join(ours)}")
    return found[True], found[False]


def _write(path: Path, data: bytes) -> FileSpec:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return FileSpec(len(data), hashlib.sha256(data).hexdigest())
