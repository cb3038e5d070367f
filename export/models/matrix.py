"""Large matrices: how a precision writes them into the weights file, and how a graph multiplies with them.

A new format is one class, one entry in `FORMATS`, and a `Precision` that names it. For engines that shall share its
tensors, the operators that read them belong into `passes.promote_weights`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.precision import DTYPES, PLAIN, Precision, in_block
from fastvar_trt.runtime.registry import Registry

INPUT_SCALE = ".input_scale"  # behind the name of what is rounded
Observer = Callable[[str, Mapping[str, Tensor], Tensor], None]  # a linear layer, its tensors, its input [M, in]
_observers: list[Observer] = []


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name in `precision.DTYPES`."""
    dtype: torch.dtype = getattr(torch, DTYPES[name].name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in `precision.DTYPES`."""
    return DTYPES[str(dtype).removeprefix("torch.")].name


@contextlib.contextmanager
def observing(observe: Observer) -> Iterator[None]:
    """While it lasts, every product tells what it multiplies, and rounds no activations."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


def _observed(name: str, tensors: Mapping[str, Tensor], x: Tensor) -> bool:
    """Tell `observing` what a layer takes; whether anybody listens."""
    for observer in _observers:
        observer(name, tensors, x)
    return bool(_observers)


@dataclasses.dataclass(frozen=True)
class MatrixFormat(abc.ABC):
    """How the matrix of a linear layer is stored and used.

    Attributes:
        name: of the format; dtypes name the formats that are a cast to them.
    """

    name: str

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Of one matrix: suffixes of its tensors' names, that of its numbers first."""

    def names(self, linear: str) -> tuple[str, ...]:
        """The tensors of a linear layer's matrix."""
        return tuple(f"{linear}.{part}" for part in self.parts)

    @abc.abstractmethod
    def write(self, linear: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `names` of a matrix [out, in]; of meta tensors, too.

        Raises:
            ExportError: the format cannot hold it.
        """

    @abc.abstractmethod
    def product(self, tensors: Mapping[str, Tensor], linear: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` [M, in] in the compute dtype times the matrix, plus a bias [out]: [M, out].

        Two axes, so that the exporter makes one `Gemm` of it, over the weights as they lie in the file.
        """


@dataclasses.dataclass(frozen=True)
class Cast(MatrixFormat):
    """The matrix as it is, in the dtype of the format's name."""

    @property
    def parts(self) -> tuple[str, ...]:
        """One tensor."""
        return ("weight",)

    def write(self, linear: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The matrix, cast."""
        yield f"{linear}.weight", weight.to(torch_dtype(self.name))

    def product(self, tensors: Mapping[str, Tensor], linear: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear`."""
        _observed(linear, tensors, x)
        return F.linear(x, tensors[f"{linear}.weight"], bias)


@dataclasses.dataclass(frozen=True)
class Quantised(MatrixFormat):
    """Few bits and scales; where activations have a scale, too, their products are of such numbers.

    In a graph a matrix is ONNX's `DequantizeLinear` of a tensor [in, out], which TensorRT fuses into the product
    without a transpose, and activations are its `QuantizeLinear` and `DequantizeLinear`: the standard's form, which any
    runtime computes, and builders replace by what their target multiplies best.

    Attributes:
        dtype: of the numbers: int8, int4 or float8_e4m3fn.
        block: inputs that share a scale; 0: all of an output.
        per_output: whether outputs have scales of their own.
        rounds_inputs: whether activations are of the same dtype, with one scale for the layer (`export.calibration`).
    """

    dtype: str
    block: int = 0
    per_output: bool = True
    rounds_inputs: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Numbers, scales, and the scale of the activations."""
        return ("weight_q", "weight_scale", *(("input_scale",) if self.rounds_inputs else ()))

    def write(self, linear: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The matrix, rounded to the nearest; the activations' scale is one that cannot be computed with.

        Tensors: weight_q [in, out], of int4 uint8 [in, out / 2] with the first of two in the lower half; weight_scale
        fp32 [out], or [in / block, out], or []; input_scale fp32 [].
        """
        num_out, num_in = weight.shape
        block = self.block or num_in
        if num_in % block or (self.dtype == "int4" and num_out % 2):
            raise ExportError(
                f"{linear}: a matrix of {num_out} x {num_in} is not of whole blocks of {block}, which {self.name} "
                f"needs; leave it out with --matrix {in_block(linear)}={PLAIN}"
            )
        values = weight.float().T.reshape(num_in // block, block, num_out)
        axes = (1,) if self.per_output else (0, 1, 2)
        scale = values.abs().amax(dim=axes, keepdim=True).clamp_min(1e-12) / largest_number(self.dtype)
        if not scale.is_meta and not bool(torch.isfinite(scale).all()):
            raise ExportError(f"{linear}: the matrix holds numbers that are not finite; the checkpoint is damaged")
        yield f"{linear}.weight_q", _rounded(values / scale, self.dtype).reshape(num_in, -1)
        yield f"{linear}.weight_scale", scale.reshape(self._scale_shape(num_in, num_out)).contiguous()
        if self.rounds_inputs:
            yield f"{linear}{INPUT_SCALE}", unknown_scale()

    def product(self, tensors: Mapping[str, Tensor], linear: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """`torch.addmm` over the dequantised matrix."""
        weight = self._matrix(tensors, linear).to(x.dtype)  # [in, out]
        if not _observed(linear, tensors, x) and self.rounds_inputs:
            rounded = _quantised(x.float(), tensors[f"{linear}{INPUT_SCALE}"], self.dtype)
            x = restored_by(tensors, linear, rounded, self.dtype).to(x.dtype)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def _matrix(self, tensors: Mapping[str, Tensor], linear: str) -> Tensor:
        """fp32 [in, out]."""
        q, scale = tensors[f"{linear}.weight_q"], tensors[f"{linear}.weight_scale"]
        num_out = q.shape[1] * (2 if self.dtype == "int4" else 1)
        return _dequantised(q, scale, (q.shape[0], num_out), self.dtype)

    def _scale_shape(self, num_in: int, num_out: int) -> tuple[int, ...]:
        if not self.per_output:
            return ()
        return (num_in // self.block, num_out) if self.block else (num_out,)


def largest_number(dtype: str) -> float:
    """The largest number that is used: of integers as far as the negative ones reach."""
    return {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0}[dtype]


def _rounded(values: Tensor, dtype: str) -> Tensor:
    """Numbers that have been divided by their scale: to the nearest, ties to even, as ONNX's `QuantizeLinear`."""
    if dtype == "float8_e4m3fn":
        return values.clamp(-448, 448).to(torch.float8_e4m3fn)
    if dtype == "int8":
        return values.round().clamp(-128, 127).to(torch.int8)
    nibbles = values.round().clamp(-8, 7).to(torch.int8).to(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _quantised(x: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """ONNX's `QuantizeLinear` of fp32 with one scale."""
    if not torch.onnx.is_in_onnx_export():
        return _rounded(x / scale, dtype)
    zero = torch.zeros((), dtype=torch.int8).to(torch_dtype(dtype))
    return torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=zero.dtype, shape=tuple(x.shape))


def _dequantised(q: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: str) -> Tensor:
    """ONNX's `DequantizeLinear`, fp32: q with a scale, one per column, or one per block of rows and column."""
    if torch.onnx.is_in_onnx_export():
        attributes: dict[str, Any] = {} if scale.ndim == 0 else {"axis": 1}
        if scale.ndim == 2:
            attributes = {"axis": 0, "block_size": shape[0] // scale.shape[0]}
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (q, scale), attributes, dtype=torch.float32, shape=tuple(shape)
        )
    if dtype == "int4":
        nibbles = torch.stack([q & 15, q >> 4], dim=-1).view(shape).to(torch.int8)
        q = nibbles - 16 * (nibbles > 7).to(torch.int8)
    if scale.ndim == 2:
        return (q.view(len(scale), -1, shape[1]).float() * scale[:, None]).view(shape)
    return q.float() * scale


def unknown_scale() -> Tensor:
    """The scale of activations before `export.calibration`: one that cannot be computed with."""
    return torch.full((), torch.nan)


def rounded_by(tensors: Mapping[str, Tensor], name: str, x: Tensor, dtype: str) -> Tensor:
    """Activations as numbers of few bits, by the scale of that name; as they are while `observing`."""
    return x if _observed(name, tensors, x) else _quantised(x.float(), tensors[f"{name}{INPUT_SCALE}"], dtype)


def restored_by(tensors: Mapping[str, Tensor], name: str, q: Tensor, dtype: str) -> Tensor:
    """fp32 of what `rounded_by` made."""
    return _dequantised(q, tensors[f"{name}{INPUT_SCALE}"], tuple(q.shape), dtype)


FORMATS: Registry[MatrixFormat] = Registry(
    *(Cast(name) for name in ("float32", "float16", "bfloat16")),
    Quantised("w8", "int8"),
    Quantised("w4", "int4", block=64),  # the smallest for which TensorRT has a fused product
    Quantised("w8a8", "int8", rounds_inputs=True),
    Quantised("fp8", "float8_e4m3fn", per_output=False, rounds_inputs=True),
)


def check_exceptions(matrices: Iterable[tuple[str, str]]) -> None:
    """That the formats of `Precision.matrices` are some.

    Raises:
        ExportError: one is not.
    """
    formats = [PLAIN, *(name for name, fmt in FORMATS.items() if not isinstance(fmt, Cast))]
    for pattern, name in matrices:
        if name not in formats:
            raise ExportError(f"matrix {pattern}: got {name!r}, expected one of {', '.join(formats)}")


def rounds_activations(precision: Precision) -> bool:
    """Whether anything has a scale that is found by drawing."""
    parts = (part for name in precision.formats for part in FORMATS[name].parts)
    return precision.rounds_kv or any(f".{part}" == INPUT_SCALE for part in parts)


def matrix_format(precision: Precision, linear: str) -> MatrixFormat:
    """The format in which a precision stores the matrix of a linear layer."""
    return FORMATS[precision.format_of(linear)]


def product(
    precision: Precision, tensors: Mapping[str, Tensor], name: str, x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A linear layer: `x` [M, in] -> [M, out]."""
    return matrix_format(precision, name).product(tensors, name, x, bias)


def linear(precision: Precision, tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A linear layer with its bias: `x` [M, in] -> [M, out]."""
    return product(precision, tensors, name, x, tensors[f"{name}.bias"])


def matrix_names(precision: Precision, *linears: str) -> tuple[str, ...]:
    """The tensors of linear layers without biases."""
    return tuple(name for linear in linears for name in matrix_format(precision, linear).names(linear))


def linear_names(precision: Precision, *linears: str) -> tuple[str, ...]:
    """The tensors of linear layers with biases."""
    return tuple(name for linear in linears for name in (*matrix_names(precision, linear), f"{linear}.bias"))


def write_matrix(precision: Precision, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a linear layer without a bias."""
    return matrix_format(precision, name).write(name, weight)


def write_linear(precision: Precision, name: str, weight: Tensor, bias: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a linear layer with a bias."""
    yield from write_matrix(precision, name, weight)
    yield f"{name}.bias", bias.to(torch_dtype(precision.computed))
