"""`Service`: a bounded queue in front of a pipeline, with dynamic batching, deadlines, cancellation and metrics.

One worker thread runs the pipeline; any number of threads submit. A request's picture depends on its own values only,
so it is the same whatever batch it travels in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.errors import CancelledError, FastVARError, OverloadedError, RequestError
from fastvar_trt.runtime.pipeline import Pipeline

_LATENCIES_KEPT = 1000


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """One picture: the arguments of `Pipeline.generate` for a single image; None is the bundle's default.

    Attributes:
        label: class index, for a model of classes.
        text_features: [tokens, width], for a model of text (`Pipeline.encode` makes them of a prompt).
        negative_text_features: of a negative prompt.
        seed: of the noise.
        cfg, temperature, top_k, top_p: sampling.
        deadline_s: seconds from submission after which the picture is not wanted any more.
    """

    label: int | None = None
    text_features: NDArray[Any] | None = None
    negative_text_features: NDArray[Any] | None = None
    seed: int = 0
    cfg: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    deadline_s: float | None = None


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """One picture.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        tokens: per step, as in `GenerationResult`, of this image.
        queued_ms: from submission to the start of its batch.
        total_ms: from submission to the picture.
        batch: how many requests travelled together.
    """

    image: NDArray[Any]
    tokens: list[NDArray[Any]]
    queued_ms: float
    total_ms: float
    batch: int


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Counts since the start, and what is going on now; latencies of the last 1000 pictures."""

    accepted: int
    rejected: int  # the queue was full
    completed: int
    cancelled: int  # by the client or by the deadline
    failed: int  # by the backend
    batches: int
    queued: int
    running: int
    p50_ms: float | None
    p99_ms: float | None


@dataclasses.dataclass
class _Entry:
    request: ImageRequest
    future: Future[ImageResult]
    submitted: float

    @property
    def expired(self) -> bool:
        limit = self.request.deadline_s
        return limit is not None and time.monotonic() - self.submitted > limit

    @property
    def unwanted(self) -> bool:
        return self.future.cancelled() or self.expired


class Ticket:
    """A request on its way."""

    def __init__(self, entry: _Entry) -> None:
        self._entry = entry

    def result(self, timeout_s: float | None = None) -> ImageResult:
        """The picture, when it is there.

        Raises:
            CancelledError: the request was cancelled, or its deadline passed.
            TimeoutError: it took longer than `timeout_s`; the request goes on.
            FastVARError: what the backend raised.
        """
        try:
            return self._entry.future.result(timeout_s)
        except TimeoutError:
            raise
        except FastVARError:
            raise
        except BaseException as error:
            if self._entry.future.cancelled():
                raise CancelledError("the request was cancelled") from error
            raise

    @property
    def done(self) -> bool:
        """True where the result, or an error, is there."""
        return self._entry.future.done()

    def cancel(self) -> bool:
        """Give the request up; a batch that nobody waits for any more stops before its next scale.

        Returns:
            False where it was done already.
        """
        return self._entry.future.cancel()


class Service:
    """Use it as a context manager, or call `drain` and `close`. The pipeline is the caller's, who closes it.

    Args:
        pipeline: a loaded bundle.
        max_queue: requests that may wait; more are refused, so that latency stays bounded.
        max_wait_s: how long the first request of a batch waits for others to join it.
    """

    def __init__(self, pipeline: Pipeline, *, max_queue: int = 64, max_wait_s: float = 0.005) -> None:
        if max_queue < 1 or max_wait_s < 0:
            raise RequestError(f"max_queue {max_queue}, max_wait_s {max_wait_s}: expected 1 or more, 0 or more")
        self._pipeline = pipeline
        self._max_queue, self._max_wait = max_queue, max_wait_s
        self._max_batch = max(pipeline.manifest.batches)
        self._queue: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._running: list[_Entry] = []
        self._accepting, self._stopping = True, False
        self._counts = dict.fromkeys(("accepted", "rejected", "completed", "cancelled", "failed", "batches"), 0)
        self._latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._worker = threading.Thread(target=self._work, name="fastvar-service", daemon=True)
        self._worker.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def healthy(self) -> bool:
        """True where requests are accepted and the worker lives."""
        return self._accepting and self._worker.is_alive()

    def submit(self, request: ImageRequest) -> Ticket:
        """Queue a request.

        Raises:
            RequestError: a value out of range; checked here, so that it cannot spoil a batch.
            OverloadedError: the queue is full, or the service is draining; try again later.
        """
        self._pipeline.check(**_arguments([request]))
        entry = _Entry(request, Future(), time.monotonic())
        with self._changed:
            self._drop_unwanted()
            if not self._accepting:
                raise OverloadedError("the service is draining and takes no more requests")
            if len(self._queue) >= self._max_queue:
                self._counts["rejected"] += 1
                raise OverloadedError(f"the queue is full ({self._max_queue} requests); try again later")
            self._queue.append(entry)
            self._counts["accepted"] += 1
            self._changed.notify_all()
        return Ticket(entry)

    def metrics(self) -> Metrics:
        """Where the service stands."""
        with self._changed:
            latencies = list(self._latencies)
            p50, p99 = np.percentile(latencies, [50, 99]).tolist() if latencies else (None, None)
            return Metrics(**self._counts, queued=len(self._queue), running=len(self._running), p50_ms=p50, p99_ms=p99)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, and wait for those that are there.

        Returns:
            True where all are done.
        """
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not self._queue and not self._running, timeout_s)

    def close(self) -> None:
        """Stop: what waits or runs is cancelled. Call `drain` before to let it end."""
        with self._changed:
            self._accepting, self._stopping = False, True
            for entry in (*self._queue, *self._running):
                entry.future.cancel()
            self._changed.notify_all()
        self._worker.join()

    def _work(self) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            try:
                self._draw(batch)
            finally:
                with self._changed:
                    self._running = []
                    self._changed.notify_all()

    def _next_batch(self) -> list[_Entry] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if not self._stopping and len(self._queue) < self._max_batch and self._max_wait > 0:
                self._changed.wait_for(lambda: len(self._queue) >= self._max_batch or self._stopping, self._max_wait)
            self._drop_unwanted()
            if self._stopping:
                return None
            self._running = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
            return self._running

    def _drop_unwanted(self) -> None:
        """Settle what nobody waits for any more; with the lock held."""
        kept = [entry for entry in self._queue if not entry.unwanted]
        for entry in self._queue:
            if entry.unwanted:
                self._settle_unwanted(entry)
        if len(kept) != len(self._queue):
            self._queue = deque(kept)
            self._changed.notify_all()

    def _settle_unwanted(self, entry: _Entry) -> None:
        self._counts["cancelled"] += 1
        _settle(entry, CancelledError(f"the deadline of {entry.request.deadline_s} s has passed"))

    def _draw(self, batch: list[_Entry]) -> None:
        if not batch:
            return
        begin = time.monotonic()
        try:
            result = self._pipeline.generate(
                **_arguments([entry.request for entry in batch]),
                should_stop=lambda: all(entry.unwanted for entry in batch),
            )
        except CancelledError:
            with self._changed:
                for entry in batch:
                    self._settle_unwanted(entry)
            return
        except Exception as error:
            # One picture that cannot be drawn must not take the others with it: they are tried alone.
            if len(batch) > 1:
                for entry in batch:
                    self._draw([entry])
                return
            with self._changed:
                self._counts["failed"] += 1
            _settle(batch[0], error)
            return
        end = time.monotonic()
        with self._changed:
            self._counts["batches"] += 1
            for i, entry in enumerate(batch):
                total_ms = (end - entry.submitted) * 1e3
                if entry.unwanted:
                    self._settle_unwanted(entry)
                    continue
                self._counts["completed"] += 1
                self._latencies.append(total_ms)
                tokens = [step[i].copy() for step in result.tokens]
                queued_ms = (begin - entry.submitted) * 1e3
                _settle(entry, ImageResult(result.images[i].copy(), tokens, queued_ms, total_ms, len(batch)))


def _settle(entry: _Entry, outcome: ImageResult | Exception) -> None:
    """Hand out a result or an error; nothing where the client has given the request up in the meantime."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, ImageResult):
            entry.future.set_result(outcome)
        else:
            entry.future.set_exception(outcome)


def _arguments(requests: list[ImageRequest]) -> dict[str, Any]:
    """The requests as arguments of `Pipeline.generate`."""
    arguments: dict[str, Any] = {"seeds": [request.seed for request in requests]}
    if all(request.text_features is None for request in requests):
        arguments["labels"] = [request.label for request in requests]
    else:
        arguments["text_features"] = [request.text_features for request in requests]
        arguments["negative_text_features"] = [request.negative_text_features for request in requests]
        if any(request.label is not None for request in requests):
            raise RequestError("give a label or text_features, not both")
    per_image: Mapping[str, list[Any]] = {
        name: [getattr(request, name) for request in requests] for name in ("cfg", "temperature", "top_k", "top_p")
    }
    return arguments | {name: values for name, values in per_image.items() if any(v is not None for v in values)}
