"""From official checkpoint files to a bundle: load, convert, trace, check, write."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvar_trt.export.folders import new_folder
from fastvar_trt.export.models.base import NextScaleModel, Request
from fastvar_trt.export.models.infinity import Infinity
from fastvar_trt.export.models.reference import ChainState
from fastvar_trt.export.models.var import DEFAULT_TOP_K, VAR
from fastvar_trt.export.sources import Source
from fastvar_trt.export.tracing import GraphFunction, build_graph, chain_functions, save_graph, text_function
from fastvar_trt.export.validation import GraphError, compare_with_torch, run_in_onnxruntime
from fastvar_trt.export.weights_file import TensorPlace, layout, map_weights, read_layout, write_weights
from fastvar_trt.plugins import DOMAIN, VERSION
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import BundleError, ExportError
from fastvar_trt.runtime.manifest import (
    MANIFEST_FILE,
    REFERENCE_FILE,
    WEIGHTS_FILE,
    FileSpec,
    GraphSpec,
    Manifest,
    check_files,
    read_manifest,
)
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.plan import PRESETS, PruningPlan, ResolvedPlan

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PHASES = ("trace", "check", "compare")
_MODELS: Mapping[str, type[VAR] | type[Infinity]] = {"var": VAR, "infinity": Infinity}
_REFERENCE_POSITIONS = 64  # of the logits that the reference keeps per step
_FREE_SPACE_MARGIN = 64 << 20  # graphs, reference and manifest


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    plan: PruningPlan = PRESETS["none"]
    precision: str = "fp32"
    batches: tuple[int, ...] = (1,)
    max_top_k: int = DEFAULT_TOP_K  # static bound of top-k in the graphs; 0: the whole vocabulary


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export found."""

    manifest: Manifest
    errors: Mapping[str, GraphError]  # graph file -> how far it is from PyTorch


def export_model(
    source: Source,
    out: Path,
    options: ExportOptions,
    *,
    force: bool = False,
    progress: Callable[[str, str], None] = lambda graph, phase: None,
) -> ExportReport:
    """Write the bundle of a model.

    The bundle is made in a temporary folder beside `out` and renamed into place when every graph has passed
    the ONNX checker and matches PyTorch; until then `out` is not touched.

    Args:
        source: the model.
        out: the bundle's folder.
        options: plan, precision, batch sizes.
        force: replace the bundle that is there.
        progress: called with a graph's file name and a phase (one of `PHASES`, then `done`).

    Raises:
        ExportError: `out` is taken, the disk is full, or a graph does not match PyTorch.
        PlanError: the plan does not fit the model.
    """
    _check_options(options)
    model = source.new_model(PRECISIONS[options.precision])
    options.plan.resolve(model.schedule, model.depth)  # an error before anything is written
    with _new_bundle(out, force) as folder:
        places = _write_weights(source, folder, options)
        source.copy_files(folder)
        model.load_tensors(map_weights(folder))
        return _write_graphs(model, places, folder, options, progress)


def load_bundle_model(bundle: Path) -> tuple[NextScaleModel, Manifest]:
    """The PyTorch model over a bundle's own weights, memory-mapped.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=True)
    try:
        model = _MODELS[manifest.model.family].from_configs(manifest.configs, PRECISIONS[manifest.precision])
    except (KeyError, TypeError) as error:
        raise BundleError(f"bundle {bundle}: its configs cannot be read ({error}); export it again") from error
    return model.load_tensors(map_weights(bundle)), manifest


def export_again(
    bundle: Path,
    out: Path,
    plan: PruningPlan,
    *,
    batches: tuple[int, ...] | None = None,
    force: bool = False,
    progress: Callable[[str, str], None] = lambda graph, phase: None,
) -> ExportReport:
    """Write a bundle of the same weights and precision with another plan, without the checkpoint.

    Graphs that the other plan leaves as they are get copied; the report has the errors of the traced ones only.

    Args:
        bundle: a bundle.
        out: the new bundle's folder.
        plan: its plan.
        batches: batch sizes; default: those of `bundle`.
        force: replace the bundle that is there.
        progress: as for `export_model`.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
        ExportError: `out` is taken, the disk is full, or a graph does not match PyTorch.
        PlanError: the plan does not fit the model.
    """
    model, manifest = load_bundle_model(bundle)
    plan.resolve(manifest.schedule, manifest.model.depth)
    options = ExportOptions(plan, manifest.precision, batches or manifest.batches, manifest.sampling.max_top_k)
    _check_options(options)
    functions = [
        function
        for batch in manifest.batches
        for function in (text_function(model), *chain_functions(model, manifest.resolved_plan, batch))
        if function is not None and manifest.tools == _tool_versions()  # another release traces other graphs
    ]
    there = {function.spec.file: (function, bundle / function.spec.file) for function in functions}
    with _new_bundle(out, force) as folder:
        for name in (WEIGHTS_FILE, names.TOKENIZER_FILE):
            if name in manifest.files:
                shutil.copyfile(bundle / name, folder / name)  # onnx.checker refuses hard links
        return _write_graphs(model, read_layout(folder), folder, options, progress, there)


def _check_options(options: ExportOptions) -> None:
    if options.precision not in PRECISIONS:
        raise ExportError(f"precision: got {options.precision!r}, expected one of {', '.join(PRECISIONS)}")
    if not options.batches or min(options.batches) < 1:
        raise ExportError(f"batch: got {options.batches}, expected sizes of 1 or more")


def _write_graphs(
    model: NextScaleModel,
    places: Mapping[str, TensorPlace],
    folder: Path,
    options: ExportOptions,
    progress: Callable[[str, str], None],
    there: Mapping[str, tuple[GraphFunction, Path]] = MappingProxyType({}),
) -> ExportReport:
    """All that a bundle holds besides its weights: graphs, reference, manifest."""
    plan = options.plan.resolve(model.schedule, model.depth)
    batches = tuple(sorted(set(options.batches)))
    specs: list[GraphSpec] = []
    errors: dict[str, GraphError] = {}
    for batch in batches:
        batch_specs, batch_errors = _export_chain(
            model, plan, batch, options.precision, places, folder, progress, there, write_reference=batch == batches[0]
        )
        specs += batch_specs
        errors |= batch_errors
    manifest = _manifest(model, options, batches, specs, folder)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
    return ExportReport(manifest, errors)


def _write_weights(source: Source, folder: Path, options: ExportOptions) -> dict[str, TensorPlace]:
    """The weights file: from memory-mapped checkpoints, so no second copy is held."""
    dtype = PRECISIONS[options.precision]
    shapes = source.shapes(dtype, options.max_top_k)
    _, planned = layout(shapes)
    needed = max(place.offset + place.num_bytes for place in planned.values()) + _FREE_SPACE_MARGIN
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder.parent}: {free / 2**20:.0f} MiB free, the bundle needs about {needed / 2**20:.0f} MiB; free some "
            "space or give another --out"
        )
    return write_weights(folder, shapes, source.tensors(dtype, options.max_top_k))


@torch.inference_mode()
def _export_chain(
    model: NextScaleModel,
    plan: ResolvedPlan,
    batch: int,
    precision: str,
    places: Mapping[str, TensorPlace],
    folder: Path,
    progress: Callable[[str, str], None],
    there: Mapping[str, tuple[GraphFunction, Path]],
    *,
    write_reference: bool,
) -> tuple[list[GraphSpec], dict[str, GraphError]]:
    """Trace, write and check the graphs of one batch size, in the order of the chain.

    A graph that is in `there` already, checked over the same weights, is copied.

    PyTorch runs the chain greedily and hands its state to each graph. The graph itself is run with sampling, so that
    the comparison covers the draw; the greedy images are left in the bundle as its known-answer test.
    """
    condition = model.example_condition(batch)
    greedy = _request(model, batch, greedy=True)
    reference = {name: tensor.numpy() for name, tensor in condition.items()}
    state: ChainState | None = None
    errors = {}
    functions = chain_functions(model, plan, batch)
    text = text_function(model) if write_reference else None  # the same for all batch sizes
    if text is not None:
        functions.insert(0, text)
    for function in functions:
        spec = function.spec
        progress(spec.file, PHASES[0])
        inputs = _graph_inputs(model, function, condition, state)
        known = there.get(spec.file)
        if known is not None and function.same_graph(known[0]):
            shutil.copyfile(known[1], folder / spec.file)
        else:
            graph = _build(function, model, places, folder)
            progress(spec.file, PHASES[1])
            save_graph(graph, folder / spec.file)
            progress(spec.file, PHASES[2])
            got = run_in_onnxruntime(folder, spec, graph, inputs)
            errors[spec.file] = compare_with_torch(function, inputs, got, precision)
        if spec.kind == "condition":
            state = ChainState.begin(model, condition)
        elif spec.scale is not None:
            assert state is not None
            uniform = torch.zeros(batch, *model.token_spec(spec.scale)[0])
            outputs = state.step(model, plan, spec.scale, uniform, greedy)
            reference[f"step_{spec.scale:02d}"] = outputs.tokens.numpy()
            reference[f"logits_{spec.scale:02d}"] = outputs.logits[:, :_REFERENCE_POSITIONS].numpy()
        elif spec.kind == "text_encoder":
            encoded = model.encode_text(inputs)
            reference |= {name: tensor.numpy() for name, tensor in (*inputs.items(), *encoded.items())}
        elif spec.kind == "decoder":
            assert state is not None and state.f_hat is not None
            reference["f_hat"], reference["image"] = state.f_hat.numpy(), model.decode(state.f_hat)[0].numpy()
        progress(spec.file, "done")
    if write_reference:
        np.savez(folder / REFERENCE_FILE, allow_pickle=False, **reference)
    return [function.spec for function in functions], errors


def _build(function: GraphFunction, model: NextScaleModel, places: Mapping[str, TensorPlace], folder: Path) -> Any:
    with torch.inference_mode(False):  # tracing needs autograd's view tracking
        return build_graph(function, model, places, folder)


def _request(model: NextScaleModel, batch: int, *, greedy: bool) -> Request:
    defaults = model.sampling_spec()
    return Request(
        cfg=torch.full((batch,), defaults.cfg),
        temperature=torch.full((batch,), defaults.temperature),
        top_k=torch.full((batch,), defaults.top_k),
        top_p=torch.full((batch,), defaults.top_p),
        greedy=torch.full((batch,), greedy),
    )


def _graph_inputs(
    model: NextScaleModel, function: GraphFunction, condition: Mapping[str, Tensor], state: ChainState | None
) -> dict[str, Tensor]:
    """The inputs of one graph out of the state that PyTorch has reached."""
    spec = function.spec
    if spec.kind == "text_encoder":
        return model.example_text()
    if state is None:
        return dict(condition)
    if spec.kind == "decoder":
        # Not what the chain has drawn: of an untrained model that is nearly constant, and the decoder's normalisation
        # then magnifies rounding until nothing can be compared.
        shape = spec.inputs[0].shape
        return {names.F_HAT: torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    request = _request(model, spec.batch, greedy=False)
    available = dict(state.condition)
    if state.f_hat is not None:
        available[names.F_HAT] = state.f_hat
    for i, (k, v) in enumerate(state.past):
        available |= {names.past_k(i): k, names.past_v(i): v}
    for i, outputs in state.caches.items():
        available |= {names.cache(i, sub): y for sub, y in zip(model.sublayers, outputs, strict=True)}
    available |= {name: getattr(request, name) for name in names.REQUEST_INPUTS}
    if spec.scale is not None:
        shape = next(i.shape[1:] for i in spec.inputs if i.name == names.UNIFORM)
        rows = [uniform_noise(image, spec.scale, shape) for image in range(spec.batch)]
        available[names.UNIFORM] = torch.from_numpy(np.stack(rows))
    return {i.name: available[i.name] for i in spec.inputs}


def _manifest(
    model: NextScaleModel, options: ExportOptions, batches: tuple[int, ...], specs: Sequence[GraphSpec], folder: Path
) -> Manifest:
    return Manifest(
        model=model.model_spec(),
        schedule=model.schedule,
        plan=options.plan,
        precision=options.precision,
        batches=batches,
        sampling=model.sampling_spec(),
        graphs=tuple(specs),
        files={path.name: FileSpec.of(path) for path in sorted(folder.iterdir()) if path.is_file()},
        operators={DOMAIN: VERSION},
        tools=_tool_versions(),
        configs=model.configs(),
    )


def _tool_versions() -> dict[str, str]:
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
        is_bundle = "format_version" in data and "graphs" in data
    except (OSError, ValueError, TypeError):
        is_bundle = False
    if not is_bundle:
        raise ExportError(f"--out {out}: not a bundle, so --force does not replace it; remove it yourself")
