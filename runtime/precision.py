"""Precisions: how matrices are stored, computed and compared; and the one table of dtypes. Standard library only."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping

from fastvar_trt.runtime.registry import Registry


@dataclasses.dataclass(frozen=True)
class DType:
    """One dtype under its names in the formats and libraries of this project.

    Attributes:
        name: in manifests, numpy and torch.
        num_bits: of one element.
        onnx: ONNX's `TensorProto.DataType`.
        safetensors: in the header of a safetensors file.
        host: the numpy dtype that holds it: itself, or the bits of what numpy does not know.
    """

    name: str
    num_bits: int
    onnx: int
    safetensors: str
    host: str

    @property
    def num_bytes(self) -> int:
        """Of one element, where that is whole."""
        return self.num_bits // 8

    def bytes_of(self, count: int) -> int:
        """Of so many elements."""
        return -(-count * self.num_bits // 8)


DTYPES: Mapping[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("float32", 32, 1, "F32", "float32"),
        DType("uint8", 8, 2, "U8", "uint8"),
        DType("int8", 8, 3, "I8", "int8"),
        DType("int32", 32, 6, "I32", "int32"),
        DType("int64", 64, 7, "I64", "int64"),
        DType("bool", 8, 9, "BOOL", "bool"),
        DType("float16", 16, 10, "F16", "float16"),
        DType("bfloat16", 16, 16, "BF16", "uint16"),
        DType("float8_e4m3fn", 8, 17, "F8_E4M3", "uint8"),
        DType("int4", 4, 22, "", "uint8"),  # in graphs only: in a weights file it is uint8, two to a byte
    )
}
DTYPE_OF_ONNX: Mapping[int, str] = {dtype.onnx: dtype.name for dtype in DTYPES.values()}


KV_INTEGER = "int8"
PLAIN = "plain"  # matrices in the dtype that is computed in
_IN_BLOCK = re.compile(r"^(?:(?:drafter|refiner)\.)?(?:blocks\.\d+\.)?")  # of two models in a chain, too


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What may differ between two implementations of one chain by rounding alone.

    Both sides compute in the same precision, in another order of summation.

    Attributes:
        error: largest error, as a share of the tensor's largest magnitude; about ten times what was measured on the
            test models.
        tokens_changed: share of the tokens of one step that may fall otherwise, on the edge between two candidates.
        bits_changed: the same for bits, half of which agree by chance.
        always_changed: tokens or bits that may fall otherwise however few a step has: the first has one token.
        selection_shortfall: share by which the scores of the selected tokens may sum to less than those of the best
            ones: near-ties fall differently.
        positions_swapped: share of the positions of a pruned step whose logits may be off: those that a selection has
            swapped at some layer.
        elements_off: share of the elements of a diffusion's result that may be off: its first step multiplies the
            rounding of the noise that it predicts by thousands.
    """

    error: float
    tokens_changed: float
    bits_changed: float
    always_changed: int
    selection_shortfall: float
    positions_swapped: float
    elements_off: float

    def may_change(self, count: int, *, are_bits: bool) -> float:
        """Share of a step's tokens, or bits, that may differ.

        Args:
            count: how many are compared.
            are_bits: of a model that draws bits.
        """
        limit = self.bits_changed if are_bits else self.tokens_changed
        return max(limit, self.always_changed / max(count, 1))


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a bundle stores, computes and compares.

    fp32 stay, whatever the precision: the residual stream, norms, selection, guidance, sampling and `f_hat`.

    Attributes:
        name: on the command line and in the manifest.
        stored: the format of the large matrices in the weights file: a dtype, or another of
            `export.models.matrix.FORMATS`.
        computed: dtype of matrix products, attention, biases and convolutions.
        kv: dtype in which keys and values are kept: that of `computed`, or `KV_INTEGER` with a scale per layer.
        tolerance: see there.
        matrices: exceptions, the first that fits counts: a pattern (`fnmatch`) of the names of linear layers, without
            `blocks.<layer>.`, and the format of theirs, `PLAIN` for that of `computed`.
    """

    name: str
    stored: str
    computed: str
    kv: str
    tolerance: Tolerance
    matrices: tuple[tuple[str, str], ...] = ()

    @property
    def formats(self) -> frozenset[str]:
        """All that matrices may have."""
        return frozenset({self.stored, *(name for _, name in self.matrices if name != PLAIN)})

    @property
    def is_quantised(self) -> bool:
        """Whether matrices are stored otherwise than as floating-point numbers that are computed with."""
        return self.stored not in DTYPES

    @property
    def rounds_kv(self) -> bool:
        """Whether keys and values are kept as integers."""
        return self.kv == KV_INTEGER

    def with_integer_kv(self) -> Precision:
        """The same with keys and values in 8 bits."""
        return dataclasses.replace(self, kv=KV_INTEGER, tolerance=ROUNDED)

    def format_of(self, linear: str) -> str:
        """The format of the matrix of a linear layer."""
        own = in_block(linear)
        found = next((name for pattern, name in self.matrices if fnmatch.fnmatchcase(own, pattern)), self.stored)
        return self.computed if found == PLAIN else found


def in_block(linear: str) -> str:
    """The name of a linear layer without that of its block, or of its model in a chain: the same for all layers."""
    return _IN_BLOCK.sub("", linear)


def _plain(name: str, dtype: str, tolerance: Tolerance) -> Precision:
    return Precision(name, dtype, dtype, dtype, tolerance)


_HALVES = (
    _plain("fp16", "float16", Tolerance(2e-2, 0.2, 0.02, 2, 1e-2, 0.1, 2e-2)),
    _plain("bf16", "bfloat16", Tolerance(1e-1, 0.5, 0.1, 2, 3e-2, 0.3, 1e-1)),
)
# Activations that lie near a tie are rounded to the other side (for `w8` and `w4`, too, by ONNX Runtime's products).
ROUNDED = Tolerance(3e-1, 0.5, 0.1, 2, 3e-2, 0.3, 3e-1)


def _quantised(stored: str) -> tuple[Precision, ...]:
    """A format of matrices, with everything else in fp32, or in half precision for GPUs."""
    whole = Precision(stored, stored, "float32", "float32", ROUNDED)
    halves = (
        dataclasses.replace(whole, name=f"{stored}-{half.name}", computed=half.computed, kv=half.kv) for half in _HALVES
    )
    return whole, *halves


PRECISIONS: Registry[Precision] = Registry(
    _plain("fp32", "float32", Tolerance(1e-4, 0.01, 0.002, 0, 1e-3, 0.02, 1e-3)),
    *_HALVES,
    *_quantised("w8"),
    *_quantised("w4"),
    *_quantised("w8a8"),
    *_quantised("fp8"),
)
