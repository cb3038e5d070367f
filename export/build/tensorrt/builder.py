"""The targets of TensorRT: engines of the graphs, over one device copy of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from fastvar_trt.export.build.base import Builder, Built
from fastvar_trt.export.build.cuda import with_weights_as_inputs
from fastvar_trt.export.build.tensorrt.engine import build_engine
from fastvar_trt.export.build.tensorrt.flavour import RTX_TARGETS, Flavour
from fastvar_trt.export.build.tensorrt.layers import count_kernels
from fastvar_trt.export.models.matrix import FORMATS, Quantised
from fastvar_trt.export.passes.allow_attention_decomposition import AllowAttentionDecomposition
from fastvar_trt.export.passes.replace_functions import ReplaceFunctions
from fastvar_trt.export.passes.use_plugins import UsePlugins
from fastvar_trt.export.progress import Progress
from fastvar_trt.plugins import DOMAIN, RESTORE_TOKENS, tensorrt_functions
from fastvar_trt.plugins.tensorrt_plugin import register_plugins
from fastvar_trt.runtime.backends.cuda import CudaDevice
from fastvar_trt.runtime.backends.tensorrt import CURRENT_TARGET, ENTERPRISE_FLAVOUR, RTX_FLAVOUR
from fastvar_trt.runtime.engines import EngineSet
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import GraphSpec, Manifest, TensorSpec, check_same_tensors
from fastvar_trt.runtime.precision import Precision

_UNSHARED = "int4"  # matrices of these TensorRT does not multiply with as they lie in the file
_FIRST_TARGET = {"float8_e4m3fn": "sm89"}  # dtype -> the first GPUs that have such numbers
_FIRST_WITH_PLUGINS = "sm80"  # what `register_plugins` compiles for, and later ones
WITH_PLUGINS = f"{CURRENT_TARGET}+plugins"


class RtxBuilder(Builder):
    """Engines of TensorRT for RTX; no GPU is needed. One engine holds the kernels of all its targets."""

    folder = RTX_FLAVOUR
    target_names: ClassVar[tuple[str, ...]] = RTX_TARGETS
    description = "TensorRT for RTX, on any machine"
    plugins = False

    def __init__(self, targets: Sequence[str]) -> None:
        super().__init__(targets)
        self._flavour: Flavour

    def open(self) -> None:
        """See `Builder.open`."""
        self._flavour = Flavour.load(self.folder)

    def built_with(self) -> dict[str, str]:
        """The version of TensorRT."""
        return {self.folder: self._flavour.version}

    def check_precision(self, precision: Precision) -> None:
        """See `Builder.check_precision`."""
        formats = (FORMATS[name] for name in sorted(precision.formats))
        for fmt in (fmt for fmt in formats if isinstance(fmt, Quantised)):
            if fmt.dtype == _UNSHARED:
                raise ExportError(
                    f"--target {self.targets[0]}: TensorRT dequantises {fmt.name} matrices that engines share into "
                    "memory of its own, of all layers at once (3.75 GiB for Infinity-2B, more than all of w8 takes); "
                    "take w8"
                )
            first = _FIRST_TARGET.get(fmt.dtype, "")
            for target in self.targets:
                if _rank(target) < _rank(first):
                    raise ExportError(
                        f"--target {target}: has no numbers of {fmt.name}, {first} is the first that has; leave it "
                        "out, or take another precision (w8a8 runs everywhere)"
                    )

    def all_targets(self, engines: EngineSet) -> tuple[str, ...]:
        """With those of the engines that this version has built before."""
        known = {t for r in engines.records.values() if r.built_with == self.built_with() for t in r.targets}
        return tuple(sorted({*self.targets, *known}, key=_rank))

    def build(
        self, bundle: Path, graph: GraphSpec, targets: tuple[str, ...], scratch: Path, progress: Progress
    ) -> Built:
        """See `Builder.build`."""
        model, weights = tensorrt_graph(bundle / graph.file, plugins=self.plugins)
        engine = build_engine(
            self._flavour,
            model,
            graph.file,
            targets,
            lambda phase, share: progress(graph.file, phase, share),
        )
        check_same_tensors(f"{graph.file}: the engine", (*graph.inputs, *weights), engine.inputs, ExportError)
        check_same_tensors(f"{graph.file}: the engine", graph.outputs, engine.outputs, ExportError)
        path = scratch / f"{Path(graph.file).stem}.engine"
        path.write_bytes(engine.data)
        kernels = {**count_kernels(engine.layers), "plugins": int(self.plugins)}
        names = tuple(spec.name for spec in weights)
        return Built(path, names, engine.inputs, engine.outputs, kernels, engine.layers, engine.activation_bytes)


class EnterpriseBuilder(RtxBuilder):
    """Engines of enterprise TensorRT, for the GPU of this machine."""

    folder = ENTERPRISE_FLAVOUR
    target_names = (CURRENT_TARGET, WITH_PLUGINS)
    description = "enterprise TensorRT, for the GPU of this machine; with the CUDA kernels of the cache operator"

    def __init__(self, targets: Sequence[str]) -> None:
        if len(targets) > 1:
            raise ExportError(f"--target: got {' and '.join(targets)}: give one of them")
        super().__init__(targets)
        self.plugins = WITH_PLUGINS in targets

    def open(self) -> None:
        """See `Builder.open`; the target is the GPU that is found."""
        super().open()
        self._find_target()
        if self.plugins:
            register_plugins()

    def check_precision(self, precision: Precision) -> None:
        """See `Builder.check_precision`: of the GPU that is found."""
        self._find_target()
        super().check_precision(precision)

    def _find_target(self) -> None:
        device = CudaDevice()
        try:
            self.targets = (device.target,)
        finally:
            device.close()
        if self.plugins and _rank(device.target) < _rank(_FIRST_WITH_PLUGINS):
            raise ExportError(
                f"--target {WITH_PLUGINS}: needs SM80 or later, this GPU is {device.target.upper()}; take current"
            )

    def all_targets(self, engines: EngineSet) -> tuple[str, ...]:
        """This GPU alone."""
        return self.targets

    def fresh(self, engines: EngineSet, manifest: Manifest, graph: GraphSpec) -> bool:
        """See `Builder.fresh`; an engine with plugins is not one without."""
        return super().fresh(engines, manifest, graph) and (
            bool(engines.records[graph.file].kernels.get("plugins")) == self.plugins
        )


def tensorrt_graph(path: Path, *, plugins: bool = False) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """A bundle's graph as TensorRT wants it, its weights promoted to inputs so that the engine stays small.

    Args:
        path: the graph file, with the weights file beside it.
        plugins: name the cache operator's plugins (enterprise TensorRT) instead of its ONNX functions.

    Returns:
        a serialized ONNX model without external data, and the inputs that are tensors of the weights file.

    Raises:
        ExportError: it cannot be read.
    """
    model, weights = with_weights_as_inputs(path)
    bodies = tensorrt_functions.function_protos(
        model.opset_imports[""], restores_smaller=_caches_are_smaller(model.graph)
    )
    ReplaceFunctions(bodies)(model)
    if plugins:
        UsePlugins()(model)
    AllowAttentionDecomposition()(model)
    return ir.serde.serialize_model(model).SerializeToString(), weights


def _rank(target: str) -> tuple[int, str]:
    """Orders compute capabilities: sm89 before sm120."""
    return len(target), target


def _caches_are_smaller(graph: ir.Graph) -> bool:
    """Whether no map is restored from a larger one."""
    return all(
        node.attributes[f"cached_{side}"].as_int() <= node.attributes[side].as_int()
        for node in graph
        if (node.domain, node.op_type) == (DOMAIN, RESTORE_TOKENS)
        for side in ("h", "w")
    )
