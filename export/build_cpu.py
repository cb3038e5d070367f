"""`fastvar build --target cpu`: graphs optimised and weights prepacked once for this processor.

ONNX Runtime packs the matrices of every session into the layout of its kernels: ten sessions would hold ten packed
copies. Here each graph is optimised and packed in turn, and the packed blobs of all graphs are merged by content into
one file, which all sessions then map.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir

from fastvar_trt.export.folders import replace_folder, temporary_folder
from fastvar_trt.export.widen import widen_bfloat16
from fastvar_trt.runtime.backends.onnxruntime import (
    CPU_TARGET,
    cpu_description,
    import_onnxruntime,
    prepacked_graphs,
)
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import (
    ENGINES_FILE,
    ENGINES_FOLDER,
    WEIGHTS_FILE,
    FileSpec,
    check_files,
    read_manifest,
)

PACKED_FILE = "weights.prepacked"
_MIN_EXTERNAL_BYTES = 256  # smaller initializers stay in the graph
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What a build did; `built` is False where everything was fresh."""

    built: bool
    num_graphs: int
    num_bytes: int  # of the packed weights
    seconds: float


def build_cpu(bundle: Path, progress: Callable[[str], None] = lambda graph: None) -> BuildReport:
    """Prepack a bundle for ONNX Runtime on this processor, in `engines/cpu`.

    Raises:
        BundleError: the bundle is damaged.
        BackendError: ONNX Runtime is not installed.
        ExportError: a graph could not be optimised, or the disk is full.
    """
    begin = time.perf_counter()
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=True)
    ort = import_onnxruntime()
    usable, _ = prepacked_graphs(bundle, ort, check_hashes=True)
    if usable:
        return BuildReport(False, len(usable), 0, time.perf_counter() - begin)
    target = bundle / ENGINES_FOLDER / CPU_TARGET
    try:
        with temporary_folder(target) as folder:
            with (folder / PACKED_FILE).open("wb") as file:
                merged = _MergedFile(file)
                for graph in manifest.graphs:
                    progress(graph.file)
                    _prepack(ort, bundle / graph.file, folder / graph.file, merged)
            record = {
                "built_for": cpu_description(ort),
                "weights_sha256": manifest.files[WEIGHTS_FILE].sha256,
                "engines": [
                    {"graph": g.file, "graph_sha256": manifest.files[g.file].sha256, "file": g.file}
                    for g in manifest.graphs
                ],
                "files": {path.name: dataclasses.asdict(FileSpec.of(path)) for path in sorted(folder.iterdir())},
            }
            (folder / ENGINES_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            replace_folder(folder, target)
        num_bytes = (target / PACKED_FILE).stat().st_size
    except OSError as error:
        raise ExportError(f"{target}: cannot be written: {error.strerror or error}; nothing was kept") from error
    return BuildReport(True, len(manifest.graphs), num_bytes, time.perf_counter() - begin)


class _MergedFile:
    """Blobs appended once each, by content."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets: dict[bytes, int] = {}

    def add(self, blob: bytes) -> int:
        """The blob's offset in the file."""
        digest = hashlib.sha256(blob).digest()
        if digest not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._offsets[digest] = self._file.tell()
            self._file.write(blob)
        return self._offsets[digest]


def _prepack(ort: Any, source: Path, destination: Path, merged: _MergedFile) -> None:
    """Optimise and prepack one graph; its external data goes into the merged file."""
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        graph, data = Path(scratch) / "graph.onnx", "data.bin"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(graph)
        for key, value in {
            "session.optimized_model_external_initializers_file_name": data,
            "session.optimized_model_external_initializers_min_size_in_bytes": str(_MIN_EXTERNAL_BYTES),
            "session.save_external_prepacked_constant_initializers": "1",
        }.items():
            options.add_session_config_entry(key, value)
        with _widened(source) as computable:
            try:
                ort.InferenceSession(str(computable), options, providers=["CPUExecutionProvider"])
            except Exception as error:
                raise ExportError(f"{source.name}: ONNX Runtime could not optimise it: {error}") from error
        model = onnx.load(graph, load_external_data=False)
        blobs = Path(scratch) / data
        with blobs.open("rb") if blobs.is_file() else open(os.devnull, "rb") as file:  # noqa: PTH123
            for initializer in model.graph.initializer:
                if initializer.data_location == onnx.TensorProto.EXTERNAL:
                    _move_external(initializer, file, merged)
        onnx.save(model, destination)


@contextlib.contextmanager
def _widened(source: Path) -> Iterator[Path]:
    """For a bfloat16 graph a copy that computes in fp32, beside it as it shares its weights; others as they are."""
    model = ir.load(source)
    if not widen_bfloat16(model):
        yield source
        return
    path = source.with_name(f".widened-{uuid.uuid4().hex[:8]}-{source.name}")
    try:
        ir.save(model, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _move_external(initializer: onnx.TensorProto, file: BinaryIO, merged: _MergedFile) -> None:
    """Copy an initializer's data and packed blobs into the merged file, and rewrite where they lie.

    ONNX Runtime writes packed data as `prepacked_<n>` = `<kernel>+<hash>|<offset>;<length>;<checksum>|...`.
    """

    def moved(offset: str, length: str) -> str:
        file.seek(int(offset))
        return str(merged.add(file.read(int(length))))

    entries = {entry.key: entry for entry in initializer.external_data}
    entries["offset"].value = moved(entries["offset"].value, entries["length"].value)
    entries["location"].value = PACKED_FILE
    for key, entry in entries.items():
        if key.startswith("prepacked_"):
            kernel, *places = entry.value.split("|")
            rewritten = []
            for place in places:
                offset, length, *rest = place.split(";")
                rewritten.append(";".join([moved(offset, length), length, *rest]))
            entry.value = "|".join([kernel, *rewritten])
