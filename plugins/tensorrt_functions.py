"""The operators' bodies for TensorRT: other standard operators, which its compiler fuses into fewer kernels.

What they are made for was read from the layer lists of TensorRT for RTX 1.7: it fuses broadcasts into the reductions
behind them and row gathers into what reads them, and has no fast sort of two rows.
"""

from __future__ import annotations

import onnx
import onnxscript
from onnxscript import FLOAT, INT64
from onnxscript import opset21 as op
from onnxscript.values import Opset

from fastvar_trt.plugins import DOMAIN, VERSION
from fastvar_trt.plugins.onnx_functions import with_opset

_fastvar = Opset(DOMAIN, VERSION)

# The bodies below are parsed by onnxscript: no Python beyond operator calls and attribute references.


@onnxscript.script(_fastvar, default_opset=op)
def PivotalTokens(x: FLOAT[...], keep: int) -> INT64[...]:
    """[B, L, C] -> int64 [B, keep]; see `fastvar_trt.plugins.oracle.pivotal_tokens`.

    Selected and put in order by counting: [B, L, L] comparisons that exist inside a kernel only. TensorRT's TopK ends
    at 3840, and takes one launch to select and one to sort.
    """
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    x32 = op.Cast(x, to=1)
    # Over two axes: a mean over one makes TensorRT write all that follows with the tokens innermost.
    mean = op.Squeeze(op.ReduceMean(op.Unsqueeze(x32, axis1), op.Constant(value_ints=[1, 2]), keepdims=1), axis1)
    score = op.ReduceSumSquare(op.Sub(x32, mean), axis2, keepdims=0)
    # Counts and positions are float32, exact below 2^24. A zero made of each token's score is added to its position:
    # TensorRT would keep the comparisons of constants as tables of L x L, and read them in every layer.
    nothing = op.Constant(value_float=0.0)
    number = op.Cast(op.Constant(value_int=keep), to=1)
    positions = op.Cast(op.Range(zero, op.Gather(op.Shape(x), one), one), to=1)
    there = op.Add(positions, op.Min(score, nothing))  # [B, L]
    theirs = op.Unsqueeze(score, axis1)
    own = op.Unsqueeze(score, axis2)
    is_before = op.Less(op.Unsqueeze(there, axis1), op.Unsqueeze(there, axis2))  # [B, i, j]: j < i
    is_better = op.Or(op.Greater(theirs, own), op.And(op.Equal(theirs, own), is_before))
    rank = op.ReduceSum(op.Cast(is_better, to=1), axis2, keepdims=0)  # [B, L]
    is_kept = op.Less(rank, number)
    again = op.Add(positions, op.Min(rank, nothing))
    comes_before = op.Less(op.Unsqueeze(again, axis1), op.Unsqueeze(again, axis2))
    kept_before = op.Cast(op.And(comes_before, op.Unsqueeze(is_kept, axis1)), to=1)
    place = op.Where(is_kept, op.ReduceSum(kept_before, axis2, keepdims=0), number)
    places = op.Cast(op.Range(zero, op.Constant(value_int=keep), one), to=1)
    is_here = op.Cast(op.Equal(op.Unsqueeze(place, axis1), op.Unsqueeze(places, axis1)), to=1)  # [B, K, L]
    indices = op.Cast(op.ReduceSum(op.Mul(is_here, positions), axis2, keepdims=0), to=7)
    return indices


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
    """[B, K, C], int64 [B, K], [B, cached_h*cached_w, C] -> [B, h*w, C]; see `oracle.restore_tokens`.

    For a cache that is not larger than the map: an area then covers one or two cells of an axis, and their mean is that
    of the first and the last. All rows are gathered, so that one kernel restores and adds to the residual stream.
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    minus1 = op.Constant(value_ints=[-1])
    n_h = op.Constant(value_int=h)
    n_w = op.Constant(value_int=w)
    n_ch = op.Constant(value_int=cached_h)
    n_cw = op.Constant(value_int=cached_w)

    i = op.Unsqueeze(op.Range(zero, n_h, one), axis1)
    j = op.Unsqueeze(op.Range(zero, n_w, one), axis0)
    first_h = op.Mul(op.Div(op.Mul(i, n_ch), n_h), n_cw)
    last_h = op.Mul(op.Div(op.Sub(op.Mul(op.Add(i, one), n_ch), one), n_h), n_cw)
    first_w = op.Div(op.Mul(j, n_cw), n_w)
    last_w = op.Div(op.Sub(op.Mul(op.Add(j, one), n_cw), one), n_w)
    half = op.Constant(value_float=0.5)
    left_top = op.Cast(op.Gather(cached, op.Reshape(op.Add(first_h, first_w), minus1), axis=1), to=1)
    left_bottom = op.Cast(op.Gather(cached, op.Reshape(op.Add(last_h, first_w), minus1), axis=1), to=1)
    right_top = op.Cast(op.Gather(cached, op.Reshape(op.Add(first_h, last_w), minus1), axis=1), to=1)
    right_bottom = op.Cast(op.Gather(cached, op.Reshape(op.Add(last_h, last_w), minus1), axis=1), to=1)
    left = op.Mul(op.Add(left_top, left_bottom), half)
    right = op.Mul(op.Add(right_top, right_bottom), half)
    interpolated = op.CastLike(op.Mul(op.Add(left, right), half), computed)

    # Which of the computed rows lies at each position: 1, 2, ..., or 0 for none. In float32, exact below 2^24.
    keep = op.Gather(op.Shape(indices), one)
    positions = op.Unsqueeze(op.Cast(op.Range(zero, op.Mul(n_h, n_w), one), to=1), axis1)
    is_here = op.Cast(op.Equal(positions, op.Unsqueeze(op.Cast(indices, to=1), axis1)), to=1)  # [B, L, K]
    numbers = op.Cast(op.Range(one, op.Add(keep, one), one), to=1)
    number = op.Cast(op.ReduceSum(op.Mul(is_here, numbers), axis2, keepdims=0), to=7)
    batch = op.Gather(op.Shape(computed), zero)
    first_row = op.Unsqueeze(op.Mul(op.Range(zero, batch, one), keep), axis1)
    rows = op.Add(op.Max(op.Sub(number, one), zero), first_row)
    flat = op.Reshape(computed, op.Concat(minus1, op.Shape(computed, start=2), axis=0))
    restored = op.Where(op.Unsqueeze(op.Greater(number, zero), axis2), op.Gather(flat, rows, axis=0), interpolated)
    return restored


@onnxscript.script(_fastvar, default_opset=op)
def GroupNorm(x: FLOAT[...], weight: FLOAT[...], bias: FLOAT[...], num_groups: int, epsilon: float) -> FLOAT[...]:
    """[B, C, h, w], fp32 [C], fp32 [C] -> [B, C, h, w]; see `torch_ops.group_norm`.

    In the map's dtype, with sums in fp32: so it is one kernel with the SiLU behind it.
    """
    normed = op.GroupNormalization(
        x, op.CastLike(weight, x), op.CastLike(bias, x), num_groups=num_groups, epsilon=epsilon
    )
    return normed


@onnxscript.script(_fastvar, default_opset=op)
def UpsampleConv(x: FLOAT[...], weight: FLOAT[...], bias: FLOAT[...]) -> FLOAT[...]:
    """[B, C, h, w], [C', C, 3, 3], [C'] -> [B, C', 2h, 2w]; see `torch_ops.upsample_conv`.

    A doubled map shows a 3x3 kernel four times the same 2x2 cells: one 2x2 convolution for each parity of row and
    column, over sums of the weights, takes 4/9 of the arithmetic.
    """
    w0 = op.Constant(value_ints=[0])
    w1 = op.Constant(value_ints=[1])
    w2 = op.Constant(value_ints=[2])
    w3 = op.Constant(value_ints=[3])
    weight32 = op.Cast(weight, to=1)
    top = op.Slice(weight32, w0, w1, w2)
    middle = op.Slice(weight32, w1, w2, w2)
    bottom = op.Slice(weight32, w2, w3, w2)
    even = op.Concat(top, op.Add(middle, bottom), axis=2)  # rows of the kernel, for even rows of the result
    odd = op.Concat(op.Add(top, middle), bottom, axis=2)

    even_left = op.Slice(even, w0, w1, w3)
    even_middle = op.Slice(even, w1, w2, w3)
    even_right = op.Slice(even, w2, w3, w3)
    odd_left = op.Slice(odd, w0, w1, w3)
    odd_middle = op.Slice(odd, w1, w2, w3)
    odd_right = op.Slice(odd, w2, w3, w3)
    even_even = op.CastLike(op.Concat(even_left, op.Add(even_middle, even_right), axis=3), x)
    even_odd = op.CastLike(op.Concat(op.Add(even_left, even_middle), even_right, axis=3), x)
    odd_even = op.CastLike(op.Concat(odd_left, op.Add(odd_middle, odd_right), axis=3), x)
    odd_odd = op.CastLike(op.Concat(op.Add(odd_left, odd_middle), odd_right, axis=3), x)

    # Interleaved with the channels innermost, as convolutions keep them on a GPU: one kernel then.
    y00 = op.Unsqueeze(op.Transpose(op.Conv(x, even_even, bias, pads=[1, 1, 0, 0]), perm=[0, 2, 3, 1]), w3)
    y01 = op.Unsqueeze(op.Transpose(op.Conv(x, even_odd, bias, pads=[1, 0, 0, 1]), perm=[0, 2, 3, 1]), w3)
    y10 = op.Unsqueeze(op.Transpose(op.Conv(x, odd_even, bias, pads=[0, 1, 1, 0]), perm=[0, 2, 3, 1]), w3)
    y11 = op.Unsqueeze(op.Transpose(op.Conv(x, odd_odd, bias, pads=[0, 0, 1, 1]), perm=[0, 2, 3, 1]), w3)
    even_rows = op.Unsqueeze(op.Concat(y00, y01, axis=3), w2)  # [B, h, 1, w, 2, C']
    odd_rows = op.Unsqueeze(op.Concat(y10, y11, axis=3), w2)
    two = op.Constant(value_ints=[2])
    height = op.Mul(op.Shape(x, start=2, end=3), two)
    width = op.Mul(op.Shape(x, start=3, end=4), two)
    shape = op.Concat(op.Shape(x, start=0, end=1), height, width, op.Constant(value_ints=[-1]), axis=0)
    result = op.Transpose(op.Reshape(op.Concat(even_rows, odd_rows, axis=2), shape), perm=[0, 3, 1, 2])
    return result


def function_protos(opset_version: int, *, restores_smaller: bool = True) -> list[onnx.FunctionProto]:
    """The bodies, importing the standard operators at `opset_version` (21 or later).

    Args:
        opset_version: of the standard operators.
        restores_smaller: whether caches are at most as large as the maps, in both axes; `RestoreTokens` is not
            among the bodies otherwise.
    """
    if opset_version < 21:
        raise ValueError(f"opset_version: got {opset_version}, the bodies need 21 or later")
    return with_opset((PivotalTokens, *[RestoreTokens] * restores_smaller, GroupNorm, UpsampleConv), opset_version)
