"""Make inputs of a graph's large weights: what runs on a GPU, where all graphs share one copy of them."""

from __future__ import annotations

import onnx_ir as ir

# Below, a weight costs less inside the graph than a binding does.
_MIN_PROMOTED_BYTES = 16 << 10
# Operators and operand positions at which TensorRT takes a tensor that is known at run time only. Convolutions want
# theirs at build time: the kernels of the decoder and of phi stay inside.
_PROMOTABLE = {("Gemm", 1), ("Gemm", 2), ("Gather", 0), ("Add", 0), ("Add", 1), ("MatMul", 0), ("MatMul", 1)}
# The scales stay inside: TensorRT multiplies in 8 bits only where it knows them.
_PROMOTABLE |= {("DequantizeLinear", 0)}


class PromoteWeights(ir.passes.InPlacePass):
    """Large weights become inputs, behind those that are there; the others are loaded into the graph.

    Requires: weights are external data that can be read.
    Ensures: no external data is left; the names of the new inputs are those of tensors of the weights file; biases [N]
    are declared [1, N], which TensorRT needs to fuse them into the matrix product.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
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
        return ir.passes.PassResult(model, bool(promoted))

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                raise ir.passes.PostconditionError(f"{value.name} is still external data")


def _is_promotable(value: ir.Value) -> bool:
    if not isinstance(value.const_value, ir.ExternalTensor):
        return False
    uses = {(node.op_type, index) for node, index in value.uses()}
    if not uses <= _PROMOTABLE:
        return False
    is_bias = uses == {("Gemm", 2)}  # however small: inside, it would be a second copy for every graph
    return is_bias or value.const_value.nbytes >= _MIN_PROMOTED_BYTES
