"""The loop over a bundle's graphs that all targets share, and what it asks of a builder."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from fastvar_trt.export.folders import recover, replace_folder, temporary_folder
from fastvar_trt.export.progress import Progress, no_progress
from fastvar_trt.runtime.engines import EngineLayer, EngineRecord, EngineSet, engines_folder, read_engines
from fastvar_trt.runtime.errors import BundleError, ExportError
from fastvar_trt.runtime.manifest import (
    ENGINES_FILE,
    WEIGHTS_FILE,
    FileSpec,
    GraphSpec,
    Manifest,
    TensorSpec,
    check_files,
    read_manifest,
)
from fastvar_trt.runtime.precision import Precision


@dataclasses.dataclass(frozen=True)
class Built:
    """What a builder made of one graph.

    Attributes:
        file: the engine, in the scratch folder.
        weights: inputs that are tensors of the weights file.
        inputs: what the engine reads, weights among it.
        outputs: what it writes.
        kernels: counts by kind, where they are known.
        layers: every launch, where they are known.
        activation_bytes: of device memory while it runs, where it is known.
    """

    file: Path
    weights: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    layers: tuple[EngineLayer, ...] = ()
    activation_bytes: int = 0


class Builder(abc.ABC):
    """Makes an engine of a graph, for one or more targets.

    Args:
        targets: those of `target_names` that are asked for.

    Attributes:
        folder: of the engines, below `engines/`.
        target_names: what `--target` calls its targets.
        description: of the targets, for people.
        shares_files: whether engines share files, so that one that is stale makes all of them be built anew.
    """

    folder: ClassVar[str]
    target_names: ClassVar[tuple[str, ...]]
    description: ClassVar[str]
    shares_files: ClassVar[bool] = False

    def __init__(self, targets: Sequence[str]) -> None:
        self.targets = tuple(targets)

    def open(self) -> None:  # noqa: B027  # most have nothing to do
        """Import what is needed, and find the device.

        Raises:
            BackendError: what is needed is not here.
        """

    @abc.abstractmethod
    def built_with(self) -> dict[str, str]:
        """What engines depend on besides graph and weights -> version; see `EngineRecord`."""

    def check_precision(self, precision: Precision) -> None:  # noqa: B027  # most have nothing to check
        """That the targets have the numbers of a precision.

        Raises:
            ExportError: one has not.
        """

    def fresh(self, engines: EngineSet, manifest: Manifest, graph: GraphSpec) -> bool:
        """Whether the engine that is there computes the graph on all targets."""
        return not any(
            # Each file is hashed once, however many targets it is for.
            engines.problem(manifest, graph.file, self.built_with(), target, check_hash=target == self.targets[0])
            for target in self.targets
        )

    def all_targets(self, engines: EngineSet) -> tuple[str, ...]:
        """The targets that new engines are built for; those of the ones that are there may be among them."""
        return self.targets

    @abc.abstractmethod
    def build(
        self, bundle: Path, graph: GraphSpec, targets: tuple[str, ...], scratch: Path, progress: Progress
    ) -> Built:
        """Make the engine of a graph.

        Args:
            bundle: its folder.
            graph: the graph.
            targets: of `all_targets`.
            scratch: a folder for its files.
            progress: called with the graph file, a phase and the share of it that is done.

        Raises:
            ExportError: the graph cannot be built.
        """

    def record(
        self, built: Built, manifest: Manifest, graph: GraphSpec, targets: tuple[str, ...], seconds: float
    ) -> EngineRecord:
        """The entry of an engine in `engines.json`."""
        return EngineRecord(
            graph=graph.file,
            file=built.file.name,
            content=FileSpec.of(built.file),
            built_with=self.built_with(),
            targets=targets,
            graph_sha256=manifest.files[graph.file].sha256,
            weights_sha256=manifest.files[WEIGHTS_FILE].sha256,
            weights=built.weights,
            inputs=built.inputs,
            outputs=built.outputs,
            kernels=built.kernels,
            layers=built.layers,
            activation_bytes=built.activation_bytes,
            seconds=round(seconds, 3),
        )


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        folder: of the engines.
        targets: that every engine that was built runs on; where none was, those that were asked for.
        built: engines that were built, in order.
        kept: engines that were there and fresh.
        num_bytes: of all files, shared ones included.
        seconds: of the whole build.
    """

    folder: str
    targets: tuple[str, ...]
    built: tuple[EngineRecord, ...]
    kept: tuple[EngineRecord, ...]
    num_bytes: int
    seconds: float

    def line(self, bundle: Path) -> str:
        """For people."""
        targets = ", ".join(self.targets)
        if not self.built:
            return f"{bundle}: what was built for {targets} is up to date; nothing to build"
        return (
            f"{bundle}: {len(self.built)} graphs for {targets} built in {self.seconds:.1f} s ({self.folder}), "
            f"{len(self.kept)} kept, {self.num_bytes / 2**20:.1f} MiB in all"
        )


def build_bundle(bundle: Path, builder: Builder, progress: Progress = no_progress) -> BuildReport:
    """Build the engines of every graph of a bundle: those that are missing or stale.

    Each engine is kept as soon as it is done, so that an interrupted build loses one; where engines share files, they
    take the place of those before all at once.

    Args:
        bundle: its folder.
        builder: of the target.
        progress: called with the graph file, the builder's phase (`done` at the end) and the share of it that is done.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
        BackendError: what the builder needs is not here.
        ExportError: a graph that cannot be built, or a full disk.
    """
    begin = time.perf_counter()
    manifest = read_manifest(bundle)
    builder.open()
    builder.check_precision(manifest.own_precision)
    check_files(bundle, manifest, hashes=True)
    with _writing(engines_folder(bundle, builder.folder)):
        recover(engines_folder(bundle, builder.folder))  # what builds that were killed have left
    before = _engines_there(bundle, builder)
    graphs = {graph.file for graph in manifest.graphs}
    after = dataclasses.replace(before, records={k: r for k, r in before.records.items() if k in graphs})
    is_obsolete = len(after.records) < len(before.records)
    stale = [graph for graph in manifest.graphs if not builder.fresh(before, manifest, graph)]
    if builder.shares_files and (stale or is_obsolete or before.shared_problem(check_hash=True)):
        stale = list(manifest.graphs)
    targets = builder.all_targets(before)
    if stale or is_obsolete:
        with _writing(before.folder), temporary_folder(before.folder) as scratch:
            steps = _records(bundle, manifest, builder, stale, targets, scratch, progress)
            after = (_replace if builder.shares_files else _add)(after, steps, scratch)
            _remove_unused(before, after)
    replaced = {graph.file for graph in stale}
    new = tuple(after.records[graph.file] for graph in stale)
    sizes = (*(record.content for record in after.records.values()), *after.shared.values())
    return BuildReport(
        folder=builder.folder,
        targets=targets if new else builder.targets,
        built=new,
        kept=tuple(record for file, record in after.records.items() if file not in replaced),
        num_bytes=sum(spec.num_bytes for spec in sizes),
        seconds=time.perf_counter() - begin,
    )


def _records(
    bundle: Path,
    manifest: Manifest,
    builder: Builder,
    graphs: Sequence[GraphSpec],
    targets: tuple[str, ...],
    scratch: Path,
    progress: Progress,
) -> Iterator[EngineRecord]:
    """Build graph by graph; each engine lies in the scratch folder when its record is given."""
    for graph in graphs:
        begin = time.perf_counter()
        progress(graph.file, "build", 0.0)
        built = builder.build(bundle, graph, targets, scratch, progress)
        yield builder.record(built, manifest, graph, targets, time.perf_counter() - begin)
        progress(graph.file, "done", 1.0)


def _add(there: EngineSet, records: Iterator[EngineRecord], scratch: Path) -> EngineSet:
    """Put each engine into the folder as soon as it is there, and its record in the place of the one before."""
    engines, folder = there, there.folder
    folder.mkdir(exist_ok=True)
    _write_record(engines, scratch, folder)
    for record in records:
        (scratch / record.file).replace(folder / record.file)
        engines = dataclasses.replace(engines, records={**engines.records, record.graph: record})
        _write_record(engines, scratch, folder)
    return engines


def _replace(there: EngineSet, records: Iterator[EngineRecord], scratch: Path) -> EngineSet:
    """Put all engines and the files that they share in the folder's place, when all are there."""
    by_graph = {record.graph: record for record in records}
    own = {record.file for record in by_graph.values()}
    shared = {path.name: FileSpec.of(path) for path in sorted(scratch.iterdir()) if path.name not in own}
    engines = EngineSet(there.folder, by_graph, shared)
    _write_record(engines, scratch, scratch)
    replace_folder(scratch, there.folder)
    return engines


def _engines_there(bundle: Path, builder: Builder) -> EngineSet:
    """What was built before; nothing where its record is damaged, so that all is built anew."""
    try:
        return read_engines(bundle, builder.folder)
    except BundleError:
        return EngineSet(engines_folder(bundle, builder.folder))


def _write_record(engines: EngineSet, scratch: Path, folder: Path) -> None:
    partial = scratch / f"{ENGINES_FILE}.partial"
    partial.write_text(json.dumps(engines.to_json(), indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / ENGINES_FILE)


def _remove_unused(before: EngineSet, after: EngineSet) -> None:
    """Remove engines of graphs that the bundle has no more: an export was replaced."""
    used = {record.file for record in after.records.values()}
    for record in before.records.values():
        if record.file not in used:
            (after.folder / record.file).unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{folder}: cannot be written: {error.strerror or error}; what was built before is kept"
        ) from error
