"""A bundle's graph as TensorRT wants it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from fastvar_trt.export.promotion import promote_weights
from fastvar_trt.export.tensorrt.plugin_nodes import use_plugins


@dataclasses.dataclass(frozen=True)
class TensorRTGraph:
    """What is handed to the parser.

    Attributes:
        model: a serialized ONNX model without external data.
        weights: names of the inputs that are tensors of `weights.safetensors`.
    """

    model: bytes
    weights: tuple[str, ...]


def tensorrt_graph(path: Path, *, plugins: bool = False) -> TensorRTGraph:
    """Read a bundle's graph, its weights promoted to inputs so that the engine stays small.

    Args:
        path: the graph file, with the weights file beside it.
        plugins: name the cache operator's plugins (enterprise TensorRT) instead of its ONNX functions.

    Raises:
        ExportError: it cannot be read.
    """
    model, weights = promote_weights(path)
    if plugins:
        use_plugins(model)
    for node in model.graph:
        # TensorRT has no fused attention for fp32, and builds none of other kernels unless it is allowed to.
        if node.op_type == "Attention" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT:
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
    return TensorRTGraph(ir.serde.serialize_model(model).SerializeToString(), weights)
