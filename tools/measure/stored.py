"""How a bundle's weights file holds the matrices of its linear layers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from fastvar_trt.runtime.precision import DTYPES, Precision
from fastvar_trt.runtime.weights import TensorPlace

_LAYER = re.compile(r"\.\d+(?=\.|$)")


@dataclasses.dataclass(frozen=True)
class StoredMatrices:
    """Matrices of one linear layer, or of those of one name in all layers.

    Attributes:
        name: of the linear layer; with `*` for the layers' numbers.
        format: of `export.models.matrix`, of which dtypes name those that are stored as they are.
        count: how many.
        num_weights: elements of all.
        num_bytes: of all, scales included.
    """

    name: str
    format: str
    count: int
    num_weights: int
    num_bytes: int

    @property
    def bits(self) -> float:
        """Per weight."""
        return 8 * self.num_bytes / self.num_weights

    def num_saved(self, precision: Precision) -> int:
        """Bytes that the dtype which is computed in would take beyond these."""
        if self.format in DTYPES:
            return 0
        return self.num_weights * DTYPES[precision.computed].num_bytes - self.num_bytes


def stored_matrices(layout: Mapping[str, TensorPlace], precision: Precision) -> list[StoredMatrices]:
    """Those of every linear layer by itself, in the order of the file; other matrices, as of embeddings, too."""
    found = []
    for name, place in layout.items():
        linear, _, part = name.rpartition(".")
        num_weights, num_bytes = math.prod(place.shape), place.num_bytes
        if part == "weight_q":
            scales = (f"{linear}.weight_scale", f"{linear}.input_scale")
            num_weights *= 2 if place.dtype == "uint8" else 1
            num_bytes += sum(layout[own].num_bytes for own in scales if own in layout)
            found.append(StoredMatrices(linear, precision.format_of(linear), 1, num_weights, num_bytes))
        elif part == "weight" and len(place.shape) == 2:
            found.append(StoredMatrices(linear, place.dtype, 1, num_weights, num_bytes))
    return found


def of_all_layers(matrices: Iterable[StoredMatrices]) -> list[StoredMatrices]:
    """Added up over layers."""
    found: dict[tuple[str, str], StoredMatrices] = {}
    for own in matrices:
        group = _LAYER.sub(".*", own.name), own.format
        known = found.get(group, StoredMatrices(*group, 0, 0, 0))
        found[group] = StoredMatrices(
            *group,
            known.count + own.count,
            known.num_weights + own.num_weights,
            known.num_bytes + own.num_bytes,
        )
    return list(found.values())
