"""What TensorRT says of the layers of an engine that it has built: the list at the end of its verbose log.

It prints one line a layer, with the shapes of all that is read and written (`ProfilingVerbosity.DETAILED`). The engine
inspector would say the same, but needs a GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from fastvar_trt.plugins import GATHER_TOKENS, PIVOTAL_TOKENS, RESTORE_TOKENS
from fastvar_trt.runtime.engines import EngineLayer
from fastvar_trt.runtime.precision import DTYPES

_LAYER = re.compile(
    r"^Name: (?P<name>\S+), LayerType: (?P<type>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    r"Outputs: (?P<outputs>.*?), TacticName: .*?, StreamId: \d+, Metadata: (?P<metadata>.*)$",
    re.MULTILINE,
)
_TENSOR = re.compile(r"\{ Name: (?P<name>[^,]+), Dimensions: \[(?P<shape>[^\]]*)\],.*?Datatype: (?P<dtype>\w+)")
_SCRATCH = re.compile(r"^Max Scratch Memory: (\d+) bytes", re.MULTILINE)
_DTYPES: Mapping[str, str] = {
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Int32": "int32",
    "Int64": "int64",
    "Int8": "int8",
    "FP8": "float8_e4m3fn",
    "UInt8": "uint8",
    "Bool": "bool",
}
_ATTENTION = re.compile(r"_gemm_mha|_mha_|fmha|flash", re.IGNORECASE)
_CONVOLUTION = re.compile(r"^correlation$|_Corr", re.IGNORECASE)
_SORT = re.compile(r"Topk|Bott|Sort", re.IGNORECASE)
_PRODUCT = re.compile(r"^gemm$|(?-i:Fc)(?=[A-Z_])|matmul", re.IGNORECASE)
# TensorRT names what it fuses by the first letters of its parts.
_COPY = re.compile(r"^__myl_(Resh|Tran|Move|Slic|Conc|Cast|Repl)+_myl")
_GEMM_DEQUANTISING = re.compile(r"CastMul\w*Fc(?=[A-Z_])")  # numbers of few bits become others on their way in
_GEMM_BIAS_GELU = re.compile(r"_FcAdd\w*Tanh")  # the tanh of GELU inside the fusion of a matrix product and its bias

_COMPARISON = re.compile(r"(Eql|Lt|Gtr)\w*Sum_")  # of the bodies that select and put in order by counting
_OPERATIONS_PER_COMPARISON = 6

_Tensors = Mapping[str, tuple[tuple[int, ...], str]]  # name -> shape and dtype


def read_layers(log: str) -> tuple[EngineLayer, ...]:
    """The layers in the order in which they run; empty where the log lists none."""
    return tuple(_layer(match) for match in _LAYER.finditer(log))


def read_activation_bytes(log: str) -> int:
    """The device memory that the engine needs while it runs; 0 where the log does not say."""
    found = _SCRATCH.findall(log)
    return int(found[-1]) if found else 0


def count_kernels(layers: Sequence[EngineLayer]) -> dict[str, int]:
    """Counts by kind, as an `EngineRecord` has them."""
    return {
        "total": len(layers),
        "attention": sum(layer.kind == "attention" for layer in layers),
        "gemm_bias_gelu": sum(bool(_GEMM_BIAS_GELU.search(layer.name)) for layer in layers),
        "gemm_8_bit": sum(layer.kind == "linear" and DTYPES[layer.dtype].num_bits == 8 for layer in layers),
        "gemm_dequantising": sum(bool(_GEMM_DEQUANTISING.search(layer.name)) for layer in layers),
    }


def _layer(match: re.Match[str]) -> EngineLayer:
    constants, outputs = _tensors(match["constants"]), _tensors(match["outputs"])
    read = {**_tensors(match["inputs"]), **constants}
    kind = _kind(match["name"], match["type"], match["metadata"])
    touched = {**read, **outputs}
    for name in outputs.keys() & read.keys():  # written in place, of which a scatter touches some rows only
        touched.pop(name)
    flop, dtype = 0, "float32"
    if kind in ("linear", "attention", "convolution") or _PRODUCT.search(match["type"]):
        flop, dtype = _flop(kind, read, outputs)
    elif kind in ("selection", "restoring") and _COMPARISON.search(match["name"]):
        flop = _comparisons(read, outputs)
    return EngineLayer(match["name"], kind, dtype, sum(_num_bytes(*tensor) for tensor in touched.values()), flop)


def _kind(name: str, layer_type: str, metadata: str) -> str:
    """What a layer is for; the metadata name the nodes that it computes, and the local functions that these are of."""
    if _ATTENTION.search(name):
        return "attention"
    if _CONVOLUTION.search(layer_type) or _CONVOLUTION.search(name):
        return "convolution"
    if _SORT.search(name):
        return "sort"
    of_operator = {
        RESTORE_TOKENS: "restoring",
        GATHER_TOKENS: "gathering",
        PIVOTAL_TOKENS: "selection",
    }
    for operator, kind in of_operator.items():
        if f"({operator})" in metadata:
            return kind
    if _PRODUCT.search(layer_type) or _PRODUCT.search(name):
        return "linear"
    return "copy" if _COPY.search(name) else "other"


def _tensors(text: str) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        match["name"]: (
            tuple(int(size) for size in match["shape"].split(",") if size.strip()),
            _DTYPES.get(match["dtype"], match["dtype"]),
        )
        for match in _TENSOR.finditer(text)
    }


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return DTYPES[dtype].bytes_of(math.prod(shape)) if dtype in DTYPES else math.prod(shape)


def _comparisons(read: _Tensors, outputs: _Tensors) -> int:
    """Operations of a layer that compares all of a row with all of another: [B, M] and [B, N]."""
    written = max((shape for shape, _ in outputs.values()), key=math.prod, default=())
    largest = max((math.prod(shape) for shape, _ in read.values()), default=0)
    return _OPERATIONS_PER_COMPARISON * math.prod(written) * (largest // written[0] if written else 0)


def _flop(kind: str, read: _Tensors, outputs: _Tensors) -> tuple[int, str]:
    """Arithmetic of a layer, and the dtype of its operands."""
    operands = list(read.values())
    written = max((math.prod(shape) for shape, _ in outputs.values()), default=0)
    if kind == "attention" and len(operands) > 1 and operands[1][0]:
        (q, dtype), (k, _) = operands[:2]  # [B * H, L, D], [B * H, D, S]
        return 4 * math.prod(q) * k[-1], dtype
    if kind == "convolution":
        return _convolution_flop([*operands, *outputs.values()], written)
    best, dtype = 0, "float32"
    for a, dtype_a in operands:
        for b, _ in operands:
            if len(a) > 1 and len(b) > 1 and a[-1] == b[-2]:  # [..., M, K] times [..., K, N]
                flop = 2 * max(math.prod(a) * b[-1], math.prod(b) * a[-2])
                if flop == 2 * written * a[-1] and flop > best:
                    best, dtype = flop, dtype_a
    return best, dtype


def _convolution_flop(tensors: Sequence[tuple[tuple[int, ...], str]], written: int) -> tuple[int, str]:
    """Of a map [B, C, h, w] by weights [C', C, kh, kw] to the last tensor; what is added may be among them, too."""
    (read, dtype), *_, (result, _) = [tensor for tensor in tensors if len(tensor[0]) == 4] or [((), ""), ((), "")]
    weights = [shape for shape, _ in tensors if len(shape) == 4 and shape[:2] == (*result[1:2], *read[1:2])]
    if not weights:
        return 0, "float32"
    kernel = min(weights, key=lambda shape: shape[2] * shape[3])
    return 2 * written * math.prod(kernel[1:]), dtype
