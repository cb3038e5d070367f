"""The cache operators as nodes of the plugins, for enterprise TensorRT."""

from __future__ import annotations

import onnx_ir as ir

from fastvar_trt.plugins import DOMAIN, PIVOTAL_TOKENS
from fastvar_trt.plugins.tensorrt_plugin import SELECT_TOKENS, TOKEN_MEAN, TOKEN_SCORE


class UsePlugins(ir.passes.InPlacePass):
    """Name the plugins in place of the ONNX functions; `plugin_namespace` makes the parser look for them.

    A plugin launches one kernel, so `PivotalTokens` becomes three nodes.

    Requires: the operators' nodes know their shapes.
    Ensures: no function of the operator is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for node in list(graph):
            if node.domain != DOMAIN:
                continue
            modified = True
            if node.op_type != PIVOTAL_TOKENS:
                node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
                continue
            x, indices = node.inputs[0], node.outputs[0]
            assert x is not None and x.shape is not None
            batch, length, channels = x.shape
            mean = _node(TOKEN_MEAN, [x], f"{indices.name}_mean", (batch, channels), ir.DataType.FLOAT)
            inputs = [x, mean.outputs[0]]
            score = _node(TOKEN_SCORE, inputs, f"{indices.name}_score", (batch, length), ir.DataType.FLOAT)
            selected = f"{indices.name}_selected"
            select = _node(SELECT_TOKENS, [score.outputs[0]], selected, indices.shape, ir.DataType.INT64)
            select.attributes["keep"] = node.attributes["keep"]
            graph.insert_before(node, [mean, score, select])
            indices.replace_all_uses_with(select.outputs[0])
            graph.remove(node, safe=True)
        for identifier in [key for key in model.functions if key[0] == DOMAIN]:
            del model.functions[identifier]
        return ir.passes.PassResult(model, modified)


def _node(op_type: str, inputs: list[ir.Value], output: str, shape: object, dtype: ir.DataType) -> ir.Node:
    node = ir.node(op_type, inputs, domain=DOMAIN, attributes={"plugin_namespace": DOMAIN})
    node.outputs[0].name = output
    node.outputs[0].shape = shape if isinstance(shape, ir.Shape) else ir.Shape(shape)  # type: ignore[arg-type]
    node.outputs[0].type = ir.TensorType(dtype)
    return node
