"""From official checkpoint files to a bundle: load, convert, trace, check, write."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvar_trt.export.calibration import Subject, calibrate, check_subjects
from fastvar_trt.export.folders import new_folder
from fastvar_trt.export.known_answer import GreedyChain, text_reference
from fastvar_trt.export.models.base import KEPT, NextScaleModel
from fastvar_trt.export.models.lora import merged
from fastvar_trt.export.models.matrix import (
    FORMATS,
    INPUT_SCALE,
    Cast,
    check_exceptions,
    matrix_format,
    unknown_scale,
    write_matrix,
)
from fastvar_trt.export.models.reference import default_request, gumbel_of, residual_inputs
from fastvar_trt.export.models.registry import FAMILIES
from fastvar_trt.export.models.source import Source, shapes_of, to_meta
from fastvar_trt.export.progress import Progress, no_progress
from fastvar_trt.export.tracing import (
    GraphFunction,
    build_graph,
    chain_functions,
    encoder_function,
    linear_layers,
    save_graph,
    text_function,
)
from fastvar_trt.export.validation import GraphError, compare_with_torch, run_in_onnxruntime, tolerance_of
from fastvar_trt.export.weights_file import map_weights, write_weights
from fastvar_trt.plugins import DOMAIN, VERSION
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import BundleError, CheckpointError, ExportError
from fastvar_trt.runtime.manifest import (
    MANIFEST_FILE,
    REFERENCE_FILE,
    WEIGHTS_FILE,
    FileSpec,
    GraphSpec,
    Manifest,
    Role,
    Variant,
    check_files,
    read_manifest,
)
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.plan import DENSE, PruningPlan, ResolvedPlan
from fastvar_trt.runtime.precision import PRECISIONS, Precision, in_block
from fastvar_trt.runtime.request import GRAPH_INPUTS
from fastvar_trt.runtime.weights import TensorPlace, plan_layout, read_layout

PHASES = ("trace", "check", "compare", "done")
_FREE_SPACE_MARGIN = 64 << 20  # graphs, reference and manifest


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    plan: PruningPlan = DENSE
    precision: str = "fp32"
    batches: tuple[int, ...] = (1,)
    max_top_k: int = 900  # static bound of top-k in the graphs; 0: the whole vocabulary
    compare: bool = True  # run every graph and PyTorch beside it; without, nothing is left for `fastvar verify`
    matrices: tuple[tuple[str, str], ...] = ()  # before the family's own: see `Precision.matrices`
    calibration: tuple[Subject, ...] = ()  # classes or prompts to draw for the scales of activations
    integer_kv: bool = False  # keep keys and values in 8 bits
    examples: tuple[str, ...] = ()  # of prompts, or the names of all classes in order; for pages that offer them

    def check(self, family: str) -> Precision:
        """The precision for a family of models, where everything is in range.

        Raises:
            ExportError: it is not.
        """
        if self.precision not in PRECISIONS:
            raise ExportError(f"precision: got {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if not self.batches or min(self.batches) < 1:
            raise ExportError(f"batch: got {self.batches}, expected sizes of 1 or more")
        precision = PRECISIONS[self.precision]
        if self.integer_kv:
            precision = precision.with_integer_kv()
        if not precision.is_quantised:
            if self.matrices:
                raise ExportError(f"matrix: {precision.name} has one format for all; give a precision of few bits")
            return precision
        check_exceptions(self.matrices)
        own = FAMILIES[family].matrices if family in FAMILIES else ()
        return dataclasses.replace(precision, matrices=(*self.matrices, *precision.matrices, *own))


@dataclasses.dataclass(frozen=True)
class _Size:
    """The model at one of a bundle's sizes."""

    model: NextScaleModel
    plan: PruningPlan

    @property
    def name(self) -> str:
        """Of its variant."""
        height, width = self.model.image_size()
        return f"{width}x{height}"

    @property
    def resolved(self) -> ResolvedPlan:
        """The plan for the model."""
        return self.model.resolve(self.plan)


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export found."""

    manifest: Manifest
    errors: Mapping[str, GraphError]  # graph file -> how far it is from PyTorch, of those that were compared
    traced: tuple[str, ...]  # graph files; the others were there already


def export_model(
    source: Source,
    out: Path,
    options: ExportOptions,
    *,
    more: Sequence[tuple[Source, PruningPlan]] = (),
    force: bool = False,
    progress: Progress = no_progress,
) -> ExportReport:
    """Write the bundle of a model.

    The bundle is made in a temporary folder beside `out` and renamed into place when every graph has passed
    the ONNX checker and matches PyTorch; until then `out` is not touched.

    Args:
        source: the model.
        out: the bundle's folder.
        options: plan, precision, batch sizes.
        more: the same model at further sizes, each with its plan, over the same weights.
        force: replace the bundle that is there.
        progress: called with a graph's file name, one of `PHASES` and the share of its work that is done.

    Raises:
        ExportError: `out` is taken, the disk is full, or a graph does not match PyTorch.
        PlanError: the plan does not fit the model.
    """
    spec = source.new_model(PRECISIONS["fp32"]).model_spec()
    precision = options.check(spec.family)
    options = dataclasses.replace(options, examples=options.examples or source.examples)
    if options.examples and spec.num_classes not in (0, len(options.examples)):
        raise ExportError(f"examples: got {len(options.examples)} names, this model has {spec.num_classes} classes")
    model = source.new_model(precision)
    sizes = [_Size(model, options.plan), *(_Size(other.new_model(precision), plan) for other, plan in more)]
    _check_sizes(sizes)
    scales = dict(_kv_scales(model))
    shapes = source.shapes(precision, options.max_top_k) | shapes_of(scales.items())
    of_sizes = {
        name: tensor
        for size in sizes[1:]
        for name, tensor in size.model.size_tensors(source.state)
        if name not in shapes
    }
    shapes |= shapes_of(of_sizes.items())
    _check_patterns(options.matrices, source, precision)
    with _new_bundle(out, force) as folder:
        source.copy_files(folder)
        check_subjects(model, options.calibration, folder)
        tensors = itertools.chain(source.tensors(precision, options.max_top_k), scales.items(), of_sizes.items())
        places = _write_weights(folder, shapes, tensors)
        _load_calibrated(sizes, places, folder, options, progress)
        return _write_graphs(sizes, places, folder, options, progress)


def _check_sizes(sizes: Sequence[_Size]) -> None:
    """That every plan fits, and no size is there twice; before anything is written.

    Raises:
        PlanError: a plan does not fit.
        ExportError: a size is there twice.
    """
    known: set[str] = set()
    for size in sizes:
        size.model.resolve(size.plan)
        if size.name in known:
            raise ExportError(f"sizes: {size.name} is asked for twice; a bundle holds each once")
        known.add(size.name)


def _check_patterns(matrices: Sequence[tuple[str, str]], source: Source, precision: Precision) -> None:
    """`_check_names` of a model that is not loaded: of what it would quantise without exceptions."""
    if matrices:
        any_shape = FORMATS["w8"]  # whose blocks are whole whatever the sizes are
        shapes = source.shapes(dataclasses.replace(precision, stored=any_shape.name, matrices=()), 0)
        suffix = f".{any_shape.parts[0]}"
        _check_names(matrices, (name.removesuffix(suffix) for name in shapes if name.endswith(suffix)))


def _check_names(matrices: Sequence[tuple[str, str]], linears: Iterable[str]) -> None:
    """That every exception is from something.

    Raises:
        ExportError: no linear layer has such a name.
    """
    names = sorted(set(map(in_block, linears)))
    for pattern, _ in matrices:
        if not fnmatch.filter(names, pattern):
            raise ExportError(f"matrix {pattern}: no linear layer has such a name; there are {', '.join(names)}")


def _kv_scales(model: NextScaleModel) -> Iterator[tuple[str, Tensor]]:
    """Scales of the keys and values of every layer, to be found, where they are kept as integers."""
    if model.precision.rounds_kv:
        for layer in range(model.depth):
            yield from ((f"blocks.{layer}.{kept}{INPUT_SCALE}", unknown_scale()) for kept in KEPT)


def _load_calibrated(
    sizes: Sequence[_Size],
    places: Mapping[str, TensorPlace],
    folder: Path,
    options: ExportOptions,
    progress: Progress,
) -> None:
    """Give the models their weights, and those the scales of activations, where they have any."""
    for size in sizes:
        size.model.load_tensors(map_weights(folder))
    chains = [(size.model, size.resolved) for size in sizes]
    if calibrate(chains, folder, places, options.calibration, progress):
        for size in sizes:
            size.model.load_tensors(map_weights(folder))


def load_bundle_model(bundle: Path, *, hashes: bool = True) -> tuple[NextScaleModel, Manifest]:
    """The PyTorch model of a bundle's first size over its own weights, memory-mapped.

    Args:
        bundle: its folder.
        hashes: compare the files' content with the record, or their sizes only.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
    """
    models, manifest = _load_models(bundle, hashes=hashes)
    return models[0], manifest


def _load_models(bundle: Path, *, hashes: bool = True) -> tuple[list[NextScaleModel], Manifest]:
    """The same of all sizes."""
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=hashes)
    models = _new_models(bundle, manifest, manifest.own_precision)
    return [model.load_tensors(map_weights(bundle)) for model in models], manifest


def _new_models(bundle: Path, manifest: Manifest, precision: Precision) -> list[NextScaleModel]:
    """The models of all sizes, without weights.

    Raises:
        BundleError: its configurations cannot be read.
    """
    try:
        family = FAMILIES[manifest.model.family]
        return [family.from_configs(v.configs or manifest.configs, precision) for v in manifest.variants]
    except (KeyError, TypeError) as error:
        raise BundleError(f"bundle {bundle}: its configs cannot be read ({error}); export it again") from error


def export_again(
    bundle: Path,
    out: Path,
    plan: PruningPlan | None = None,
    *,
    precision: str | None = None,
    matrices: tuple[tuple[str, str], ...] = (),
    integer_kv: bool = False,
    calibration: tuple[Subject, ...] = (),
    batches: tuple[int, ...] | None = None,
    checkpoint: Path | None = None,
    lora: tuple[Path, float] | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> ExportReport:
    """Write a bundle of the same model with another plan or precision, without the checkpoint; or of another checkpoint
    of the same sizes.

    Graphs that stay as they are get copied; they are not compared again, whatever the weights or scales.

    Args:
        bundle: a bundle.
        out: the new bundle's folder.
        plan: its plan, at all sizes; default: those of `bundle`.
        precision: one that computes as that of `bundle` does, whose matrices are then rounded; default: that one.
        matrices: exceptions from the precision's format, before the family's own.
        integer_kv: keep keys and values in 8 bits, as a bundle that does already goes on to.
        calibration: classes or prompts to draw for scales, which are found again; default: those of `bundle`.
        batches: batch sizes; default: those of `bundle`.
        checkpoint: the official file or folder of another transformer of the same sizes, as a fine-tune is; VAE and
            text encoder stay.
        lora: one of that checkpoint, and its factor.
        force: replace the bundle that is there.
        progress: as for `export_model`.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
        CheckpointError: a checkpoint of other sizes.
        ExportError: `out` is taken, the disk is full, a graph does not match PyTorch, or a precision that cannot be had
            of these weights.
        PlanError: the plan does not fit the model.
    """
    models, manifest = _load_models(bundle)
    model = models[0]
    calibration = calibration or manifest.calibration
    options = ExportOptions(
        plan or manifest.default.plan,
        precision or manifest.precision,
        batches or manifest.batches,
        manifest.sampling.max_top_k,
        compare=REFERENCE_FILE in manifest.files,
        matrices=matrices,
        calibration=calibration,
        integer_kv=integer_kv or manifest.integer_kv,
        examples=manifest.examples,
    )
    checked = options.check(manifest.model.family)
    if matrices and precision is None:
        raise ExportError("matrix: are exceptions from a new precision; give one")
    if precision == manifest.precision:
        if matrices:
            raise ExportError(f"matrix: bundle {bundle} is {precision} already; take what it was made of")
        precision = None
    if lora is not None and checkpoint is None:
        raise ExportError("--lora: needs --checkpoint, which it is of; weights of a bundle are not as they were")
    if checkpoint is not None and (precision is not None or (integer_kv and not manifest.integer_kv)):
        raise ExportError("--checkpoint: not with --precision or --integer-kv; change one after the other")
    sizes = [_Size(own, plan or v.plan) for own, v in zip(models, manifest.variants, strict=True)]
    _check_sizes(sizes)
    before = [_Size(own, v.plan) for own, v in zip(models, manifest.variants, strict=True)]
    functions = _all_functions(before, manifest.batches)
    if precision is not None or (integer_kv and not manifest.integer_kv):
        wanted = manifest.own_precision.with_integer_kv() if precision is None else checked
        return _export_rounded(sizes, manifest, bundle, functions, out, options, wanted, force=force, progress=progress)
    state = None if checkpoint is None else model.load_transformer(checkpoint)
    if state is not None and lora is not None:
        state = merged(state, *lora)
    there = {function.spec.file: (function, bundle / function.spec.file) for function in functions}
    check_subjects(model, calibration, bundle)
    with _new_bundle(out, force) as folder:
        _copy(bundle, folder, manifest, names.TOKENIZER_FILE)
        if state is None:
            _copy(bundle, folder, manifest, WEIGHTS_FILE)
            places = read_layout(folder / WEIGHTS_FILE)
        else:
            places = _write_weights(folder, *_retrained(sizes, bundle, state))
        _load_calibrated(sizes, places, folder, options, progress)
        known = there if manifest.tools == tool_versions() else {}
        return _write_graphs(sizes, places, folder, options, progress, known)


def _retrained(
    sizes: Sequence[_Size], bundle: Path, state: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[tuple[int, ...], str]], Iterator[tuple[str, Tensor]]]:
    """Shapes and tensors of a bundle's weights file, with another transformer in it."""
    before = map_weights(bundle)

    def changed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        own = (pair for size in sizes for pair in size.model.size_tensors(state))
        return itertools.chain(sizes[0].model.transformer_tensors(state), dict(own).items())

    with torch.device("meta"):
        shapes = shapes_of(changed(to_meta(state)))
    known = shapes_of(before.items())
    if wrong := [name for name, own in shapes.items() if known.get(name) != own]:
        raise CheckpointError(
            f"--checkpoint: {wrong[0]} would be {shapes[wrong[0]]}, bundle {bundle} has {known.get(wrong[0])}"
        )
    kept = ((name, tensor) for name, tensor in before.items() if name not in shapes)
    return known, itertools.chain(changed(state), kept)


def _all_functions(sizes: Sequence[_Size], batches: Sequence[int]) -> list[GraphFunction]:
    """All graphs of a bundle, each once."""
    found = [text_function(sizes[0].model)]
    for size in sizes:
        variant = size.name if size is not sizes[0] else ""
        found.append(encoder_function(size.model, size.resolved, variant))
        for batch in batches:
            found += chain_functions(size.model, size.resolved, batch, variant)
    return list({function.spec.file: function for function in found if function is not None}.values())


def _export_rounded(
    sizes: Sequence[_Size],
    manifest: Manifest,
    bundle: Path,
    functions: Sequence[GraphFunction],
    out: Path,
    options: ExportOptions,
    wanted: Precision,
    *,
    force: bool,
    progress: Progress,
) -> ExportReport:
    """The bundle of a model in another precision."""
    before = manifest.own_precision
    quantises = wanted.is_quantised and wanted.name != before.name
    if before.is_quantised and wanted.name != before.name:
        raise ExportError(f"bundle {bundle}: is {before.name}, and rounding twice loses more; take what it was made of")
    if wanted.computed != before.computed:
        raise ExportError(
            f"bundle {bundle}: is {before.name}, and {wanted.name} computes in {wanted.computed}; take a bundle that "
            "does, or export from the checkpoint"
        )
    linears = linear_layers([size.model for size in sizes], functions) if quantises else frozenset()
    _check_names(options.matrices, linears)
    tensors = {
        name.removeprefix("image_decoder.").removeprefix("image_encoder."): parameter.data
        for size in sizes
        for name, parameter in size.model.named_parameters(remove_duplicate=False)
    }

    models = _new_models(bundle, manifest, wanted)
    quantised = models[0]
    check_subjects(quantised, options.calibration, bundle)

    def rounded(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, scale) for name, scale in _kv_scales(quantised) if name not in tensors)
        for name, tensor in tensors.items():
            linear = name.removesuffix(".weight")
            # Some that stay as they are do so in fp32, whatever is computed in.
            is_matrix = linear in linears and linear != name
            if is_matrix and not isinstance(matrix_format(wanted, linear), Cast):
                yield from write_matrix(wanted, linear, tensor)
            else:
                yield name, tensor

    with torch.device("meta"):
        shapes = shapes_of(rounded(to_meta(tensors)))
    with _new_bundle(out, force) as folder:
        places = _write_weights(folder, shapes, rounded(tensors))
        _copy(bundle, folder, manifest, names.TOKENIZER_FILE)
        rounded_sizes = [dataclasses.replace(size, model=own) for size, own in zip(sizes, models, strict=True)]
        _load_calibrated(rounded_sizes, places, folder, options, progress)
        return _write_graphs(rounded_sizes, places, folder, options, progress)


def _copy(bundle: Path, folder: Path, manifest: Manifest, *files: str) -> None:
    """Copy those that the bundle has; onnx.checker refuses hard links."""
    for name in files:
        if name in manifest.files:
            shutil.copyfile(bundle / name, folder / name)


def _write_graphs(
    sizes: Sequence[_Size],
    places: Mapping[str, TensorPlace],
    folder: Path,
    options: ExportOptions,
    progress: Progress,
    there: Mapping[str, tuple[GraphFunction, Path]] = MappingProxyType({}),
) -> ExportReport:
    """All that a bundle holds besides its weights: graphs, reference, manifest."""
    batches = tuple(sorted(set(options.batches)))
    writer = _GraphWriter(places, folder, progress, there, compare=options.compare)
    auxiliary = writer.write_text_encoder(sizes[0].model)
    variants = []
    for size in sizes:
        is_first = size is sizes[0]
        suffix = "" if is_first else size.name  # of the files' names
        encoder = writer.write_image_encoder(size, suffix)
        graphs = [
            spec
            for batch in batches
            for spec in writer.write_chain(size, suffix, batch, keep_reference=is_first and batch == batches[0])
        ]
        height, width = size.model.image_size()
        configs = {} if is_first else size.model.configs()
        variants.append(
            Variant(size.name, height, width, size.model.schedule, size.plan, tuple(graphs), encoder, configs)
        )
    if options.compare:
        np.savez(folder / REFERENCE_FILE, allow_pickle=False, **writer.reference)
    manifest = _manifest(sizes[0].model, options, batches, auxiliary, variants, folder)
    _write_manifest(manifest, folder)
    return ExportReport(manifest, writer.errors, tuple(writer.traced))


def _write_weights(
    folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]], tensors: Iterator[tuple[str, Tensor]]
) -> dict[str, TensorPlace]:
    """The weights file: from memory-mapped checkpoints, so no second copy is held."""
    _, planned = plan_layout(shapes)
    needed = max(place.offset + place.num_bytes for place in planned.values()) + _FREE_SPACE_MARGIN
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder.parent}: {free / 2**20:.0f} MiB free, the bundle needs about {needed / 2**20:.0f} MiB; free some "
            "space or give another --out"
        )
    return write_weights(folder, shapes, tensors)


class _GraphWriter:
    """Traces, writes and checks graphs; a graph that is `there` already is copied, and was compared where it was
    traced.

    PyTorch runs the chain greedily and hands its state to each graph. The graph itself is run with sampling, so that
    the comparison covers the draw; the greedy images are left in the bundle as its known-answer test.

    Attributes:
        errors: graph file -> how far it is from PyTorch, of those that were compared.
        traced: graph files.
        reference: arrays of the reference file.
    """

    def __init__(
        self,
        places: Mapping[str, TensorPlace],
        folder: Path,
        progress: Progress,
        there: Mapping[str, tuple[GraphFunction, Path]],
        *,
        compare: bool,
    ) -> None:
        self._places, self._folder = places, folder
        self._progress, self._there, self._compare = progress, there, compare
        self.errors: dict[str, GraphError] = {}
        self.traced: list[str] = []
        self.reference: dict[str, Any] = {}

    @torch.inference_mode()
    def write_text_encoder(self, model: NextScaleModel) -> list[GraphSpec]:
        """The text encoder, of models that have one; its example goes into the reference."""
        function = text_function(model)
        if function is None:
            return []
        self._write(model, function, model.example_text())
        if self._compare:
            self.reference |= text_reference(model)
        self._report(function, "done")
        return [function.spec]

    @torch.inference_mode()
    def write_image_encoder(self, size: _Size, variant: str) -> GraphSpec | None:
        """The image encoder, of models that have one."""
        function = encoder_function(size.model, size.resolved, variant)
        if function is None:
            return None
        self._write(size.model, function, {names.PIXELS: _example_picture(size.model)} if self._compare else {})
        self._report(function, "done")
        return function.spec

    @torch.inference_mode()
    def write_chain(self, size: _Size, variant: str, batch: int, *, keep_reference: bool) -> list[GraphSpec]:
        """The graphs of one batch size, in the order in which they run."""
        model, plan = size.model, size.resolved
        chain = GreedyChain(model, plan, batch) if self._compare else None
        functions = chain_functions(model, plan, batch, variant)
        for function in functions:
            self._write(model, function, {} if chain is None else _graph_inputs(model, function, chain))
            if chain is not None:
                chain.advance(function.spec)
            self._report(function, "done")
        if chain is not None and keep_reference:
            self.reference |= chain.drawn
        return [function.spec for function in functions]

    def _write(self, model: NextScaleModel, function: GraphFunction, inputs: Mapping[str, Tensor]) -> None:
        spec = function.spec
        if (self._folder / spec.file).exists():  # of a size before
            return
        self._report(function, "trace")
        known = self._there.get(spec.file)
        if known is not None and function.same_graph(known[0]):
            shutil.copyfile(known[1], self._folder / spec.file)
            return
        with torch.inference_mode(False):  # tracing needs autograd's view tracking
            graph = build_graph(function, model, self._places, self._folder)
        self.traced.append(spec.file)
        self._report(function, "check")
        save_graph(graph, self._folder / spec.file)
        if not self._compare:
            return
        self._report(function, "compare")
        tolerance = tolerance_of(graph, model.precision)
        got = run_in_onnxruntime(self._folder, spec, graph, inputs)
        self.errors[spec.file] = compare_with_torch(function, inputs, got, tolerance)

    def _report(self, function: GraphFunction, phase: str) -> None:
        self._progress(function.spec.file, phase, PHASES.index(phase) / (len(PHASES) - 1))


@torch.inference_mode()
def add_reference(bundle: Path, device: torch.device) -> None:
    """Let PyTorch draw what `verify_bundle` compares with, for a bundle that was exported without.

    Args:
        bundle: its folder.
        device: where PyTorch computes; a text encoder always on the CPU.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
    """
    model, manifest = load_bundle_model(bundle)
    reference = {} if manifest.text_encoder is None else text_reference(model)
    model.to(device)
    chain = GreedyChain(model, manifest.resolved_plan, manifest.batches[0], device)
    for graph in manifest.default.chain(manifest.batches[0]):
        chain.advance(graph)
    np.savez(bundle / REFERENCE_FILE, allow_pickle=False, **reference, **chain.drawn)
    files = {**manifest.files, REFERENCE_FILE: FileSpec.of(bundle / REFERENCE_FILE)}
    _write_manifest(dataclasses.replace(manifest, files=files), bundle)


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    partial = folder / f".{MANIFEST_FILE}.partial"
    partial.write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST_FILE)


def _graph_inputs(model: NextScaleModel, function: GraphFunction, chain: GreedyChain) -> dict[str, Tensor]:
    """The inputs of one graph out of the state that PyTorch has reached."""
    state = chain.state
    spec = function.spec
    if state is None:
        return dict(chain.condition)
    if spec.kind == names.DECODER:
        # Not what the chain has drawn: of an untrained model that is nearly constant, and the decoder's normalisation
        # then magnifies rounding until nothing can be compared.
        generator = torch.Generator().manual_seed(0)
        return {own.name: torch.randn(own.shape, generator=generator) for own in spec.inputs}
    request = default_request(model, spec.batch, greedy=False)
    available = {**state.condition, **state.handed_on}
    if spec.kind == names.RESIDUAL:
        available |= residual_inputs(model, chain.plan, request, state.seeds)
    if state.f_hat is not None:
        available[names.F_HAT] = state.f_hat
    for layer, pieces in state.past.items():
        for i, (k, v) in enumerate(pieces):
            available |= {names.past_k(layer, i): k, names.past_v(layer, i): v}
    for i, outputs in state.caches.items():
        available |= {names.cache(i, sub): y for sub, y in zip(model.sublayers, outputs, strict=True)}
    available |= {name: getattr(request, name) for name in GRAPH_INPUTS}
    if spec.scale is not None:
        gumbel = gumbel_of(model, spec.scale, state.seeds, torch.device("cpu"))
        available |= {} if gumbel is None else {names.GUMBEL: gumbel}
    if spec.scale is not None and model.has_encoder:
        available |= _example_given(model, spec.scale, spec.batch)
    noise = spec.input(Role.NOISE)
    if noise is not None and noise.scale is not None:
        rows = [uniform_noise(image, noise.scale, noise.shape[1:]) for image in range(spec.batch)]
        available[noise.name] = torch.from_numpy(np.stack(rows))
    return {i.name: available[i.name][: i.shape[0]] for i in spec.inputs}  # the conditional half, without guidance


def _example_given(model: NextScaleModel, scale: int, batch: int) -> dict[str, Tensor]:
    """Half of a scale's tokens, given."""
    shape, dtype = model.token_spec(scale)
    generator = torch.Generator().manual_seed(scale)
    values = 2 if len(shape) > 1 else model.model_spec().vocab_size
    tokens = torch.randint(values, (batch, *shape), generator=generator).to(dtype)
    return {
        names.given(scale): tokens,
        names.is_given(scale): torch.rand((batch, shape[0]), generator=generator) < 0.5,
    }


def _example_picture(model: NextScaleModel) -> Tensor:
    """A ramp of colours with a disc: uint8 [1, H, W, 3]."""
    height, width = model.image_size()
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    picture = torch.stack([0.2 + 0.6 * x, 0.3 + 0.5 * y, 0.5 + 0.3 * torch.sin(9 * (x + y))], dim=-1)
    disc = (x - 0.4).square() + (y - 0.6).square() < 0.05
    picture = torch.where(disc[..., None], torch.tensor([0.9, 0.3, 0.1]), picture)
    return (255 * picture).to(torch.uint8)[None]


def _manifest(
    model: NextScaleModel,
    options: ExportOptions,
    batches: tuple[int, ...],
    auxiliary: Sequence[GraphSpec],
    variants: Sequence[Variant],
    folder: Path,
) -> Manifest:
    return Manifest(
        model=model.model_spec(),
        precision=options.precision,
        batches=batches,
        sampling=model.sampling_spec(),
        variants=tuple(variants),
        auxiliary=tuple(auxiliary),
        files={path.name: FileSpec.of(path) for path in sorted(folder.iterdir()) if path.is_file()},
        operators={DOMAIN: VERSION},
        tools=tool_versions(),
        configs=model.configs(),
        matrices=model.precision.matrices,
        integer_kv=model.precision.rounds_kv,
        calibration=options.calibration,
        examples=options.examples,
    )


def tool_versions() -> dict[str, str]:
    """What graphs depend on besides the model: another release traces other ones."""
    packages = ("fastvar-trt", "torch", "onnx", "onnxscript", "onnx-ir")
    return {package: importlib.metadata.version(package) for package in packages}


def _new_bundle(out: Path, force: bool) -> contextlib.AbstractContextManager[Path]:
    """A folder that becomes the bundle `out` when the block ends well."""
    out = Path(os.path.abspath(out))  # noqa: PTH100  # resolve() would follow a link that --force should replace
    return new_folder(out, "--out", lambda: _check_free(out, force))


def _check_free(out: Path, force: bool) -> None:
    """That `out` does not exist, or is a bundle and may be replaced."""
    if not os.path.lexists(out):
        return
    if not force:
        raise ExportError(f"--out {out}: exists already; give another folder, or --force to replace the bundle")
    if out.is_dir() and not any(out.iterdir()):
        return
    try:
        data = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
        is_bundle = "format_version" in data and "files" in data
    except (OSError, ValueError, TypeError):
        is_bundle = False
    if not is_bundle:
        raise ExportError(f"--out {out}: not a bundle, so --force does not replace it; remove it yourself")
