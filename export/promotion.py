"""A bundle's graph with its large weights as inputs: what runs on a GPU, where all graphs share one copy of them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from fastvar_trt.runtime.errors import ExportError

# Below, a weight costs less inside the graph than a binding does.
_MIN_PROMOTED_BYTES = 16 << 10
# Operators and operand positions at which TensorRT takes a tensor that is known at run time only. Convolutions want
# theirs at build time: the kernels of the decoder and of phi stay inside.
_PROMOTABLE = {("Gemm", 1), ("Gemm", 2), ("Gather", 0), ("Add", 0), ("Add", 1), ("MatMul", 0), ("MatMul", 1)}


def promote_weights(path: Path) -> tuple[ir.Model, tuple[str, ...]]:
    """Read a graph, make inputs of its large weights, and load the others into it.

    Args:
        path: the graph file, with the weights file beside it.

    Returns:
        the model without external data, and the names of the inputs that are tensors of `weights.safetensors`; biases
        [N] are declared [1, N], which TensorRT needs to fuse them into the matrix product.

    Raises:
        ExportError: the file cannot be read.
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
        if len(value.shape) == 1:
            value.shape = ir.Shape([1, *value.shape])
        graph.inputs.append(value)
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), value.const_value.dtype, name=value.name)
    return model, tuple(str(value.name) for value in promoted)


def _is_promotable(value: ir.Value) -> bool:
    if not isinstance(value.const_value, ir.ExternalTensor):
        return False
    uses = {(node.op_type, index) for node, index in value.uses()}
    if not uses <= _PROMOTABLE:
        return False
    is_bias = uses == {("Gemm", 2)}  # however small: inside, it would be a second copy for every graph
    return is_bias or value.const_value.nbytes >= _MIN_PROMOTED_BYTES
