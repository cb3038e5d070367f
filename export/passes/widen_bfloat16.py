"""Compute in fp32 what a graph computes in bfloat16, for backends without bfloat16 kernels."""

from __future__ import annotations

import onnx_ir as ir

_NARROW = ir.DataType.BFLOAT16
_WIDE = ir.DataType.FLOAT


class WidenBFloat16(ir.passes.InPlacePass):
    """Replace bfloat16 arithmetic by fp32.

    Requires: no node but Cast makes bfloat16 of other types (true of the exporter's graphs).
    Ensures: inputs, outputs and initializers keep their dtypes, so the weights file and the runtime's buffers stay what
    they are; every tensor between them is fp32 where it was bfloat16.
    """

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            narrow = any(value.dtype == _NARROW for value in node.outputs)
            if narrow and node.op_type != "Cast" and not any(i is not None and i.dtype == _NARROW for i in node.inputs):
                raise ir.passes.PreconditionError(f"{node.op_type} {node.name} makes bfloat16 of other types")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        first = graph[0]
        for value in [*graph.inputs, *graph.initializers.values()]:
            if value.dtype == _NARROW:
                cast = _cast(value, _WIDE)
                value.replace_all_uses_with(cast.outputs[0])
                cast.replace_input_with(0, value)
                graph.insert_before(first, cast)
                modified = True
        for node in graph:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == _NARROW:
                node.attributes["to"] = ir.AttrInt64("to", int(_WIDE))
                modified = True
            for output in node.outputs:
                if output.dtype == _NARROW and not output.is_graph_output():
                    output.type = ir.TensorType(_WIDE)
        for index, output in enumerate(graph.outputs):
            if output.dtype == _NARROW:
                name, shape = output.name, output.shape
                output.name, output.type = f"{name}_wide", ir.TensorType(_WIDE)
                cast = _cast(output, _NARROW)
                narrow = cast.outputs[0]
                narrow.name, narrow.shape = name, shape
                graph.append(cast)
                graph.outputs[index] = narrow
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            for value in node.outputs:
                if value.dtype == _NARROW and not value.is_graph_output():
                    raise ir.passes.PostconditionError(f"{node.op_type} {node.name} still computes in bfloat16")


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(to)})
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(to), value.shape
    node.outputs[0].name = f"{value.name}_cast"
    return node
