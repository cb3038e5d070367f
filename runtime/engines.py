"""What was built of a bundle for one target: `engines/<folder>/engines.json` says of what, with what and for what.

One schema for all targets: the prepacked graphs of ONNX Runtime, its graphs for CUDA, TensorRT's engines.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.errors import BundleError
from fastvar_trt.runtime.layout import PASSED, passed_bytes
from fastvar_trt.runtime.manifest import (
    DECODER,
    ENGINES_FILE,
    ENGINES_FOLDER,
    ON_DEMAND,
    WEIGHTS_FILE,
    FileSpec,
    Manifest,
    TensorSpec,
)
from fastvar_trt.runtime.weights import TensorPlace

FORMAT_VERSION = 3


@dataclasses.dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine, which is one launch of a kernel, as the builder lists it.

    Attributes:
        name: the builder's own.
        kind: `linear`, `attention`, `convolution`, `selection`, `gathering`, `restoring`, `sort`, `copy` or `other`.
        dtype: of its arithmetic.
        num_bytes: of what it reads and writes, each tensor once.
        flop: of matrix products and convolutions, two per multiply-add; of selections, the comparisons.
    """

    name: str
    kind: str
    dtype: str
    num_bytes: int
    flop: int


@dataclasses.dataclass(frozen=True)
class EngineRecord:
    """One engine: whatever a backend loads in place of a graph.

    Attributes:
        graph: the graph file that it computes.
        file: the engine file, in the same folder as the record.
        content: size and hash of the engine file.
        built_with: what it depends on besides graph and weights -> version: another one must not load it.
        targets: what it runs on.
        graph_sha256: hash of the graph file.
        weights_sha256: hash of the weights file; small weights are inside the engine.
        weights: inputs that are tensors of the weights file.
        inputs: what the engine reads, weights among it.
        outputs: what it writes.
        kernels: counts by kind, where the builder tells them: `total`, `attention` (fused), `gemm_bias_gelu` (fused);
            `plugins`: 1 where the cache operator is our plugin.
        layers: every launch, in order, where the builder lists them.
        activation_bytes: of device memory while it runs, where the builder says.
        seconds: that the build took.
    """

    graph: str
    file: str
    content: FileSpec
    built_with: Mapping[str, str]
    targets: tuple[str, ...]
    graph_sha256: str
    weights_sha256: str
    weights: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kernels: Mapping[str, int]
    layers: tuple[EngineLayer, ...]
    activation_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        tensors = {"inputs": self.inputs, "outputs": self.outputs}
        layers = [dataclasses.astuple(layer) for layer in self.layers]  # rows: there are a thousand of them
        data = dataclasses.asdict(dataclasses.replace(self, layers=()))
        return data | {name: [t.to_json() for t in specs] for name, specs in tensors.items()} | {"layers": layers}

    @classmethod
    def from_json(cls, data: Any) -> EngineRecord:
        """Read a JSON object.

        Raises:
            KeyError, TypeError, ValueError: not such an object.
        """
        return cls(
            graph=str(data["graph"]),
            file=_plain_name(data["file"]),
            content=FileSpec(int(data["content"]["num_bytes"]), str(data["content"]["sha256"])),
            built_with={str(name): str(version) for name, version in data["built_with"].items()},
            targets=tuple(map(str, data["targets"])),
            graph_sha256=str(data["graph_sha256"]),
            weights_sha256=str(data["weights_sha256"]),
            weights=tuple(map(str, data["weights"])),
            inputs=tuple(map(TensorSpec.from_json, data["inputs"])),
            outputs=tuple(map(TensorSpec.from_json, data["outputs"])),
            kernels={str(name): int(count) for name, count in data["kernels"].items()},
            layers=tuple(EngineLayer(str(n), str(k), str(t), int(b), int(f)) for n, k, t, b, f in data["layers"]),
            activation_bytes=int(data["activation_bytes"]),
            seconds=float(data["seconds"]),
        )


def _plain_name(value: Any) -> str:
    name = str(value)
    if Path(name).name != name:
        raise ValueError(f"engine file {name!r}: expected a plain file name")
    return name


@dataclasses.dataclass(frozen=True)
class EngineSet:
    """All that was built in one folder.

    Attributes:
        folder: where it lies.
        records: by graph file.
        shared: files that several engines read.
    """

    folder: Path
    records: Mapping[str, EngineRecord] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, FileSpec] = dataclasses.field(default_factory=dict)

    def problem(
        self, manifest: Manifest, graph: str, built_with: Mapping[str, str], target: str, *, check_hash: bool
    ) -> str:
        """Why the engine of a graph must not be used for a bundle; empty where it may.

        Args:
            manifest: of the bundle.
            graph: the graph file.
            built_with: what is here.
            target: what it shall run on.
            check_hash: compare its content with the record, too; else its size only.
        """
        record = self.records.get(graph)
        if record is None:
            return f"there is none for {graph}"
        if graph not in manifest.files or record.graph_sha256 != manifest.files[graph].sha256:
            return f"{record.file} was built from another {graph}"
        if record.weights_sha256 != manifest.files[WEIGHTS_FILE].sha256:
            return f"{record.file} was built from another {WEIGHTS_FILE}"
        for name in sorted({*record.built_with, *built_with}):
            ours, theirs = built_with.get(name, "none"), record.built_with.get(name, "none")
            if ours != theirs:
                return f"{record.file} was built with {name} {theirs}, here is {ours}"
        if target not in record.targets:
            return f"{record.file} was built for {', '.join(record.targets)}, here is {target}"
        return record.content.problem(self.folder / record.file, check_hash=check_hash)

    def shared_problem(self, *, check_hash: bool) -> str:
        """What is wrong with the files that several engines read; empty where nothing is."""
        problems = (spec.problem(self.folder / name, check_hash=check_hash) for name, spec in self.shared.items())
        return next((problem for problem in problems if problem), "")

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "format_version": FORMAT_VERSION,
            "shared": {name: dataclasses.asdict(spec) for name, spec in self.shared.items()},
            "engines": [record.to_json() for record in self.records.values()],
        }


def engines_folder(bundle: Path, name: str) -> Path:
    """Where what was built for one kind of target lies."""
    return bundle / ENGINES_FOLDER / name


def read_engines(bundle: Path, name: str) -> EngineSet:
    """What was built in that folder; empty where nothing was.

    Raises:
        BundleError: a record that cannot be read.
    """
    folder = engines_folder(bundle, name)
    path = folder / ENGINES_FILE
    if not path.is_file():
        return EngineSet(folder)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {data['format_version']!r}, expected {FORMAT_VERSION}")
        records = [EngineRecord.from_json(entry) for entry in data["engines"]]
        shared = {_plain_name(file): FileSpec(**spec) for file, spec in data["shared"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BundleError(
            f"{path}: damaged ({type(error).__name__}: {error}); run `fastvar build {bundle}` again"
        ) from error
    return EngineSet(folder, {record.graph: record for record in records}, shared)


def engine_folders(bundle: Path) -> list[str]:
    """The folders in which something was built."""
    return sorted(path.parent.name for path in (bundle / ENGINES_FOLDER).glob(f"[!.]*/{ENGINES_FILE}"))


def device_memory(
    manifest: Manifest, engines: EngineSet, places: Mapping[str, TensorPlace], *, low_memory: bool
) -> dict[str, int]:
    """Bytes on a GPU where a chain needs the most: weights, engines with what they hold of them, buffers, activations.

    Args:
        manifest: of the bundle.
        engines: of all of its graphs.
        places: of the tensors of its weights file.
        low_memory: with one graph of `ON_DEMAND` at a time, and only while it runs.

    Raises:
        BundleError: an engine reads what the weights file has not.
    """
    records = {graph: engines.records[graph.file] for graph in manifest.graphs}

    def size_of(names: Iterable[str]) -> int:
        return sum(places[name].num_bytes for name in names)

    missing = [name for record in records.values() for name in record.weights if name not in places]
    if missing:
        raise BundleError(
            f"bundle {engines.folder.parents[1]}: {WEIGHTS_FILE} has no {missing[0]}, which an engine reads; build "
            "again"
        )
    passing = {graph: record for graph, record in records.items() if low_memory and graph.kind in ON_DEMAND}
    staying = [record for graph, record in records.items() if graph not in passing]
    weights = {name for record in staying for name in record.weights}
    # Weights, engine and activations of one at a time; the decoder's activations are in memory of the chain.
    own = [
        (
            size_of(set(record.weights) - weights),
            record.content.num_bytes,
            0 if graph.kind == DECODER else record.activation_bytes,
        )
        for graph, record in passing.items()
    ]
    brought, engine, activations = max(own, key=sum, default=(0, 0, 0))
    shared = 0  # by all chains: what their graphs hand to each other, or lend to one on demand
    for variant in manifest.variants:
        for batch in manifest.batches:
            chain = variant.chain(batch)
            lent = max((passing[graph].activation_bytes for graph in chain if graph in passing), default=0)
            shared = max(shared, passed_bytes(chain), lent)
    outputs = (spec for graph in manifest.graphs for spec in graph.outputs)
    return {
        "weights": size_of(weights) + brought,
        "engines": sum(record.content.num_bytes for record in staying) + engine,
        "buffers": sum(spec.num_bytes for spec in outputs if spec.role not in PASSED) + shared,
        # As graphs run one after another, the largest of all; of a graph on demand beside it.
        "activations": max(record.activation_bytes for record in staying) + activations,
    }


def usable_engines(
    bundle: Path,
    manifest: Manifest,
    name: str,
    built_with: Mapping[str, str],
    target: str,
    *,
    build_target: str = "",
    check_hashes: bool,
) -> EngineSet:
    """The engines of every graph of the bundle.

    Args:
        bundle: its folder.
        manifest: its manifest.
        name: the folder of the engines.
        built_with: what is here of what they depend on, as in their records.
        target: what they shall run on.
        build_target: what `fastvar build --target` calls it, where that is something else.
        check_hashes: compare their content with the record, too.

    Raises:
        BundleError: an engine that is missing, stale, damaged, or of another version or target; with the command that
            builds it.
    """
    command = f"run `fastvar build {bundle} --target {build_target or target}`"
    engines = read_engines(bundle, name)
    if not engines.records:
        raise BundleError(f"bundle {bundle}: no engines of {name} were built; {command}")
    problem = engines.shared_problem(check_hash=check_hashes)
    for graph in manifest.graphs:
        problem = problem or engines.problem(manifest, graph.file, built_with, target, check_hash=check_hashes)
    if problem:
        raise BundleError(f"bundle {bundle}: {problem}; {command}")
    graphs = [graph.file for graph in manifest.graphs]
    return dataclasses.replace(engines, records={file: engines.records[file] for file in graphs})
