"""Other bodies for the operators of a graph: those that a target computes best."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir


class ReplaceFunctions(ir.passes.InPlacePass):
    """Take other bodies for the local functions of a graph; those that it does not have are left out.

    Requires: the bodies take and give what the functions of the same name do.
    Ensures: nothing else changes.

    Args:
        protos: the bodies.
    """

    def __init__(self, protos: Iterable[onnx.FunctionProto]) -> None:
        super().__init__()
        self._functions = [ir.serde.deserialize_function(proto) for proto in protos]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for function in self._functions:
            if function.identifier() in model.functions:
                model.functions[function.identifier()] = function
                modified = True
        return ir.passes.PassResult(model, modified)
