"""A bundle's graph as TensorRT wants it: the large weights as network inputs, so that engines stay small.

One device copy of the weights is then bound to the engines of all scales and batch sizes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from fastvar_trt.runtime.errors import ExportError

# Below, a weight costs less inside the engine than a binding does.
_MIN_PROMOTED_BYTES = 16 << 10
# Operators and operand positions at which TensorRT takes a tensor that is known at run time only. Convolutions want
# theirs at build time: the kernels of the decoder and of phi stay inside.
_PROMOTABLE = {("Gemm", 1), ("Gemm", 2), ("Gather", 0), ("Add", 0), ("Add", 1), ("MatMul", 0), ("MatMul", 1)}


@dataclasses.dataclass(frozen=True)
class TensorRTGraph:
    """What is handed to the parser.

    Attributes:
        model: a serialized ONNX model without external data.
        weights: names of the inputs that are tensors of `weights.safetensors`; biases [N] are declared [1, N].
        num_attention: attention nodes, each to become one fused kernel where `fused_attention`.
        fused_attention: False for fp32, which TensorRT computes by separate kernels.
        num_gelu: linear layers with bias and GELU.
    """

    model: bytes
    weights: tuple[str, ...]
    num_attention: int
    fused_attention: bool
    num_gelu: int


def tensorrt_graph(path: Path) -> TensorRTGraph:
    """Read a bundle's graph and promote its weights.

    Args:
        path: the graph file, with the weights file beside it.

    Raises:
        ExportError: it cannot be read.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's own types
        raise ExportError(f"{path.name}: cannot be read as ONNX: {error}") from error
    graph = model.graph
    promoted = [value for value in graph.initializers.values() if _is_promotable(value)]
    for value in promoted:
        assert value.name is not None and value.shape is not None
        graph.initializers.pop(value.name)
        value.const_value = None
        if len(value.shape) == 1:  # a bias: only [1, N] fuses into the matrix product
            value.shape = ir.Shape([1, *value.shape])
        graph.inputs.append(value)
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), value.const_value.dtype, name=value.name)
    attention = [node for node in graph if node.op_type == "Attention"]
    fused = all(node.inputs[0] is not None and node.inputs[0].dtype != ir.DataType.FLOAT for node in attention)
    if not fused:
        for node in attention:  # TensorRT has no fused kernel for fp32 and builds none unless it is allowed not to
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
    return TensorRTGraph(
        model=ir.serde.serialize_model(model).SerializeToString(),
        weights=tuple(str(value.name) for value in promoted),
        num_attention=len(attention),
        fused_attention=fused,
        num_gelu=sum(node.op_type == "Gelu" for node in graph),
    )


def _is_promotable(value: ir.Value) -> bool:
    if not isinstance(value.const_value, ir.ExternalTensor):
        return False
    uses = {(node.op_type, index) for node, index in value.uses()}
    if not uses <= _PROMOTABLE:
        return False
    is_bias = uses == {("Gemm", 2)}  # as large as they come: in an engine they would still be a second copy
    return is_bias or value.const_value.nbytes >= _MIN_PROMOTED_BYTES
