"""How a bundle's weights file holds the matrices of its linear layers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from fastvar_trt.runtime.precision import DTYPES, Precision
from fastvar_trt.runtime.weights import TensorPlace

_LAYER = re.compile(r"\.\d+(?=\.|$)")


@dataclasses.dataclass(frozen=True)
class StoredMatrices:
    """Matrices of one name in all layers.

    Attributes:
        name: with `*` for the layers' numbers.
        format: of `export.models.matrix`.
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
        return self.num_weights * DTYPES[precision.computed].num_bytes - self.num_bytes


def quantised_matrices(layout: Mapping[str, TensorPlace], precision: Precision) -> list[StoredMatrices]:
    """Those of few bits, in the order of the file."""
    found: dict[tuple[str, str], StoredMatrices] = {}
    for name, place in layout.items():
        linear, _, part = name.rpartition(".")
        if part != "weight_q":
            continue
        scales = sum(
            layout[own].num_bytes for own in (f"{linear}.weight_scale", f"{linear}.input_scale") if own in layout
        )
        group = _LAYER.sub(".*", linear), precision.format_of(linear)
        known = found.get(group, StoredMatrices(*group, 0, 0, 0))
        found[group] = dataclasses.replace(
            known,
            count=known.count + 1,
            num_weights=known.num_weights + math.prod(place.shape) * (2 if place.dtype == "uint8" else 1),
            num_bytes=known.num_bytes + place.num_bytes + scales,
        )
    return list(found.values())


def bytes_per_weight(layout: Mapping[str, TensorPlace], precision: Precision, prefix: str) -> float:
    """Of the matrices whose names begin so, scales included; that of the compute dtype where none is of few bits."""
    of_few_bits = [m for m in quantised_matrices(layout, precision) if m.name.startswith(prefix)]
    plain = [
        place
        for name, place in layout.items()
        if name.startswith(prefix) and name.endswith(".weight") and len(place.shape) == 2
    ]
    weights = sum(m.num_weights for m in of_few_bits) + sum(math.prod(place.shape) for place in plain)
    stored = sum(m.num_bytes for m in of_few_bits) + sum(place.num_bytes for place in plain)
    return stored / weights if weights else DTYPES[precision.computed].num_bytes
