"""The cache operator as ONNX local functions: bodies of standard operators, inlined by any ONNX runtime.

Only operators that TensorRT's parser takes are used. Everything that depends on the attributes alone (the
interpolation matrices, the flat row numbers) is constant-folded when a session or an engine is built.
"""

from __future__ import annotations

import onnx
import onnxscript
from onnxscript import FLOAT, INT64
from onnxscript import opset18 as op
from onnxscript.values import Opset

from fastvar_trt.plugins import DOMAIN, PIVOTAL_TOKENS, VERSION

_fastvar = Opset(DOMAIN, VERSION)

# The bodies below are parsed by onnxscript: no Python beyond operator calls and attribute references.


@onnxscript.script(_fastvar, default_opset=op)
def PivotalTokens(x: FLOAT[...], keep: int) -> INT64[...]:
    """[B, L, C] -> int64 [B, keep]; see `fastvar_trt.plugins.oracle.pivotal_tokens`."""
    x32 = op.Cast(x, to=1)
    mean = op.ReduceMean(x32, op.Constant(value_ints=[1]), keepdims=1)
    score = op.ReduceSumSquare(op.Sub(x32, mean), op.Constant(value_ints=[2]), keepdims=0)
    count = op.Reshape(op.Constant(value_int=keep), op.Constant(value_ints=[1]))
    # TopK prefers the lower index among equal values, by the ONNX specification.
    best, order = op.TopK(score, count, axis=-1, largest=1, sorted=1)
    # Positions are sorted as float32 (exact below 2^24), because not every backend has an integer TopK.
    position, rank = op.TopK(op.Cast(order, to=1), count, axis=-1, largest=0, sorted=1)
    indices = op.Cast(position, to=7)
    return indices


@onnxscript.script(_fastvar, default_opset=op)
def GatherTokens(x: FLOAT[...], indices: INT64[...]) -> FLOAT[...]:
    """[B, L, C], int64 [B, K] -> [B, K, C]."""
    # Rows of the flattened [B*L, C] are twice as fast to gather as GatherElements, and one kernel on a GPU.
    shape = op.Shape(x)
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    batch = op.Gather(shape, zero)
    length = op.Gather(shape, one)
    channels = op.Shape(x, start=2)
    first_row = op.Unsqueeze(op.Mul(op.Range(zero, batch, one), length), op.Constant(value_ints=[1]))
    rows = op.Add(indices, first_row)
    flat = op.Reshape(x, op.Concat(op.Constant(value_ints=[-1]), channels, axis=0))
    gathered = op.Gather(flat, rows, axis=0)
    return gathered


@onnxscript.script(_fastvar, default_opset=op)
def RestoreTokens(
    computed: FLOAT[...],
    indices: INT64[...],
    cached: FLOAT[...],
    h: int,
    w: int,
    cached_h: int,
    cached_w: int,
) -> FLOAT[...]:
    """[B, K, C], int64 [B, K], [B, cached_h*cached_w, C] -> [B, h*w, C]; see `oracle.restore_tokens`."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    minus1 = op.Constant(value_ints=[-1])
    n_h = op.Constant(value_int=h)
    n_w = op.Constant(value_int=w)
    n_ch = op.Constant(value_int=cached_h)
    n_cw = op.Constant(value_int=cached_w)

    # Area weights: output cell i covers input cells floor(i*in/out) .. ceil((i+1)*in/out) - 1.
    out_h = op.Unsqueeze(op.Range(zero, n_h, one), axis1)
    in_h = op.Unsqueeze(op.Range(zero, n_ch, one), axis0)
    start_h = op.Div(op.Mul(out_h, n_ch), n_h)
    stop_h = op.Div(op.Add(op.Mul(op.Add(out_h, one), n_ch), op.Sub(n_h, one)), n_h)
    inside_h = op.Cast(op.And(op.GreaterOrEqual(in_h, start_h), op.Less(in_h, stop_h)), to=1)
    weights_h = op.Div(inside_h, op.ReduceSum(inside_h, axis1, keepdims=1))
    out_w = op.Unsqueeze(op.Range(zero, n_w, one), axis1)
    in_w = op.Unsqueeze(op.Range(zero, n_cw, one), axis0)
    start_w = op.Div(op.Mul(out_w, n_cw), n_w)
    stop_w = op.Div(op.Add(op.Mul(op.Add(out_w, one), n_cw), op.Sub(n_w, one)), n_w)
    inside_w = op.Cast(op.And(op.GreaterOrEqual(in_w, start_w), op.Less(in_w, stop_w)), to=1)
    weights_w = op.Div(inside_w, op.ReduceSum(inside_w, axis1, keepdims=1))

    batch = op.Shape(computed, start=0, end=1)
    channels = op.Shape(computed, start=2)
    cached_h1 = op.Reshape(n_ch, axis1)
    cached_w1 = op.Reshape(n_cw, axis1)
    grid = op.Reshape(op.Cast(cached, to=1), op.Concat(batch, cached_h1, minus1, axis=0))
    upsampled_h = op.MatMul(weights_h, grid)
    columns = op.Reshape(upsampled_h, op.Concat(minus1, cached_w1, channels, axis=0))
    upsampled = op.MatMul(weights_w, columns)
    flat = op.CastLike(op.Reshape(upsampled, op.Concat(minus1, channels, axis=0)), computed)

    num_tokens = op.Mul(n_h, n_w)
    first_row = op.Unsqueeze(op.Mul(op.Range(zero, op.Squeeze(batch), one), num_tokens), axis1)
    rows = op.Reshape(op.Add(indices, first_row), op.Constant(value_ints=[-1, 1]))
    updates = op.Reshape(computed, op.Concat(minus1, channels, axis=0))
    scattered = op.ScatterND(flat, rows, updates)
    tokens1 = op.Reshape(num_tokens, axis1)
    restored = op.Reshape(scattered, op.Concat(batch, tokens1, channels, axis=0))
    return restored


MAX_TOP_K = 3840  # of TensorRT's TopK


def _pivotal_tokens_in_rounds(keep: int) -> onnx.FunctionProto:
    """`PivotalTokens` for one `keep` above `MAX_TOP_K`: several TopK, each over what the ones before have left.

    The positions are put in order by counting, as a TopK of that many would be needed to sort them.
    """
    make = onnx.helper.make_node
    nodes: list[onnx.NodeProto] = []

    def value(name: str, **attribute: object) -> str:
        nodes.append(make("Constant", [], [name], **attribute))
        return name

    def add(operator: str, inputs: list[str], *outputs: str, **attributes: object) -> None:
        nodes.append(make(operator, inputs, list(outputs), **attributes))

    lowest = onnx.helper.make_tensor("lowest", onnx.TensorProto.FLOAT, [1], [-3e38])
    none = onnx.helper.make_tensor("none", onnx.TensorProto.INT64, [1], [0])
    value("axis1", value_ints=[1])
    value("axis2", value_ints=[2])
    value("axis", value_int=1)
    add("Cast", ["x"], "x32", to=onnx.TensorProto.FLOAT)
    add("ReduceMean", ["x32", "axis1"], "mean", keepdims=1)
    add("Sub", ["x32", "mean"], "deviation")
    add("ReduceSumSquare", ["deviation", "axis2"], "left_0", keepdims=0)  # the scores [B, L]
    rounds = [min(MAX_TOP_K, keep - start) for start in range(0, keep, MAX_TOP_K)]
    for i, count in enumerate(rounds):
        add("TopK", [f"left_{i}", value(f"count_{i}", value_ints=[count])], f"best_{i}", f"order_{i}", axis=-1)
        add("Shape", [f"best_{i}"], f"shape_{i}")
        add("ConstantOfShape", [f"shape_{i}"], f"taken_{i}", value=lowest)
        add("ScatterElements", [f"left_{i}", f"order_{i}", f"taken_{i}"], f"left_{i + 1}", axis=1)
    add("Less", [f"left_{len(rounds)}", value("threshold", value_float=-1e38)], "is_kept")
    # The n-th kept position goes to place n, all others to one place behind, which is cut off.
    add("Cast", ["is_kept"], "ones", to=onnx.TensorProto.FLOAT)
    add("CumSum", ["ones", "axis"], "number")  # exact below 2^24
    add("Sub", ["number", "ones"], "rank")
    add("Where", ["is_kept", "rank", value("behind", value_float=float(keep))], "place_float")
    add("Cast", ["place_float"], "place", to=onnx.TensorProto.INT64)
    add("Shape", ["left_0"], "score_shape")
    add("Gather", ["score_shape", "axis"], "length")
    add("Range", [value("zero", value_int=0), "length", value("one", value_int=1)], "positions_1d")
    add("Expand", ["positions_1d", "score_shape"], "positions")
    # One place more than positions: TensorRT scatters into what is at least as long.
    add("Add", ["score_shape", value("room", value_ints=[0, 1])], "out_shape")
    add("ConstantOfShape", ["out_shape"], "empty", value=none)
    add("ScatterElements", ["empty", "place", "positions"], "scattered", axis=1)
    add("Slice", ["scattered", value("start", value_ints=[0]), value("stop", value_ints=[keep]), "axis1"], "indices")
    opset = onnx.helper.make_opsetid("", 18)
    return onnx.helper.make_function(DOMAIN, PIVOTAL_TOKENS, ["x"], ["indices"], nodes, [opset], attributes=["keep"])


def function_protos(opset_version: int, keep: int = 1) -> list[onnx.FunctionProto]:
    """The three functions, importing the standard operators at `opset_version` (18 or later).

    Args:
        opset_version: of the standard operators.
        keep: the K of the graph. Above `MAX_TOP_K`, `PivotalTokens` holds for this K only.
    """
    if opset_version < 18:
        raise ValueError(f"opset_version: got {opset_version}, the bodies need 18 or later")
    protos = []
    for function in (PivotalTokens, GatherTokens, RestoreTokens):
        proto = function.to_function_proto()
        if proto.name == PIVOTAL_TOKENS and keep > MAX_TOP_K:
            proto = _pivotal_tokens_in_rounds(keep)
        for entry in proto.opset_import:
            if entry.domain == "":
                entry.version = opset_version
        protos.append(proto)
    return protos
