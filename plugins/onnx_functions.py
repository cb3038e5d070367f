"""The operators as ONNX local functions: bodies of standard operators, inlined by any ONNX runtime.

These are the bodies for ONNX Runtime; `cuda_functions` and `tensorrt_functions` have others. Everything that depends
on the attributes alone (the interpolation matrices, the flat row numbers) is constant-folded when a session is built.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnxscript
from onnxscript import FLOAT, INT64
from onnxscript import opset18 as op
from onnxscript.values import Opset

from fastvar_trt.plugins import DOMAIN, VERSION

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


@onnxscript.script(_fastvar, default_opset=op)
def GroupNorm(x: FLOAT[...], weight: FLOAT[...], bias: FLOAT[...], num_groups: int, epsilon: float) -> FLOAT[...]:
    """[B, C, h, w], fp32 [C], fp32 [C] -> [B, C, h, w]; see `torch_ops.group_norm`.

    Spelt out: ONNX Runtime has no `GroupNormalization` on CUDA, and on the CPU it sums a group one by one, which shows
    in large pictures. Rows are summed first here.
    """
    row = op.Constant(value_ints=[3])
    rows = op.Constant(value_ints=[2])
    groups = op.Reshape(op.Constant(value_int=num_groups), op.Constant(value_ints=[1]))
    minus1 = op.Constant(value_ints=[-1])
    x32 = op.Cast(x, to=1)
    batch = op.Shape(x, start=0, end=1)
    grouped = op.Reshape(x32, op.Concat(batch, groups, minus1, op.Shape(x, start=3), axis=0))
    centre = op.ReduceMean(op.ReduceMean(grouped, row, keepdims=1), rows, keepdims=1)
    deviation = op.Sub(grouped, centre)
    variance = op.ReduceMean(op.ReduceMean(op.Mul(deviation, deviation), row, keepdims=1), rows, keepdims=1)
    # By channel, so that the map is read and written once more only.
    by_group = op.Concat(groups, op.Constant(value_ints=[-1, 1]), axis=0)
    scale = op.Div(op.Reshape(weight, by_group), op.Sqrt(op.Add(variance, op.Constant(value_float=epsilon))))
    shift = op.Sub(op.Reshape(bias, by_group), op.Mul(centre, scale))  # both [B, G, C/G, 1]
    by_channel = op.Concat(op.Shape(x, start=0, end=2), op.Constant(value_ints=[1, 1]), axis=0)
    normed = op.CastLike(op.Add(op.Mul(x32, op.Reshape(scale, by_channel)), op.Reshape(shift, by_channel)), x)
    return normed


@onnxscript.script(_fastvar, default_opset=op)
def UpsampleConv(x: FLOAT[...], weight: FLOAT[...], bias: FLOAT[...]) -> FLOAT[...]:
    """[B, C, h, w], [C', C, 3, 3], [C'] -> [B, C', 2h, 2w]; see `torch_ops.upsample_conv`."""
    doubled = op.Resize(
        x,
        None,
        op.Constant(value_floats=[1.0, 1.0, 2.0, 2.0]),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    convolved = op.Conv(doubled, weight, bias, pads=[1, 1, 1, 1])
    return convolved


def function_protos(opset_version: int) -> list[onnx.FunctionProto]:
    """The bodies, importing the standard operators at `opset_version` (18 or later)."""
    if opset_version < 18:
        raise ValueError(f"opset_version: got {opset_version}, the bodies need 18 or later")
    return with_opset((PivotalTokens, GatherTokens, RestoreTokens, GroupNorm, UpsampleConv), opset_version)


def with_opset(functions: Iterable[onnxscript.OnnxFunction], opset_version: int) -> list[onnx.FunctionProto]:
    """The functions, importing the standard operators at that version."""
    protos = [function.to_function_proto() for function in functions]
    for proto in protos:
        for entry in proto.opset_import:
            if entry.domain == "":
                entry.version = opset_version
    return protos
