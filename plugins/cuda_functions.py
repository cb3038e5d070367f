"""The operators' bodies for ONNX Runtime on CUDA, where they differ from those for the CPU."""

from __future__ import annotations

import onnx
import onnxscript
from onnxscript import FLOAT
from onnxscript import opset18 as op
from onnxscript.values import Opset

from fastvar_trt.plugins import DOMAIN, VERSION
from fastvar_trt.plugins.onnx_functions import with_opset

_fastvar = Opset(DOMAIN, VERSION)


@onnxscript.script(_fastvar, default_opset=op)
def UpsampleConv(x: FLOAT[...], weight: FLOAT[...], bias: FLOAT[...]) -> FLOAT[...]:
    """[B, C, h, w], [C', C, 3, 3], [C'] -> [B, C', 2h, 2w]; see `torch_ops.upsample_conv`.

    Without Resize, which ONNX Runtime does not have for bfloat16 on CUDA; on the CPU it is faster.
    """
    two = op.Constant(value_ints=[2])
    one = op.Constant(value_ints=[1])
    planes = op.Shape(x, start=0, end=2)
    height = op.Shape(x, start=2, end=3)
    width = op.Shape(x, start=3, end=4)
    cells = op.Reshape(x, op.Concat(planes, height, one, width, one, axis=0))
    doubled = op.Expand(cells, op.Concat(planes, height, two, width, two, axis=0))
    upsampled = op.Reshape(doubled, op.Concat(planes, op.Mul(height, two), op.Mul(width, two), axis=0))
    convolved = op.Conv(upsampled, weight, bias, pads=[1, 1, 1, 1])
    return convolved


def function_protos(opset_version: int) -> list[onnx.FunctionProto]:
    """The bodies, importing the standard operators at `opset_version` (18 or later)."""
    return with_opset((UpsampleConv,), opset_version)
