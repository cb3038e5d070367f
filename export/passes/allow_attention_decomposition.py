"""Let TensorRT build attention of other kernels where it has no fused one."""

from __future__ import annotations

import onnx_ir as ir


class AllowAttentionDecomposition(ir.passes.InPlacePass):
    """Mark attention in fp32: TensorRT has no fused kernel for it, and builds it of others only where it is allowed to.

    Requires: a graph for TensorRT alone: ONNX Runtime and the checker refuse the attribute.
    Ensures: every attention in fp32 has it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type == "Attention" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT:
                node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
                modified = True
        return ir.passes.PassResult(model, modified)
