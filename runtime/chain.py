"""One chain of graphs for one batch size, with every buffer allocated and bound once.

The host only binds buffers between graphs. Keys and values live in one buffer per layer, [S_total, B2, H, D]: a graph
reads its head and writes its tail, so appending copies nothing. Steps without guidance write a second one,
[S, B, H, D]; of what else was written for both halves they read the first rows, which are the conditional half. Which
buffer a tensor is bound to follows from its role, layer and scale, and from the order in which the graphs run. All that
graphs hand to each other lies in one piece of memory, which all chains share, as one runs at a time; what is not needed
at the same time, as the keys and values of a drafter and of its refiner, lies in the same place.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.backends import Backend, BoundGraph, BoundOnDemand, Buffer, CapturedChain, View
from fastvar_trt.runtime.errors import BackendError, BundleError, CancelledError
from fastvar_trt.runtime.layout import Layout, Place
from fastvar_trt.runtime.manifest import DECODER, HALVED_ROLES, NOISES, OPTIONAL_ROLES, GraphSpec, Role, TensorSpec
from fastvar_trt.runtime.precision import Tolerance
from fastvar_trt.runtime.request import BatchInputs

_LOGGER = logging.getLogger("fastvar_trt.runtime")
_MAX_LEVELS = 1.0  # of 256, by which pictures of the same tokens may differ in the mean


def _no_token(dtype: np.dtype[Any]) -> int:
    """No token and no bit has this value."""
    return int(np.iinfo(dtype).max)


# What results are overwritten with before a captured run: values that it cannot compute, but for black pictures.
_WIPED: Mapping[Role, Callable[[np.dtype[Any]], float]] = {
    Role.TOKENS: _no_token,
    Role.F_HAT: lambda dtype: float("nan"),
    Role.PIXELS: lambda dtype: 0,
}


@dataclasses.dataclass(frozen=True)
class ChainOutputs:
    """What one run of the chain computed, on the host."""

    tokens: list[NDArray[Any]]  # per step: int32 [B, L] or uint8 [B, L, bits]
    f_hat: NDArray[Any]  # fp32 [B, C_vae, h_K, w_K]
    pixels: NDArray[Any]  # uint8 [B, H, W, 3]
    finite: NDArray[Any]  # bool [B], whether an image's logits are, at every step
    logits: list[NDArray[Any]] | None  # per step: fp32 [B, L, V] or [B, L, bits, 2]
    image: NDArray[Any] | None  # fp32 [B, 3, H, W]
    timings: dict[str, float]  # graph name -> ms


def memory_of(backend: Backend, chains: Iterable[Sequence[GraphSpec]]) -> Buffer:
    """One piece of memory for any of several chains, of which one runs at a time; on an open backend."""
    return backend.allocate((max(_shared_bytes(backend, graphs) for graphs in chains),), "uint8")


def _shared_bytes(backend: Backend, graphs: Sequence[GraphSpec]) -> int:
    # The decoder runs when nothing is handed on any more, and may have that memory.
    lent = max((backend.num_activation_bytes(graph) for graph in graphs if backend.is_on_demand(graph)), default=0)
    return max(Layout(graphs).num_bytes, lent)


class Chain:
    """The graphs of one batch size, in the order in which they run, bound to their buffers on an open backend.

    Args:
        backend: an open one.
        graphs: in that order.
        tolerance: of a captured run against one that is not.
        memory: that `memory_of` gave for this chain, and maybe others.
    """

    def __init__(self, backend: Backend, graphs: Sequence[GraphSpec], tolerance: Tolerance, memory: Buffer) -> None:
        self._backend = backend
        self._tolerance = tolerance
        self._graphs = tuple(graphs)
        self._layout = Layout(graphs)
        for graph in graphs:
            if not backend.is_on_demand(graph):
                backend.load(graph)
        self._memory = memory
        self._buffers: dict[str, Buffer] = {}
        self._bound: dict[frozenset[Role], list[BoundGraph]] = {}
        self._captured: dict[frozenset[Role], CapturedChain] = {}
        self._uncaptured: dict[frozenset[Role], str] = {}  # why a chain is not captured
        self._decoders: dict[str, BoundGraph] = {}  # of previews, by the buffer that they read
        try:
            self._bind(frozenset())
        except BaseException:  # the next request may have more room
            for buffer in self._own_buffers():
                backend.free(buffer)
            raise

    @property
    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every buffer: requests, modulations, keys and values, caches, results, noise."""
        return {key: buffer.shape for key, buffer in self._buffers.items()}

    @property
    def capture_problems(self) -> tuple[str, ...]:
        """Why runs are not launched as one, where the backend was asked to; empty where they are."""
        return tuple(dict.fromkeys(self._uncaptured.values()))

    @property
    def num_buffer_bytes(self) -> int:
        """Memory of all buffers but that which chains share."""
        return sum(buffer.num_bytes for buffer in self._own_buffers())

    def _own_buffers(self) -> Iterator[Buffer]:
        return (buffer for key, buffer in self._buffers.items() if key not in self._layout.offsets)

    def close(self) -> None:
        """Drop what was captured; before the backend is closed."""
        for captured in self._captured.values():
            captured.close()
        self._captured.clear()

    def run(
        self,
        inputs: BatchInputs,
        optional: Collection[Role] = (),
        should_stop: Callable[[], bool] = lambda: False,
        preview_scales: Collection[int] = (),
        on_preview: Callable[[int, NDArray[Any]], None] = lambda scale, pixels: None,
    ) -> ChainOutputs:
        """One batch of images.

        Args:
            inputs: of as many images as the batch has.
            optional: those of `OPTIONAL_ROLES` that shall be returned.
            should_stop: asked before every graph, or before the launch of a captured chain.
            preview_scales: steps after which the decoder runs on what there is; such a run is not captured.
            on_preview: called with each of them and its uint8 [B, H, W, 3].

        Raises:
            CancelledError: `should_stop` said so.
        """
        backend = self._backend
        backend.activate()
        wanted = frozenset(optional)
        if wanted not in self._bound:
            self._bind(wanted)
        self._upload(inputs)
        captured = self._captured.get(wanted)
        if captured is not None and not preview_scales:
            _stop_if(should_stop)
            captured.launch()
            return self._outputs(wanted, list(itertools.pairwise(captured.marks)))
        marks: list[Any] = []
        spans: list[tuple[Any, Any]] = []
        try:
            marks.append(backend.mark())
            for graph, bound in zip(self._graphs, self._bound[wanted], strict=True):
                _stop_if(should_stop)
                bound.enqueue()
                marks.append(backend.mark())
                spans.append((marks[-2], marks[-1]))
                if graph.scale is not None and graph.scale in preview_scales and graph.output(Role.F_HAT) is not None:
                    on_preview(graph.scale, self._preview(graph.scale))
                    marks.append(backend.mark())  # a preview is no part of the next graph's time
            outputs = self._outputs(wanted, spans)
        finally:
            for mark in marks:
                backend.release(mark)
        backend.keep_compiled()
        if backend.can_capture and captured is None and wanted not in self._uncaptured and not preview_scales:
            try:
                self._capture(wanted, outputs)
            except Exception as error:  # the images are computed: they are not lost for it
                self._uncaptured[wanted] = str(error)
                _LOGGER.warning("%s; the chain runs uncaptured", error)
        return outputs

    def _upload(self, inputs: BatchInputs) -> None:
        for key, spec in self._layout.by_role[Role.CONDITION].items():
            self._backend.upload(self._buffers[key], inputs.condition[spec.name])
        for key, spec in self._layout.by_role[Role.REQUEST].items():
            values = inputs.request[spec.name]
            of_scale = values if spec.scale is None else np.ascontiguousarray(values[:, spec.scale])
            self._backend.upload(self._buffers[key], of_scale)
        for key, spec in self._layout.by_role[Role.GIVEN].items():
            self._backend.upload(self._buffers[key], inputs.given[spec.name])
        for role in NOISES:
            for key, spec in self._layout.by_role[role].items():
                assert spec.scale is not None
                self._backend.upload(self._buffers[key], inputs.noise[role, spec.scale])

    def _preview(self, scale: int) -> NDArray[Any]:
        """What the decoder makes of `f_hat` after a step: uint8 [B, H, W, 3]."""
        key = self._layout.f_hat_after[scale]
        pixels = self._buffer_of(Role.PIXELS)
        if key not in self._decoders:
            index, decoder = next((i, graph) for i, graph in enumerate(self._graphs) if graph.kind == DECODER)
            inputs = {}
            for spec in decoder.inputs:
                place = Place(key) if spec.role is Role.F_HAT else self._layout.inputs[index][spec.name]
                inputs[spec.name] = self._view(decoder, spec, place)
            outputs = {spec.name: pixels.view() for spec in decoder.outputs if spec.role is Role.PIXELS}
            self._decoders[key] = self._bound_graph(decoder, inputs, outputs, None)
        self._decoders[key].enqueue()
        return self._backend.download(pixels)

    def _capture(self, wanted: frozenset[Role], expected: ChainOutputs) -> None:
        """Capture the chain that has just run, run it so, and compare: the inputs are still in their buffers.

        The results are wiped before: a capture that recorded nothing would otherwise find them there.

        Raises:
            BackendError: it cannot be captured, or computed something else then.
        """
        captured = self._backend.capture(self._bound[wanted])
        try:
            self._compare_captured(captured, wanted, expected)
        except BaseException:
            captured.close()
            raise
        self._captured[wanted] = captured

    def _compare_captured(self, captured: CapturedChain, wanted: frozenset[Role], expected: ChainOutputs) -> None:
        for role, wiped in _WIPED.items():
            for key in self._layout.by_role[role]:
                there = self._backend.download(self._buffers[key])
                self._backend.upload(self._buffers[key], np.full_like(there, wiped(there.dtype)))
        captured.launch()
        got = self._outputs(wanted, list(itertools.pairwise(captured.marks)))
        if problem := _unwritten(got) or _difference(got, expected, self._tolerance):
            raise BackendError(
                f"backend {self._backend.name}: the chain captured as a CUDA graph does not compute what it computes "
                f"uncaptured ({problem}); load with capture=False (--no-capture), and report it"
            )

    def _outputs(self, wanted: frozenset[Role], spans: Sequence[tuple[Any, Any]]) -> ChainOutputs:
        download, layout = self._backend.download, self._layout

        def per_step(role: Role) -> list[NDArray[Any]]:
            return [download(self._buffers[key]) for key in layout.by_role[role]]

        return ChainOutputs(
            tokens=per_step(Role.TOKENS),
            f_hat=download(self._buffers[layout.f_hat]),
            pixels=download(self._buffer_of(Role.PIXELS)),
            finite=np.all(per_step(Role.FINITE), axis=0),
            logits=per_step(Role.LOGITS) if Role.LOGITS in wanted else None,
            image=download(self._buffer_of(Role.IMAGE)) if Role.IMAGE in wanted else None,
            timings={
                graph.name: self._backend.elapsed_ms(start, stop)
                for graph, (start, stop) in zip(self._graphs, spans, strict=True)
            },
        )

    def _buffer_of(self, role: Role) -> Buffer:
        """The one buffer of a role."""
        (key,) = self._layout.by_role[role]
        return self._buffers[key]

    def _bind(self, optional: frozenset[Role]) -> None:
        bound = []
        for graph, inputs, outputs in zip(self._graphs, self._layout.inputs, self._layout.outputs, strict=True):
            read = {spec.name: self._view(graph, spec, inputs[spec.name]) for spec in graph.inputs}
            written = {
                spec.name: self._view(graph, spec, outputs[spec.name])
                for spec in graph.outputs
                if spec.role not in OPTIONAL_ROLES or spec.role in optional
            }
            bound.append(self._bound_graph(graph, read, written, self._memory))
        self._bound[optional] = bound

    def _bound_graph(
        self, graph: GraphSpec, read: Mapping[str, View], written: Mapping[str, View], spare: Buffer | None
    ) -> BoundGraph:
        if self._backend.is_on_demand(graph):
            return BoundOnDemand(self._backend, graph, read, written, spare)
        return self._backend.bind(graph, read, written)

    def _buffer(self, place: Place, spec: TensorSpec) -> Buffer:
        """The buffer behind a tensor; allocated at its first use."""
        if place.key not in self._buffers:
            if place.key in self._layout.offsets:
                shape = self._layout.shape(place.key, spec)
                buffer = self._memory.part(self._layout.offsets[place.key], shape, spec.dtype)
            else:
                buffer = self._backend.allocate(spec.shape, spec.dtype)
            self._buffers[place.key] = buffer
        return self._buffers[place.key]

    def _view(self, graph: GraphSpec, spec: TensorSpec, place: Place) -> View:
        """The part of a buffer that a graph's tensor is bound to."""
        buffer = self._buffer(place, spec)
        is_part = place.first_row is not None or (spec.role in HALVED_ROLES and spec.shape[0] < buffer.shape[0])
        view = buffer.rows(place.first_row or 0, spec.shape[0]) if is_part else buffer.view()
        if not view.matches(spec):
            raise BundleError(
                f"{graph.file}: tensor {spec.name}: got {spec.dtype} {spec.shape}, but the graphs before it give "
                f"{view.buffer.dtype} {view.shape}; export the bundle again"
            )
        return view


def _unwritten(got: ChainOutputs) -> str:
    """What a run has left as it was wiped; empty where nothing."""
    for step, tokens in enumerate(got.tokens):
        if (tokens == _no_token(tokens.dtype)).any():
            return f"step {step} wrote no tokens"
    if np.isnan(got.f_hat).all():
        return "f_hat was not written"
    return "" if got.pixels.any() else "no pixels were written"


def _difference(got: ChainOutputs, expected: ChainOutputs, tolerance: Tolerance) -> str:
    """How two runs of one chain on the same inputs differ beyond rounding; empty where they do not."""
    problem, all_equal = compare_tokens(got.tokens, expected.tokens, tolerance)
    if problem or not all_equal:
        return problem
    off = np.abs(got.pixels.astype(np.int16) - expected.pixels).mean()
    return f"pixels differ by {off:.1f} levels in the mean" if off > _MAX_LEVELS else ""


def compare_tokens(
    got: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]], tolerance: Tolerance
) -> tuple[str, bool]:
    """Two draws of the same noise, step by step.

    A token that differs changes everything after it, so the first step with such tokens is judged.

    Args:
        got, expected: per step int32 [B, L] or uint8 [B, L, bits].
        tolerance: what rounding may change.

    Returns:
        what is wrong, or nothing, and whether all tokens are the same.
    """
    for step, (x, y) in enumerate(zip(got, expected, strict=True)):
        changed = float(np.mean(x != y))
        if changed:
            too_many = changed > tolerance.may_change(x.size, are_bits=x.ndim > 2)
            return f"{changed:.1%} of the tokens of step {step} differ" * too_many, False
    return "", True


def _stop_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise CancelledError("the request was cancelled between two scales")


def plan_batches(count: int, sizes: Collection[int]) -> list[int]:
    """Batch sizes that cover `count` images: the largest that fits, then padding in the smallest that covers."""
    chunks = []
    while count > 0:
        fitting = [size for size in sizes if size <= count]
        size = max(fitting) if fitting else min(sizes)
        chunks.append(size)
        count -= size
    return chunks
