"""Large matrices: how a precision writes them into the weights file, and how a graph multiplies with them.

A new format is one class, one entry in `FORMATS`, and a `Precision` that names it. For engines that shall share its
tensors, the operators that read them belong into `passes.promote_weights`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.runtime.precision import DTYPES, Precision
from fastvar_trt.runtime.registry import Registry


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name in `precision.DTYPES`."""
    dtype: torch.dtype = getattr(torch, DTYPES[name].name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in `precision.DTYPES`."""
    return DTYPES[str(dtype).removeprefix("torch.")].name


@dataclasses.dataclass(frozen=True)
class MatrixFormat(abc.ABC):
    """How the matrix of a linear layer is stored and used.

    Attributes:
        name: of the format; dtypes name the formats that are a cast to them.
    """

    name: str
    parts: ClassVar[tuple[str, ...]]  # of one matrix: suffixes of its tensors' names

    def names(self, linear: str) -> tuple[str, ...]:
        """The tensors of a linear layer's matrix."""
        return tuple(f"{linear}.{part}" for part in self.parts)

    @abc.abstractmethod
    def write(self, linear: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `names` of a matrix [out, in]; of meta tensors, too."""

    @abc.abstractmethod
    def product(self, tensors: Mapping[str, Tensor], linear: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` [M, in] in the compute dtype times the matrix, plus a bias [out]: [M, out].

        Two axes, so that the exporter makes one `Gemm` of it, over the weights as they lie in the file.
        """


@dataclasses.dataclass(frozen=True)
class Cast(MatrixFormat):
    """The matrix as it is, in the dtype of the format's name."""

    parts = ("weight",)

    def write(self, linear: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The matrix, cast."""
        yield f"{linear}.weight", weight.to(torch_dtype(self.name))

    def product(self, tensors: Mapping[str, Tensor], linear: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear`."""
        return F.linear(x, tensors[f"{linear}.weight"], bias)


FORMATS: Registry[MatrixFormat] = Registry(*(Cast(name) for name in DTYPES if "float" in name))


def matrix_format(precision: Precision) -> MatrixFormat:
    """The format in which a precision stores its matrices."""
    return FORMATS[precision.stored]


def linear(precision: Precision, tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A linear layer with a bias: `x` [M, in] -> [M, out]."""
    return matrix_format(precision).product(tensors, name, x, tensors[f"{name}.bias"])


def linear_names(precision: Precision, *linears: str) -> tuple[str, ...]:
    """The tensors of linear layers with biases."""
    fmt = matrix_format(precision)
    return tuple(name for linear in linears for name in (*fmt.names(linear), f"{linear}.bias"))


def write_linear(precision: Precision, name: str, weight: Tensor, bias: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a linear layer with a bias."""
    yield from matrix_format(precision).write(name, weight)
    yield f"{name}.bias", bias.to(torch_dtype(precision.computed))
