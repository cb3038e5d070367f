"""The target `cuda`: graphs for ONNX Runtime on an NVIDIA GPU, over one device copy of the weights.

An initializer would be copied to the device once per session, so the weights become inputs, as for TensorRT. Nothing in
a graph may come from the host while it runs, so that ONNX Runtime can record it as a CUDA graph.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from fastvar_trt.export.build.base import Builder, Built
from fastvar_trt.export.passes.batch_left_operands import BatchLeftOperands
from fastvar_trt.export.passes.promote_weights import PromoteWeights
from fastvar_trt.export.passes.replace_functions import ReplaceFunctions
from fastvar_trt.export.progress import Progress
from fastvar_trt.export.weights_file import check_readable
from fastvar_trt.plugins import cuda_functions
from fastvar_trt.runtime.backends.onnxruntime_cuda import BUILT_WITH, CUDA_TARGET, FLAVOUR
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import GraphSpec, TensorSpec
from fastvar_trt.runtime.precision import DTYPE_OF_ONNX


class CudaBuilder(Builder):
    """Graphs with their weights as inputs."""

    folder = FLAVOUR
    target_names = (CUDA_TARGET,)
    description = "ONNX Runtime on an NVIDIA GPU"

    def built_with(self) -> dict[str, str]:
        """The form of the graphs: any ONNX Runtime takes them."""
        return dict(BUILT_WITH)

    def build(
        self, bundle: Path, graph: GraphSpec, targets: tuple[str, ...], scratch: Path, progress: Progress
    ) -> Built:
        """See `Builder.build`."""
        model, weights = with_weights_as_inputs(bundle / graph.file)
        ReplaceFunctions(cuda_functions.function_protos(model.opset_imports[""]))(model)
        _fold_shapes(model)
        BatchLeftOperands()(model)
        path = scratch / graph.file
        ir.save(model, path)
        return Built(path, tuple(spec.name for spec in weights), (*graph.inputs, *weights), graph.outputs)


def _fold_shapes(model: ir.Model) -> None:
    """Inline the operators, and make constants of all that follows from shapes, which are static."""
    passes.InlinePass()(model)
    for _ in range(2):  # shapes that follow from values that were folded
        passes.ShapeInferencePass(data_prop=True)(model)
        optimizer.fold_constants(model, onnx_shape_inference=False)
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)


def with_weights_as_inputs(path: Path) -> tuple[ir.Model, tuple[TensorSpec, ...]]:
    """A graph with its weights promoted, and the inputs that are tensors of the weights file beside it.

    Raises:
        ExportError: a file cannot be read.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's own types
        raise ExportError(f"{path.name}: cannot be read as ONNX: {error}") from error
    check_readable(path.parent)
    num_inputs = len(model.graph.inputs)
    PromoteWeights()(model)
    return model, tuple(_spec(value) for value in model.graph.inputs[num_inputs:])


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None and value.dtype is not None
    return TensorSpec(value.name, tuple(value.shape.numpy()), DTYPE_OF_ONNX[int(value.dtype)])
