"""Make a graph return which tokens it selects, so that it can be compared on the same ones."""

from __future__ import annotations

import onnx_ir as ir

from fastvar_trt.plugins import DOMAIN, PIVOTAL_TOKENS


class ExposeSelections(ir.passes.InPlacePass):
    """The results of all `PivotalTokens` nodes become outputs, behind those that are there, in the order of the chain.

    Requires: nodes lie in an order in which they can run, so that each selection depends on those before it alone.
    Ensures: one more output per such node.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, PIVOTAL_TOKENS)]
        for node in nodes:
            model.graph.outputs.append(node.outputs[0])
        return ir.passes.PassResult(model, bool(nodes))
