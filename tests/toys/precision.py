"""Matrices in 8 bits with a scale per row, computed in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_trt.export.models.matrix import MatrixFormat
from fastvar_trt.runtime.precision import PRECISIONS, Precision


@dataclasses.dataclass(frozen=True)
class Int8Rows(MatrixFormat):
    """`q * scale`, rounded to the nearest."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("weight_q", "weight_scale")

    def write(self, linear: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 127
        yield f"{linear}.weight_q", (weight.float() / scale).round().to(torch.int8)
        yield f"{linear}.weight_scale", scale

    def product(self, tensors: Mapping[str, Tensor], linear: str, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = tensors[f"{linear}.weight_q"].to(x.dtype) * tensors[f"{linear}.weight_scale"]
        return F.linear(x, weight, bias)


FORMAT = Int8Rows("int8_rows")
TOY8 = Precision("toy8", FORMAT.name, "float32", "float32", PRECISIONS["fp32"].tolerance)
