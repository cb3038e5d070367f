"""Products with matrices of few bits in the form that ONNX Runtime's CPU provider multiplies fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from fastvar_trt.export.passes.flash_attention import CONTRIB_DOMAIN

_BLOCKS = (128, 64, 32, 16)  # of `MatMulNBits`; the larger, the faster
_INT8_ACTIVATIONS = 4  # its accuracy level: rounded too, one scale per row and block
_BITS = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}


class IntegerProducts(ir.passes.InPlacePass):
    """`com.microsoft.MatMulIntegerToFloat` and `MatMulNBits` in place of products of dequantised matrices.

    ONNX Runtime dequantises a whole matrix at every run, and leaves the standard's form as it is where the result is
    fp32. Where activations are rounded with a known scale the product is that of these numbers, exactly; where only the
    matrix is, `MatMulNBits` rounds activations on the way, by row and block.

    Requires: a product's matrix is an initializer [in, out].
    Ensures: fp32 products of int8 or int4 matrices are one of the two, as far as their sizes allow.

    Args:
        has_vnni: whether the processor adds products of uint8 and int8 in 32 bits; others saturate at 16, so that they
            get uint8 and uint8.
    """

    def __init__(self, *, has_vnni: bool) -> None:
        super().__init__()
        self._has_vnni = has_vnni

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type in ("Gemm", "MatMul") and self._replace(model.graph, node):
                modified = True
        if modified:
            model.opset_imports[CONTRIB_DOMAIN] = 1
            passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def _replace(self, graph: ir.Graph, node: ir.Node) -> bool:
        matrix = _producer(node.inputs[1], "DequantizeLinear")
        if matrix is None or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.FLOAT:
            return False
        q, scale = matrix.inputs[0], matrix.inputs[1]
        if q is None or scale is None or q.const_value is None or scale.const_value is None or q.dtype not in _BITS:
            return False
        assert all(node.attributes.get_int(side, 0) == 0 for side in ("transA", "transB")), node.name
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        activations = _producer(node.inputs[0], "DequantizeLinear")
        rounded = None if activations is None else _producer(activations.inputs[0], "QuantizeLinear")
        if rounded is not None and q.dtype == ir.DataType.INT8:
            new = self._integer(graph, node, rounded, q, scale, bias)
        else:
            new = _blocked(graph, node, q, scale, bias)
        if not new:
            return False
        old, result = node.outputs[0], new[-1].outputs[0]
        result.shape, result.type = old.shape, old.type
        result.name, old.name = old.name, None  # graphs have their outputs by name
        graph.insert_before(node, new)
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        return True

    def _integer(
        self, graph: ir.Graph, node: ir.Node, rounded: ir.Node, q: ir.Value, scale: ir.Value, bias: ir.Value | None
    ) -> list[ir.Node]:
        """uint8 activations, 128 above the int8 ones, times the matrix."""
        x, x_scale = rounded.inputs[0], rounded.inputs[1]
        zero = _initializer(graph, np.array(128, dtype=np.uint8), "uint8_zero")
        matrix_zero = None
        if not self._has_vnni:
            q, matrix_zero = _initializer(graph, _shifted(q), f"{q.name}.uint8"), zero
        quantise = ir.node("QuantizeLinear", [x, x_scale, zero])
        quantise.outputs[0].name = f"{node.name}_x"
        product = ir.node(
            "MatMulIntegerToFloat",
            [quantise.outputs[0], q, x_scale, scale, zero, matrix_zero, bias],
            domain=CONTRIB_DOMAIN,
        )
        return [quantise, product]


def _blocked(graph: ir.Graph, node: ir.Node, q: ir.Value, scale: ir.Value, bias: ir.Value | None) -> list[ir.Node]:
    """`MatMulNBits`; nothing where the matrix has no block of its."""
    assert scale.const_value is not None and q.dtype is not None
    bits, scales = _BITS[q.dtype], scale.const_value.numpy()
    values = _shifted(q)
    num_in, num_out = values.shape
    own = num_in // len(scales) if scales.ndim == 2 else num_in
    block = next((size for size in _BLOCKS if own % size == 0), None)
    if block is None:
        return []
    blocks: NDArray[Any] = values.T.reshape(num_out, num_in // block, block)
    if bits == 4:
        blocks = blocks[..., 0::2] | (blocks[..., 1::2] << 4)
    repeated = np.broadcast_to(scales.reshape(-1, 1, num_out), (num_in // own, own // block, num_out))
    product = ir.node(
        "MatMulNBits",
        [
            node.inputs[0],
            _initializer(graph, np.ascontiguousarray(blocks), f"{q.name}.blocks"),
            _initializer(graph, np.ascontiguousarray(repeated.reshape(-1, num_out).T.ravel()), f"{scale.name}.blocks"),
            None,
            None,
            bias,
        ],
        {"K": num_in, "N": num_out, "bits": bits, "block_size": block, "accuracy_level": _INT8_ACTIVATIONS},
        domain=CONTRIB_DOMAIN,
    )
    return [product]


def _shifted(q: ir.Value) -> NDArray[np.uint8]:
    """Numbers of a matrix as unsigned ones: half of their range above."""
    assert q.const_value is not None and q.dtype is not None
    return (q.const_value.numpy().astype(np.int16) + 2 ** (_BITS[q.dtype] - 1)).astype(np.uint8)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of that type that makes a value, casts from fp32 to fp32 left out."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type == "Cast":
        source = node.inputs[0]
        if source is None or {source.dtype, node.outputs[0].dtype} != {ir.DataType.FLOAT}:
            return None
        node = source.producer()
    return node if node is not None and node.op_type == op_type else None


def _initializer(graph: ir.Graph, array: NDArray[np.generic], name: str) -> ir.Value:
    """An initializer of that name, which the graph may have already."""
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        assert value.const_value is not None
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        graph.register_initializer(value)
    return graph.initializers[name]
