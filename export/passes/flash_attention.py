"""Attention in the form whose scores ONNX Runtime's CPU provider does not keep in memory."""

from __future__ import annotations

import onnx_ir as ir

CONTRIB_DOMAIN = "com.microsoft"
_MIN_SCORE_BYTES = 2**20  # below, all forms take the same time


class FlashAttention(ir.passes.InPlacePass):
    """`com.microsoft.MultiHeadAttention` of [B, L, C] in place of `Attention` of [B, H, L, D] without a mask.

    ONNX Runtime computes it block by block; `Attention` holds all scores, [B, H, L, S], at once: gigabytes above 512
    pixels. And `Attention` gives whole heads to its threads, which leaves some without work where B H is no multiple
    of them.

    Requires: shapes are known; attention has as many heads and channels in keys and values as in queries.
    Ensures: none that is neither masked nor causal nor capped holds scores of 1 MiB or more.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for node in list(graph):
            if not _is_plain(node) or _score_bytes(node) < _MIN_SCORE_BYTES:
                continue
            query, output = node.inputs[0], node.outputs[0]
            assert query is not None and query.shape is not None
            batch, heads, length, head_dim = query.shape.numpy()
            flat = [
                step
                for axis, x in zip("qkv", node.inputs, strict=True)
                for step in _flattened(x, f"{node.name}_{axis}")
            ]
            attention = ir.node(
                "MultiHeadAttention",
                [step.outputs[0] for step in flat if step.op_type == "Reshape"],
                {"num_heads": heads, "scale": node.attributes.get_float("scale", head_dim**-0.5)},
                domain=CONTRIB_DOMAIN,
            )
            shape = _constant([batch, length, heads, head_dim], f"{node.name}_shape")
            split = ir.node("Reshape", [attention.outputs[0], shape.outputs[0]])
            whole = ir.node("Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]})
            attention.outputs[0].name, split.outputs[0].name = f"{node.name}_flat", f"{node.name}_heads"
            whole.outputs[0].name = f"{node.name}_whole"
            whole.outputs[0].shape, whole.outputs[0].type = output.shape, output.type
            graph.insert_before(node, [*flat, attention, shape, split, whole])
            output.replace_all_uses_with(whole.outputs[0])
            graph.remove(node, safe=True)
            modified = True
        if modified:
            model.opset_imports[CONTRIB_DOMAIN] = 1
        return ir.passes.PassResult(model, modified)


def _is_plain(node: ir.Node) -> bool:
    """Attention of three inputs and one output: no mask, no cache, no cap."""
    return (
        (node.domain, node.op_type, len(node.inputs), len(node.outputs)) == ("", "Attention", 3, 1)
        and not node.attributes.get_int("is_causal", 0)
        and not node.attributes.get_float("softcap", 0.0)
    )


def _score_bytes(node: ir.Node) -> int:
    query, keys = node.inputs[0], node.inputs[1]
    assert query is not None and keys is not None and query.shape is not None and keys.shape is not None
    batch, heads, length, _ = query.shape.numpy()
    return int(4 * batch * heads * length * keys.shape.numpy()[2])


def _flattened(x: ir.Value | None, name: str) -> tuple[ir.Node, ir.Node, ir.Node]:
    """[B, H, L, D] -> [B, L, H D]; the transposes that made x cancel out."""
    assert x is not None and x.shape is not None
    batch, heads, length, head_dim = x.shape.numpy()
    shape = _constant([batch, length, heads * head_dim], f"{name}_shape")
    transpose = ir.node("Transpose", [x], {"perm": [0, 2, 1, 3]})
    reshape = ir.node("Reshape", [transpose.outputs[0], shape.outputs[0]])
    transpose.outputs[0].name, reshape.outputs[0].name = f"{name}_tokens", f"{name}_flat"
    return transpose, shape, reshape


def _constant(values: list[int], name: str) -> ir.Node:
    node = ir.node("Constant", [], attributes={"value_ints": values})
    node.outputs[0].name = name
    return node
