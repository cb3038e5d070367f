"""Where the tensors of a chain live: in which buffers, and which of these share memory.

Which buffer a tensor is bound to follows from its role, layer and scale, and from the order in which the graphs run.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from fastvar_trt.runtime.manifest import HALVED_ROLES, GraphSpec, Role, TensorSpec


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lives: a buffer, and of keys and values the first of its rows there."""

    key: str
    first_row: int | None = None


_KEPT = (Role.KEYS, Role.VALUES)
PASSED = (*_KEPT, *HALVED_ROLES)  # from graph to graph; the host neither writes nor reads them
_ALIGNMENT = 256  # bytes, of buffers that share one piece of memory
_F_HAT_BUFFERS = (f"{Role.F_HAT}@0", f"{Role.F_HAT}@1")


class Layout:
    """The places of all tensors of a chain; see `chain`'s first lines."""

    def __init__(self, graphs: Sequence[GraphSpec]) -> None:
        self.inputs: list[dict[str, Place]] = []
        self.outputs: list[dict[str, Place]] = []
        self.num_rows: dict[str, int] = defaultdict(int)  # of buffers of keys and values
        self.by_role: dict[Role, dict[str, TensorSpec]] = defaultdict(dict)  # buffer -> the tensor that it holds
        self.f_hat_after: dict[int, str] = {}  # scale -> buffer
        self.f_hat = _F_HAT_BUFFERS[0]  # what the next graph reads
        self._needed: dict[str, tuple[int, int]] = {}  # buffer that is passed on -> first and last graph
        for graph in graphs:
            self._add(graph)
        self.offsets, self.num_bytes = self.placed(PASSED)  # of buffers that are passed on

    def placed(self, roles: Collection[Role]) -> tuple[dict[str, int], int]:
        """Where the buffers of some roles lie in one piece of memory, and how large it is."""
        specs = {key: spec for role in roles for key, spec in self.by_role[role].items()}
        sizes = {key: dataclasses.replace(spec, shape=self.shape(key, spec)).num_bytes for key, spec in specs.items()}
        return _placed(sizes, self._needed)

    def shape(self, key: str, spec: TensorSpec) -> tuple[int, ...]:
        """Of the buffer behind a tensor; of keys and values [S_total, B2, H, D]."""
        return (self.num_rows[key], *spec.shape[1:]) if spec.role in _KEPT else spec.shape

    def _add(self, graph: GraphSpec) -> None:
        inputs, outputs = {}, {}
        for spec in graph.inputs:
            place = Place(self.f_hat) if spec.role is Role.F_HAT else _place(spec, first_row=0)
            inputs[spec.name] = place
            self.by_role[spec.role].setdefault(place.key, spec)
        for spec in graph.outputs:
            if spec.role is Role.F_HAT:
                # Two buffers in turn: a graph reads the one and writes the other.
                self.f_hat = _F_HAT_BUFFERS[1 - _F_HAT_BUFFERS.index(self.f_hat)]
                place = Place(self.f_hat)
                if graph.scale is not None:
                    self.f_hat_after[graph.scale] = self.f_hat
            else:
                place = _place(spec, first_row=self.num_rows[_place(spec).key])
            outputs[spec.name] = place
            self.by_role[spec.role].setdefault(place.key, spec)
            if place.first_row is not None:
                self.num_rows[place.key] += spec.shape[0]
        now = len(self.inputs)
        for spec, place in zip((*graph.inputs, *graph.outputs), (*inputs.values(), *outputs.values()), strict=True):
            if spec.role in PASSED:
                self._needed[place.key] = self._needed.get(place.key, (now, now))[0], now
        self.inputs.append(inputs)
        self.outputs.append(outputs)


def _placed(sizes: Mapping[str, int], needed: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], int]:
    """Where buffers lie in one piece of memory, and how large it is; the largest are placed first, each at the lowest
    place that none is at which is needed at the same time.

    Args:
        sizes: bytes by name.
        needed: first and last graph by name.
    """
    offsets: dict[str, int] = {}
    for key in sorted(sizes, key=lambda name: -sizes[name]):
        first, last = needed[key]
        beside = sorted(
            (offset, offset + sizes[other])
            for other, offset in offsets.items()
            if needed[other][0] <= last and first <= needed[other][1]
        )
        offsets[key] = 0
        for start, stop in beside:
            if offsets[key] + sizes[key] <= start:
                break
            offsets[key] = max(offsets[key], -(-stop // _ALIGNMENT) * _ALIGNMENT)
    return offsets, max((offset + sizes[key] for key, offset in offsets.items()), default=0)


def kv_bytes(graphs: Sequence[GraphSpec]) -> int:
    """Memory of the keys and values of a chain; what is not needed at the same time shares it."""
    return Layout(graphs).placed(_KEPT)[1]


def passed_bytes(graphs: Sequence[GraphSpec]) -> int:
    """Memory of all that the graphs of a chain hand to each other, keys and values included."""
    return Layout(graphs).num_bytes


def _place(spec: TensorSpec, first_row: int | None = None) -> Place:
    """The buffer behind a tensor: of its layer, of its scale, or shared by name."""
    if spec.role in _KEPT:
        return Place(f"{spec.role}_{spec.layer}x{spec.shape[1]}", first_row)
    return Place(spec.name if spec.scale is None else f"{spec.name}@{spec.scale}")
