"""Spell out the batches of matrix products whose left operand has none."""

from __future__ import annotations

import onnx_ir as ir


class BatchLeftOperands(ir.passes.InPlacePass):
    """Expand a matrix that is multiplied with batches of others to as many copies of it.

    ONNX Runtime's CUDA provider hands such a product to cuBLAS as three arrays of pointers, and copies these to the
    device in every run: a copy that a CUDA graph cannot hold. Batches on both sides are one strided product. The
    matrices are those that interpolate: small.

    Requires: shapes are known.
    Ensures: no product has a left operand with fewer axes than its right one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "MatMul":
                continue
            left, right = node.inputs
            assert left is not None and left.shape is not None and right is not None and right.shape is not None
            if len(left.shape) >= len(right.shape):
                continue
            sizes = [*right.shape.numpy()[:-2], *left.shape.numpy()]
            shape = ir.node("Constant", [], attributes={"value_ints": sizes})
            expand = ir.node("Expand", [left, shape.outputs[0]])
            shape.outputs[0].name, expand.outputs[0].name = f"{node.name}_batches", f"{node.name}_left"
            expand.outputs[0].shape, expand.outputs[0].type = ir.Shape(sizes), left.type
            model.graph.insert_before(node, [shape, expand])
            node.replace_input_with(0, expand.outputs[0])
            modified = True
        return ir.passes.PassResult(model, modified)
