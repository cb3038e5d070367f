"""The cache operators as nodes of the plugins, for enterprise TensorRT."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from fastvar_trt.plugins import CACHE_OPERATORS, DOMAIN, PIVOTAL_TOKENS, RESTORE_TOKENS
from fastvar_trt.plugins.tensorrt_plugin import RESTORE_TOKENS_ADD, SELECT_TOKENS, TOKEN_MEAN, TOKEN_SCORE


class UsePlugins(ir.passes.InPlacePass):
    """Name the plugins in place of the ONNX functions; `plugin_namespace` makes the parser look for them.

    A plugin launches one kernel, so `PivotalTokens` becomes three nodes; what is restored and then added to the
    residual stream becomes one.

    Requires: the operators' nodes know their shapes.
    Ensures: no function of the cache operator is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for node in list(graph):
            if node.domain != DOMAIN or node.op_type not in CACHE_OPERATORS:
                continue
            modified = True
            if node.op_type != PIVOTAL_TOKENS:
                node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
                if node.op_type == RESTORE_TOKENS:
                    _add_residual(graph, node)
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
        for identifier in [key for key in model.functions if key[0] == DOMAIN and key[1] in CACHE_OPERATORS]:
            del model.functions[identifier]
        return ir.passes.PassResult(model, modified)


def _add_residual(graph: ir.Graph, restore: ir.Node) -> None:
    """Take in the addition to the fp32 residual stream, where it is all that a restored map is for."""
    last, between = restore.outputs[0], []
    user = _only_user(last)
    if user is not None and user.op_type == "Cast" and user.outputs[0].dtype == ir.DataType.FLOAT:
        between.append(user)
        last = user.outputs[0]
        user = _only_user(last)
    if user is None or user.op_type != "Add" or last.dtype != ir.DataType.FLOAT:
        return
    residual = next((value for value in user.inputs if value is not last), None)
    total = user.outputs[0]
    if residual is None or residual.shape != total.shape or total.is_graph_output():
        return
    fused = _node(RESTORE_TOKENS_ADD, [*restore.inputs, residual], f"{total.name}_restored", total.shape, total.dtype)
    for name, value in restore.attributes.items():
        fused.attributes[name] = value
    graph.insert_before(user, fused)
    total.replace_all_uses_with(fused.outputs[0])
    graph.remove([user, *between, restore], safe=True)


def _only_user(value: ir.Value) -> ir.Node | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _node(
    op_type: str, inputs: Sequence[ir.Value | None], output: str, shape: object, dtype: ir.DataType | None
) -> ir.Node:
    node = ir.node(op_type, inputs, domain=DOMAIN, attributes={"plugin_namespace": DOMAIN})
    node.outputs[0].name = output
    node.outputs[0].shape = shape if isinstance(shape, ir.Shape) else ir.Shape(shape)  # type: ignore[arg-type]
    assert dtype is not None
    node.outputs[0].type = ir.TensorType(dtype)
    return node
