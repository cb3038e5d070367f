"""The record of a bundle's TensorRT engines, `engines/<flavour>/engines.json`: what each was built from and for."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.errors import BundleError
from fastvar_trt.runtime.manifest import (
    ENGINES_FILE,
    ENGINES_FOLDER,
    WEIGHTS_FILE,
    FileSpec,
    Manifest,
    TensorSpec,
    file_sha256,
)

_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class EngineRecord:
    """One engine.

    Attributes:
        graph: the graph file that it computes.
        file: the engine file, in the same folder as the record.
        content: size and hash of the engine file.
        flavour: `tensorrt_rtx` or `tensorrt`.
        version: of TensorRT; no other version may load it.
        targets: the compute capabilities that it runs on.
        graph_sha256: hash of the graph file.
        weights_sha256: hash of the weights file; small weights are inside the engine.
        weights: inputs that are tensors of the weights file.
        inputs: what the engine reads, weights among it.
        outputs: what it writes.
        kernels: counts: `total`, `attention` (fused), `gemm_bias_gelu` (fused).
        seconds: that the build took.
    """

    graph: str
    file: str
    content: FileSpec
    flavour: str
    version: str
    targets: tuple[str, ...]
    graph_sha256: str
    weights_sha256: str
    weights: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kernels: Mapping[str, int]
    seconds: float

    def stale_reason(self, manifest: Manifest, folder: Path, *, check_hash: bool) -> str:
        """Why the engine must not be used for this bundle; empty where it may."""
        if self.graph not in manifest.files or self.graph_sha256 != manifest.files[self.graph].sha256:
            return f"{self.file} was built from another {self.graph}"
        if self.weights_sha256 != manifest.files[WEIGHTS_FILE].sha256:
            return f"{self.file} was built from another {WEIGHTS_FILE}"
        path = folder / self.file
        if not path.is_file():
            return f"{self.file} is missing"
        size = path.stat().st_size
        if size != self.content.num_bytes:
            return f"{self.file} has {size} bytes, expected {self.content.num_bytes}"
        if check_hash and file_sha256(path) != self.content.sha256:
            return f"{self.file} is damaged: its SHA-256 is not the recorded one"
        return ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> EngineRecord:
        """Read a JSON object.

        Raises:
            KeyError, TypeError, ValueError: not such an object.
        """

        def specs(entries: Any) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(str(e["name"]), tuple(map(int, e["shape"])), str(e["dtype"])) for e in entries)

        file = str(data["file"])
        if Path(file).name != file:
            raise ValueError(f"engine file {file!r}: expected a plain file name")
        return cls(
            graph=str(data["graph"]),
            file=file,
            content=FileSpec(int(data["content"]["num_bytes"]), str(data["content"]["sha256"])),
            flavour=str(data["flavour"]),
            version=str(data["version"]),
            targets=tuple(map(str, data["targets"])),
            graph_sha256=str(data["graph_sha256"]),
            weights_sha256=str(data["weights_sha256"]),
            weights=tuple(map(str, data["weights"])),
            inputs=specs(data["inputs"]),
            outputs=specs(data["outputs"]),
            kernels={str(name): int(count) for name, count in data["kernels"].items()},
            seconds=float(data["seconds"]),
        )


def engines_folder(bundle: Path, flavour: str) -> Path:
    """Where the engines of one TensorRT package lie."""
    return bundle / ENGINES_FOLDER / flavour


def read_engines(bundle: Path, flavour: str) -> dict[str, EngineRecord]:
    """The recorded engines by graph file; empty where none were built.

    Raises:
        BundleError: a record that cannot be read.
    """
    path = engines_folder(bundle, flavour) / ENGINES_FILE
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format_version"] != _FORMAT_VERSION:
            raise ValueError(f"format version {data['format_version']!r}, expected {_FORMAT_VERSION}")
        records = [EngineRecord.from_json(entry) for entry in data["engines"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{path}: damaged ({type(error).__name__}: {error}); remove it and run `fastvar build {bundle}` again"
        ) from error
    return {record.graph: record for record in records}


def write_records(folder: Path, records: Sequence[EngineRecord]) -> None:
    """Replace the record in a folder of engines in one step."""
    data = {"format_version": _FORMAT_VERSION, "engines": [record.to_json() for record in records]}
    partial = folder / f".{ENGINES_FILE}.{uuid.uuid4().hex[:8]}"
    try:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / ENGINES_FILE)
    finally:
        partial.unlink(missing_ok=True)


def usable_engines(
    bundle: Path, manifest: Manifest, flavour: str, version: str, target: str, *, check_hashes: bool
) -> dict[str, EngineRecord]:
    """The engines for every graph of the bundle, by graph file.

    Args:
        bundle: its folder.
        manifest: its manifest.
        flavour: the TensorRT package that will load them.
        version: its version.
        target: the compute capability of the GPU, as in `sm86`.
        check_hashes: compare their content with the record, too.

    Raises:
        BundleError: an engine that is missing, stale, damaged, or of another version or GPU; with the command that
            builds it.
    """
    # Enterprise TensorRT builds for the GPU that it finds, and for no other.
    command = f"run `fastvar build {bundle} --target {'current' if flavour == 'tensorrt' else target}`"
    records = read_engines(bundle, flavour)
    if not records:
        raise BundleError(f"bundle {bundle}: no engines of {flavour} were built; {command}")
    usable = {}
    for graph in manifest.graphs:
        record = records.get(graph.file)
        if record is None:
            raise BundleError(f"bundle {bundle}: no {flavour} engine for {graph.file}; {command}")
        reason = record.stale_reason(manifest, engines_folder(bundle, flavour), check_hash=check_hashes)
        if not reason and record.version != version:
            reason = f"{record.file} was built by {flavour} {record.version}, {version} is installed"
        if not reason and target not in record.targets:
            reason = f"{record.file} was built for {', '.join(record.targets)}, this GPU is {target}"
        if reason:
            raise BundleError(f"bundle {bundle}: {reason}; {command}")
        usable[graph.file] = record
    return usable
