"""From official checkpoint files to a bundle: load, convert, trace, check, write."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvar_trt.export.folders import replace_folder, temporary_folder
from fastvar_trt.export.models.checkpoint import check_checkpoints, deployment_tensors, load_state_dict
from fastvar_trt.export.models.config import VARConfig, VQVAEConfig
from fastvar_trt.export.models.reference import ChainState
from fastvar_trt.export.models.var import VAR, Request
from fastvar_trt.export.tracing import GraphFunction, build_graph, chain_functions, save_graph
from fastvar_trt.export.validation import GraphError, compare_with_torch, run_in_onnxruntime
from fastvar_trt.export.weights_file import TensorPlace, layout, map_weights, read_layout, write_weights
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
    ModelSpec,
    SamplingSpec,
    check_files,
    read_manifest,
)
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.plan import PRESETS, PruningPlan, ResolvedPlan

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_TOP_K = 900  # VAR's sampling settings: demo_sample.ipynb
DEFAULT_TOP_P = 0.96
DEFAULT_CFG = 1.5
PHASES = ("trace", "check", "compare")
_REFERENCE_POSITIONS = 64  # of the logits that the reference keeps per step
_FREE_SPACE_MARGIN = 64 << 20  # graphs, reference and manifest


@dataclasses.dataclass(frozen=True)
class VARSource:
    """A VAR to export: configurations and the official state dicts."""

    config: VARConfig
    vae_config: VQVAEConfig
    state: Mapping[str, Tensor]
    vae_state: Mapping[str, Tensor]

    @classmethod
    def from_files(cls, checkpoint: Path, vae: Path, overrides: Mapping[str, Any] | None = None) -> VARSource:
        """The official files, memory-mapped and checked.

        Raises:
            CheckpointError: a file that is missing, damaged, or not of this model.
        """
        return cls.from_state(load_state_dict(checkpoint, "var"), load_state_dict(vae, "vae"), overrides)

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], vae_state: Mapping[str, Tensor], overrides: Mapping[str, Any] | None = None
    ) -> VARSource:
        """State dicts in the official keys, checked.

        Args:
            state: the transformer's.
            vae_state: the VQVAE's.
            overrides: what state dicts do not tell: `num_heads`, `patch_nums`, `quant_resi`.

        Raises:
            CheckpointError: keys, shapes or sizes that do not belong together.
        """
        known = {"num_heads", "patch_nums", "quant_resi"}
        unknown = sorted(set(overrides or {}) - known)
        if unknown:
            raise CheckpointError(
                f"--config: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}, everything else is "
                "read from the state dict"
            )
        config = VARConfig.from_state_dict(state, overrides)
        vae_config = VQVAEConfig.from_state_dict(vae_state, (overrides or {}).get("quant_resi", 0.5))
        check_checkpoints(config, vae_config, state, vae_state)
        return cls(config, vae_config, state, vae_state)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    plan: PruningPlan = PRESETS["none"]
    precision: str = "fp32"
    batches: tuple[int, ...] = (1,)
    max_top_k: int = DEFAULT_TOP_K  # 0: the whole vocabulary

    def resolved_top_k(self, vocab_size: int) -> int:
        """The static bound of top-k in the graphs."""
        return min(self.max_top_k or vocab_size, vocab_size)


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export found."""

    manifest: Manifest
    errors: Mapping[str, GraphError]  # graph file -> how far it is from PyTorch


def export_var(
    source: VARSource,
    out: Path,
    options: ExportOptions,
    *,
    force: bool = False,
    progress: Callable[[str, str], None] = lambda graph, phase: None,
) -> ExportReport:
    """Write the bundle of a VAR.

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
    options.plan.resolve(source.config.schedule, source.config.depth)  # an error before anything is written
    with _new_bundle(out, force) as folder:
        model, places = _write_model(source, folder, options)
        return _write_graphs(model, places, folder, options, progress)


def load_bundle_model(bundle: Path) -> tuple[VAR, Manifest]:
    """The PyTorch model over a bundle's own weights, memory-mapped.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=True)
    try:
        var, vae = ({**manifest.configs[name]} for name in ("var", "vae"))
        config = VARConfig(**{**var, "patch_nums": tuple(var["patch_nums"])})
        vae_config = VQVAEConfig(**{**vae, "level_channels": tuple(vae["level_channels"])})
    except (KeyError, TypeError) as error:
        raise BundleError(f"bundle {bundle}: its configs cannot be read ({error}); export it again") from error
    model = VAR(config, vae_config, PRECISIONS[manifest.precision])
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
        progress: as for `export_var`.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
        ExportError: `out` is taken, the disk is full, or a graph does not match PyTorch.
        PlanError: the plan does not fit the model.
    """
    model, manifest = load_bundle_model(bundle)
    plan.resolve(manifest.schedule, manifest.model.depth)
    options = ExportOptions(plan, manifest.precision, batches or manifest.batches, manifest.sampling.max_top_k)
    _check_options(options)
    there = {
        function.spec.file: (function, bundle / function.spec.file)
        for batch in manifest.batches
        if manifest.tools == _tool_versions()  # another release traces other graphs
        for function in chain_functions(model, manifest.resolved_plan, batch)
    }
    with _new_bundle(out, force) as folder:
        shutil.copyfile(bundle / WEIGHTS_FILE, folder / WEIGHTS_FILE)  # onnx.checker refuses hard links
        return _write_graphs(model, read_layout(folder), folder, options, progress, there)


def _check_options(options: ExportOptions) -> None:
    if options.precision not in PRECISIONS:
        raise ExportError(f"precision: got {options.precision!r}, expected one of {', '.join(PRECISIONS)}")
    if not options.batches or min(options.batches) < 1:
        raise ExportError(f"batch: got {options.batches}, expected sizes of 1 or more")


def _write_graphs(
    model: VAR,
    places: Mapping[str, TensorPlace],
    folder: Path,
    options: ExportOptions,
    progress: Callable[[str, str], None],
    there: Mapping[str, tuple[GraphFunction, Path]] = MappingProxyType({}),
) -> ExportReport:
    """All that a bundle holds besides its weights: graphs, reference, manifest."""
    plan = options.plan.resolve(model.config.schedule, model.config.depth)
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


def _write_model(source: VARSource, folder: Path, options: ExportOptions) -> tuple[VAR, dict[str, TensorPlace]]:
    """The weights file, and the model over it: memory-mapped, so no second copy is held."""
    dtype = PRECISIONS[options.precision]
    max_top_k = options.resolved_top_k(source.config.vocab_size)

    def tensors(state: Mapping[str, Tensor], vae_state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        return deployment_tensors(source.config, source.vae_config, state, vae_state, dtype, max_top_k)

    with torch.device("meta"):  # shapes and dtypes only
        meta = [{key: value.to("meta") for key, value in state.items()} for state in (source.state, source.vae_state)]
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors(*meta)}
    _, planned = layout(shapes)
    needed = max(place.offset + place.num_bytes for place in planned.values()) + _FREE_SPACE_MARGIN
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder.parent}: {free / 2**20:.0f} MiB free, the bundle needs about {needed / 2**20:.0f} MiB; free some "
            "space or give another --out"
        )
    places = write_weights(folder, shapes, tensors(source.state, source.vae_state))
    model = VAR(source.config, source.vae_config, dtype)
    return model.load_tensors(map_weights(folder)), places


@torch.inference_mode()
def _export_chain(
    model: VAR,
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
    labels = torch.arange(batch) % model.config.num_classes
    greedy = _request(model, batch, greedy=True)
    reference: dict[str, NDArray[Any]] = {"labels": labels.numpy(), "cfg": np.array(DEFAULT_CFG, dtype=np.float32)}
    state: ChainState | None = None
    errors = {}
    functions = chain_functions(model, plan, batch)
    for function in functions:
        spec = function.spec
        progress(spec.file, PHASES[0])
        inputs = _graph_inputs(model, function, labels, state)
        expected = function.run(inputs, None)
        known = there.get(spec.file)
        if known is not None and function.same_graph(known[0]):
            shutil.copyfile(known[1], folder / spec.file)
        else:
            graph = _build(function, model, places, folder)
            progress(spec.file, PHASES[1])
            save_graph(graph, folder / spec.file)
            progress(spec.file, PHASES[2])
            got = run_in_onnxruntime(folder, spec, graph, inputs)
            errors[spec.file] = compare_with_torch(function, inputs, got, precision, expected)
        if spec.kind == "condition":
            state = ChainState.begin(model, labels)
        elif spec.scale is not None:
            assert state is not None
            uniform = torch.zeros(batch, plan.num_tokens(spec.scale))
            outputs = state.step(model, plan, spec.scale, uniform, greedy)
            reference[f"step_{spec.scale:02d}"] = outputs.tokens.numpy()
            reference[f"logits_{spec.scale:02d}"] = outputs.logits[:, :_REFERENCE_POSITIONS].numpy()
        else:
            reference["f_hat"], reference["image"] = inputs[names.F_HAT].numpy(), expected[names.IMAGE].numpy()
        progress(spec.file, "done")
    if write_reference:
        np.savez(folder / REFERENCE_FILE, allow_pickle=False, **reference)
    return [function.spec for function in functions], errors


def _build(function: GraphFunction, model: VAR, places: Mapping[str, TensorPlace], folder: Path) -> Any:
    with torch.inference_mode(False):  # tracing needs autograd's view tracking
        return build_graph(function, model, places, folder)


def _request(model: VAR, batch: int, *, greedy: bool) -> Request:
    limit = len(model.weight("sampling.rank"))
    return Request(
        cfg=torch.full((batch,), DEFAULT_CFG),
        temperature=torch.ones(batch),
        top_k=torch.full((batch,), min(DEFAULT_TOP_K, limit)),
        top_p=torch.full((batch,), DEFAULT_TOP_P),
        greedy=torch.full((batch,), greedy),
    )


def _graph_inputs(model: VAR, function: GraphFunction, labels: Tensor, state: ChainState | None) -> dict[str, Tensor]:
    """The inputs of one graph out of the state that PyTorch has reached."""
    spec = function.spec
    if state is None:
        return {names.LABELS: labels}
    request = _request(model, spec.batch, greedy=False)
    available = {names.START: state.start, names.HEAD_MODULATION: state.head_modulation}
    if state.f_hat is not None:
        available[names.F_HAT] = state.f_hat
    available |= {names.modulation(i): value for i, value in enumerate(state.modulations)}
    for i, (k, v) in enumerate(state.past):
        available |= {names.past_k(i): k, names.past_v(i): v}
    for i, (attn, ffn) in state.caches.items():
        available |= {names.cache(i, "attn"): attn, names.cache(i, "ffn"): ffn}
    available |= {name: getattr(request, name) for name in names.REQUEST_INPUTS}
    if spec.scale is not None:
        length = next(i.shape[1] for i in spec.inputs if i.name == names.UNIFORM)
        rows = [uniform_noise(image, spec.scale, length) for image in range(spec.batch)]
        available[names.UNIFORM] = torch.from_numpy(np.stack(rows))
    return {i.name: available[i.name] for i in spec.inputs}


def _manifest(
    model: VAR, options: ExportOptions, batches: tuple[int, ...], specs: Sequence[GraphSpec], folder: Path
) -> Manifest:
    config, vae = model.config, model.vae_config
    side = config.patch_nums[-1] * vae.pixels_per_token
    max_top_k = options.resolved_top_k(config.vocab_size)
    return Manifest(
        model=ModelSpec(
            family="var",
            depth=config.depth,
            width=config.width,
            num_heads=config.num_heads,
            mlp_width=config.mlp_width,
            num_classes=config.num_classes,
            vocab_size=config.vocab_size,
            code_channels=config.code_channels,
            image_height=side,
            image_width=side,
        ),
        schedule=config.schedule,
        plan=options.plan,
        precision=options.precision,
        batches=batches,
        sampling=SamplingSpec(max_top_k, DEFAULT_CFG, min(DEFAULT_TOP_K, max_top_k), DEFAULT_TOP_P),
        graphs=tuple(specs),
        files={path.name: FileSpec.of(path) for path in sorted(folder.iterdir()) if path.is_file()},
        operators={DOMAIN: VERSION},
        tools=_tool_versions(),
        configs={"var": dataclasses.asdict(config), "vae": dataclasses.asdict(vae)},
    )


def _tool_versions() -> dict[str, str]:
    packages = ("fastvar-trt", "torch", "onnx", "onnxscript", "onnx-ir")
    return {package: importlib.metadata.version(package) for package in packages}


@contextlib.contextmanager
def _new_bundle(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""
    out = Path(os.path.abspath(out))  # noqa: PTH100  # resolve() would follow a link that --force should replace
    _check_free(out, force)
    try:
        with temporary_folder(out) as folder:
            yield folder
            _check_free(out, force)  # minutes have passed
            replace_folder(folder, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExportError(f"--out {out}: the disk is full: {error.strerror}; nothing was kept") from error
        raise ExportError(f"--out {out}: cannot be written: {error}; nothing was kept") from error


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
