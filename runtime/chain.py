"""The scale loop: one chain of graphs for one batch size, with every buffer allocated and bound once.

The host only binds buffers between steps. Keys and values live in one buffer per layer, [S_total, B2, H, D]:
a step reads its head as `past` and writes its tail as `new`, so appending copies nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.backends import Backend, BoundGraph, Buffer, CapturedChain, View
from fastvar_trt.runtime.errors import BackendError, BundleError, CancelledError
from fastvar_trt.runtime.manifest import GraphSpec, Manifest, TensorSpec
from fastvar_trt.runtime.plan import ResolvedPlan


@dataclasses.dataclass(frozen=True)
class ChainOutputs:
    """What one run of the chain computed, on the host."""

    tokens: list[NDArray[Any]]  # per step: int32 [B, L] or uint8 [B, L, bits]
    f_hat: NDArray[Any]  # fp32 [B, C_vae, h_K, w_K]
    pixels: NDArray[Any]  # uint8 [B, H, W, 3]
    logits: list[NDArray[Any]] | None  # per step: fp32 [B, L, V] or [B, L, bits, 2]
    image: NDArray[Any] | None  # fp32 [B, 3, H, W]
    timings: dict[str, float]  # graph name -> ms


class Chain:
    """Condition, steps and decoder of one batch size, bound to their buffers on an open backend."""

    def __init__(self, backend: Backend, manifest: Manifest, batch: int) -> None:
        self._backend = backend
        self._graphs = manifest.chain(batch)
        self._plan = manifest.resolved_plan
        self.batch = batch
        for graph in self._graphs:
            backend.load(graph)
        self._buffers: dict[str, Buffer] = {}
        self._bound: dict[frozenset[str], list[BoundGraph]] = {}
        self._captured: dict[frozenset[str], CapturedChain] = {}
        self._decoders: dict[str, BoundGraph] = {}  # of previews, by the buffer that they read
        self._bind(frozenset())

    @property
    def num_buffer_bytes(self) -> int:
        """Memory of all buffers: requests, modulations, keys and values, caches, results, noise."""
        return sum(TensorSpec("", b.shape, b.dtype).num_bytes for b in self._buffers.values())

    def close(self) -> None:
        """Drop what was captured; before the backend is closed."""
        for captured in self._captured.values():
            captured.close()
        self._captured.clear()

    def run(
        self,
        condition: Mapping[str, NDArray[Any]],
        noise: Mapping[int, NDArray[Any]],
        request: Mapping[str, NDArray[Any]],
        optional: Collection[str] = (),
        should_stop: Callable[[], bool] = lambda: False,
        preview_scales: Collection[int] = (),
        on_preview: Callable[[int, NDArray[Any]], None] = lambda scale, pixels: None,
    ) -> ChainOutputs:
        """One batch of images.

        Args:
            condition: inputs of the condition graph, each [B or B2, ...].
            noise: scale -> fp32 [B, L] or [B, L, bits], U[0, 1).
            request: the `REQUEST_INPUTS`: those of `PER_SCALE_REQUEST` [B, number of scales], the others [B].
            optional: those of `OPTIONAL_OUTPUTS` that shall be returned.
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
        for name, array in condition.items():
            backend.upload(self._buffers[name], array)
        for name in names.REQUEST_INPUTS:
            if name in self._buffers:
                backend.upload(self._buffers[name], request[name])
        for scale, uniform in noise.items():
            backend.upload(self._buffers[_at(names.UNIFORM, scale)], uniform)
            for name in names.PER_SCALE_REQUEST:
                if _at(name, scale) in self._buffers:
                    backend.upload(self._buffers[_at(name, scale)], np.ascontiguousarray(request[name][:, scale]))

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
                if graph.scale is not None and graph.scale in preview_scales:
                    on_preview(graph.scale, self._preview(graph.scale))
                    marks.append(backend.mark())  # a preview is no part of the next graph's time
            outputs = self._outputs(wanted, spans)
        finally:
            for mark in marks:
                backend.release(mark)
        if backend.can_capture and captured is None and not preview_scales:
            self._capture(wanted, outputs)
        return outputs

    def _preview(self, scale: int) -> NDArray[Any]:
        """What the decoder makes of `f_hat` after a step: uint8 [B, H, W, 3]."""
        key = _f_hat_after(self._plan.steps, scale)
        if key not in self._decoders:
            decoder = self._graphs[-1]
            inputs = {spec.name: self._buffers[key].view() for spec in decoder.inputs}
            self._decoders[key] = self._backend.bind(
                decoder, inputs, {names.PIXELS: self._buffers[names.PIXELS].view()}
            )
        self._decoders[key].enqueue()
        return self._backend.download(self._buffers[names.PIXELS])

    def _capture(self, wanted: frozenset[str], expected: ChainOutputs) -> None:
        """Capture the chain that has just run, run it so, and compare: the inputs are still in their buffers.

        The results are wiped before: a capture that recorded nothing would otherwise find them there.

        Raises:
            BackendError: the captured chain computed something else.
        """
        captured = self._backend.capture(self._bound[wanted])
        try:
            self._compare_captured(captured, wanted, expected)
        except BaseException:
            captured.close()
            raise
        self._captured[wanted] = captured

    def _compare_captured(self, captured: CapturedChain, wanted: frozenset[str], expected: ChainOutputs) -> None:
        steps = self._plan.steps
        results = [names.PIXELS, *(_f_hat_after(steps, k) for k in steps[:2]), *(_at(names.TOKENS, k) for k in steps)]
        for key in results:
            if key in self._buffers:
                self._backend.upload(self._buffers[key], np.zeros_like(self._backend.download(self._buffers[key])))
        captured.launch()
        got = self._outputs(wanted, list(itertools.pairwise(captured.marks)))
        same = all(np.array_equal(x, y) for x, y in zip(got.tokens, expected.tokens, strict=True))
        if not same or not np.array_equal(got.pixels, expected.pixels):
            raise BackendError(
                f"backend {self._backend.name}: the chain captured as a CUDA graph does not compute what it computes "
                "uncaptured; load with capture=False (--no-capture), and report it"
            )

    def _outputs(self, wanted: frozenset[str], spans: Sequence[tuple[Any, Any]]) -> ChainOutputs:
        backend, steps = self._backend, self._plan.steps

        def per_step(name: str) -> list[NDArray[Any]]:
            return [backend.download(self._buffers[_at(name, k)]) for k in steps]

        return ChainOutputs(
            tokens=per_step(names.TOKENS),
            f_hat=backend.download(self._buffers[_f_hat_after(steps, steps[-1])]),
            pixels=backend.download(self._buffers[names.PIXELS]),
            logits=per_step(names.LOGITS) if names.LOGITS in wanted else None,
            image=backend.download(self._buffers[names.IMAGE]) if names.IMAGE in wanted else None,
            timings={
                graph.name: backend.elapsed_ms(start, stop)
                for graph, (start, stop) in zip(self._graphs, spans, strict=True)
            },
        )

    def _bind(self, optional: frozenset[str]) -> None:
        bound = []
        for graph in self._graphs:
            inputs = {spec.name: self._view(graph, spec) for spec in graph.inputs}
            outputs = {
                spec.name: self._view(graph, spec)
                for spec in graph.outputs
                if spec.name not in names.OPTIONAL_OUTPUTS or spec.name in optional
            }
            bound.append(self._backend.bind(graph, inputs, outputs))
        self._bound[optional] = bound

    def _view(self, graph: GraphSpec, spec: TensorSpec) -> View:
        """The part of a buffer that a graph's tensor is bound to; allocates the buffer at its first use."""
        view = self._key_value_view(graph, spec)
        if view is None:
            key = _buffer_key(graph, spec.name, self._plan)
            if key not in self._buffers:
                self._buffers[key] = self._backend.allocate(spec.shape, spec.dtype)
            view = self._buffers[key].view()
        if not view.matches(spec):
            raise BundleError(
                f"{graph.file}: tensor {spec.name}: got {spec.dtype} {spec.shape}, but the graphs before it give "
                f"{view.buffer.dtype} {view.shape}; export the bundle again"
            )
        return view

    def _key_value_view(self, graph: GraphSpec, spec: TensorSpec) -> View | None:
        kind, _, layer_text = spec.name.rpartition("_")
        if kind not in ("past_k", "past_v", "new_k", "new_v"):
            return None
        assert graph.scale is not None
        layer, scale = int(layer_text), graph.scale
        start = self._plan.num_past(scale, layer)
        key = f"{kind[-1]}_{layer}"
        if key not in self._buffers:
            last = self._plan.steps[-1]  # emits no keys: nothing follows that would read them
            shape = (self._plan.num_past(last, layer), *spec.shape[1:])  # [S_total, B2, H, D]
            self._buffers[key] = self._backend.allocate(shape, spec.dtype)
        buffer = self._buffers[key]
        if kind.startswith("past"):
            return buffer.rows(0, start)
        return buffer.rows(start, self._plan.kept(scale, layer))


def _stop_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise CancelledError("the request was cancelled between two scales")


def _at(name: str, scale: int) -> str:
    return f"{name}@{scale}"


def _f_hat_after(steps: Sequence[int], scale: int) -> str:
    # Two buffers in turn: a step reads the one and writes the other.
    return f"{names.F_HAT}@{steps.index(scale) % 2}"


def _buffer_key(graph: GraphSpec, tensor: str, plan: ResolvedPlan) -> str:
    """The buffer behind a tensor: shared by name, except what every step has its own of."""
    if tensor == names.F_HAT:
        # The decoder reads what the last step wrote, a step what the step before it wrote.
        before = plan.steps[-1] if graph.scale is None else plan.steps[plan.steps.index(graph.scale) - 1]
        return _f_hat_after(plan.steps, before)
    if graph.scale is None:
        return tensor
    if tensor == names.F_HAT_OUT:
        return _f_hat_after(plan.steps, graph.scale)
    if tensor in (names.UNIFORM, names.TOKENS, names.LOGITS, *names.PER_SCALE_REQUEST):
        return _at(tensor, graph.scale)
    return tensor


def plan_batches(count: int, sizes: Collection[int]) -> list[int]:
    """Batch sizes that cover `count` images: the largest that fits, then padding in the smallest that covers."""
    chunks = []
    while count > 0:
        fitting = [size for size in sizes if size <= count]
        size = max(fitting) if fitting else min(sizes)
        chunks.append(size)
        count -= size
    return chunks
