"""`Service`: a bounded queue in front of a pipeline, with dynamic batching, deadlines, cancellation and metrics.

One worker thread runs the pipeline; any number of threads submit, and every method may be called from any of them. A
request's picture depends on its own values only, so it is the same whatever batch it travels in.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.errors import CancelledError, OverloadedError, RequestError
from fastvar_trt.runtime.pipeline import Pipeline, Preview
from fastvar_trt.runtime.request import Request

LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LATENCIES_KEPT = 1000
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageRequest(Request):
    """One picture of a service: a `Request`, and how long and with what it is waited for.

    Attributes:
        deadline_s: seconds from submission after which the picture is not wanted any more.
        preview_scales: steps after which the picture in the making is decoded, for `Service.submit`'s `on_preview`.
        variant: of the bundle, by name; default: its first.
    """

    deadline_s: float | None = None
    preview_scales: tuple[int, ...] = ()
    variant: str | None = None


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """One picture.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        queued_ms: from submission to the start of its batch.
        total_ms: from submission to the picture.
        batch: how many requests travelled together.
        warnings: as in `GenerationResult`, of this image.
    """

    image: NDArray[Any]
    queued_ms: float
    total_ms: float
    batch: int
    warnings: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Where a service stands.

    Attributes:
        accepted, completed: requests since the start.
        rejected: because the queue was full.
        cancelled: by the client, the deadline, or the end of the service.
        failed: by the backend.
        batches: runs of the chain whose pictures were handed out.
        queued, running: requests now.
        p50_ms, p99_ms: from submission to the picture, of the last 1000 pictures; None before the first.
        latency_counts: pictures by latency since the start, one count per bound of `LATENCY_BUCKETS_S` (not
            cumulative) and one beyond.
        latency_sum_s: of all pictures.
        batch_sizes: how many requests travelled together -> batches.
    """

    accepted: int
    rejected: int
    completed: int
    cancelled: int
    failed: int
    batches: int
    queued: int
    running: int
    p50_ms: float | None
    p99_ms: float | None
    latency_counts: tuple[int, ...]
    latency_sum_s: float
    batch_sizes: Mapping[int, int]


@dataclasses.dataclass
class _Entry:
    request: ImageRequest
    future: Future[ImageResult]
    submitted: float
    on_preview: Callable[[Preview], None] | None

    @property
    def expired(self) -> bool:
        limit = self.request.deadline_s
        return limit is not None and time.monotonic() - self.submitted > limit

    @property
    def unwanted(self) -> bool:
        return self.future.done() or self.expired


class Ticket:
    """A request on its way. In asyncio, `await` gives its result, and to cancel the task that waits gives it up."""

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
        except futures.CancelledError as error:
            raise CancelledError("the request was cancelled") from error

    def __await__(self) -> Generator[Any, None, ImageResult]:
        return asyncio.wrap_future(self._entry.future).__await__()

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
        self._successor: Pipeline | None = None
        self._replacing = threading.Lock()
        self._max_queue, self._max_wait = max_queue, max_wait_s
        self._queue: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._running: list[_Entry] = []
        self._accepting, self._stopping, self._ended = True, False, False
        self._counts = dict.fromkeys(("accepted", "rejected", "completed", "cancelled", "failed", "batches"), 0)
        self._latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._latency_counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._latency_sum = 0.0
        self._batch_sizes: Counter[int] = Counter()
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

    @property
    def pipeline(self) -> Pipeline:
        """What it draws with."""
        return self._pipeline

    def submit(self, request: ImageRequest, on_preview: Callable[[Preview], None] | None = None) -> Ticket:
        """Queue a request.

        Args:
            request: the picture.
            on_preview: called with its previews, images uint8 [1, H, W, 3], in the worker's thread: hand them on and
                return, since the whole batch waits. What it raises is logged, and harms nothing. A batch that fails
                and is tried again gives its previews again.

        Raises:
            RequestError: a value out of range; checked here, so that it cannot spoil a batch.
            OverloadedError: the queue is full, or the service is draining; try again later.
        """
        self._pipeline.check([request], variant=request.variant, preview_scales=request.preview_scales)
        entry = _Entry(request, Future(), time.monotonic(), on_preview)
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
            self._drop_unwanted()
            latencies = list(self._latencies)
            now: dict[str, Any] = {
                **self._counts,
                "queued": len(self._queue),
                "running": len(self._running),
                "latency_counts": tuple(self._latency_counts),
                "latency_sum_s": self._latency_sum,
                "batch_sizes": dict(self._batch_sizes),
            }
        # Without the lock, which the worker and every client want.
        p50, p99 = np.percentile(latencies, [50, 99]).tolist() if latencies else (None, None)
        return Metrics(**now, p50_ms=p50, p99_ms=p99)

    def replace(self, pipeline: Pipeline) -> Pipeline:
        """Draw with another pipeline from the next batch on; nothing is refused or lost in between.

        Requests that wait are drawn with the new one; those that it does not take fail with its error.

        Returns:
            The pipeline that was used before, for the caller to close.

        Raises:
            RequestError: the service is closed.
        """
        with self._replacing, self._changed:
            if self._stopping:
                raise RequestError("the service is closed")
            before = self._pipeline
            self._successor = pipeline
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._pipeline is pipeline or self._ended)
            if self._pipeline is not pipeline:
                raise RequestError("the service is closed")
            return before

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
                _settle(entry, CancelledError("the service was closed before the picture was there"))
            self._changed.notify_all()
        self._worker.join()
        with self._changed:
            self._drop_unwanted()

    def _work(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                try:
                    self._draw(batch)
                except Exception as error:  # no memory for the copies, say: the service goes on
                    self._fail(batch, error)
                finally:
                    with self._changed:
                        self._running = []
                        self._changed.notify_all()
        finally:
            with self._changed:
                self._accepting = False
                self._ended = True
                self._changed.notify_all()

    def _next_batch(self) -> list[_Entry] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping or self._successor)
            if self._successor is not None:
                self._pipeline, self._successor = self._successor, None
                self._changed.notify_all()
                return []
            largest = max(self._pipeline.manifest.batches)
            if not self._stopping and len(self._queue) < largest and self._max_wait > 0:
                self._changed.wait_for(lambda: len(self._queue) >= largest or self._stopping, self._max_wait)
            self._drop_unwanted()
            if self._stopping:
                return None
            self._running = self._take(largest)
            return self._running

    def _take(self, largest: int) -> list[_Entry]:
        """The first request, and those behind it that may travel with it; with the lock held."""
        if not self._queue:
            return []
        variant = self._queue[0].request.variant
        batch = [entry for entry in self._queue if entry.request.variant == variant][:largest]
        taken = set(map(id, batch))
        self._queue = deque(entry for entry in self._queue if id(entry) not in taken)
        return batch

    def _drop_unwanted(self) -> None:
        """Settle what nobody waits for any more; with the lock held."""
        kept: deque[_Entry] = deque()
        for entry in self._queue:
            if entry.unwanted:  # asked once: it may become so at any moment
                self._settle_unwanted(entry)
            else:
                kept.append(entry)
        if len(kept) != len(self._queue):
            self._queue = kept
            self._changed.notify_all()

    def _settle_unwanted(self, entry: _Entry) -> None:
        self._counts["cancelled"] += 1
        _settle(entry, CancelledError(f"the deadline of {entry.request.deadline_s} s has passed"))

    def _draw(self, batch: list[_Entry]) -> None:
        if not batch:
            return
        begin = time.monotonic()

        def preview(found: Preview) -> None:
            for entry, image in zip(batch[found.start :], found.images, strict=False):
                if entry.on_preview is not None and found.scale in entry.request.preview_scales:
                    try:
                        entry.on_preview(Preview(found.scale, 0, image[None].copy()))
                    except Exception:
                        _LOG.exception("on_preview raised; the picture goes on without")

        wanted = [entry.request.preview_scales for entry in batch if entry.on_preview is not None]
        try:
            result = self._pipeline.draw(
                [entry.request for entry in batch],
                variant=batch[0].request.variant,
                should_stop=lambda: all(entry.unwanted for entry in batch),
                preview_scales=sorted(set().union(*wanted)),
                on_preview=preview,
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
            self._fail(batch, error)
            return
        end = time.monotonic()
        found = [
            ImageResult(
                result.images[i].copy(),
                queued_ms=(begin - entry.submitted) * 1e3,
                total_ms=(end - entry.submitted) * 1e3,
                batch=len(batch),
                warnings=result.warnings[i],
            )
            for i, entry in enumerate(batch)
        ]
        with self._changed:
            self._counts["batches"] += 1
            self._batch_sizes[len(batch)] += 1
            for entry, picture in zip(batch, found, strict=True):
                if entry.unwanted:
                    self._settle_unwanted(entry)
                    continue
                self._counts["completed"] += 1
                self._latencies.append(picture.total_ms)
                self._latency_counts[bisect.bisect_left(LATENCY_BUCKETS_S, picture.total_ms / 1e3)] += 1
                self._latency_sum += picture.total_ms / 1e3
                _settle(entry, picture)

    def _fail(self, batch: list[_Entry], error: Exception) -> None:
        """Hand the error to those of a batch that have no answer yet."""
        with self._changed:
            for entry in batch:
                if not entry.future.done():
                    self._counts["failed"] += 1
                    _settle(entry, error)


def _settle(entry: _Entry, outcome: ImageResult | Exception) -> None:
    """Hand out a result or an error; nothing where the client has given the request up in the meantime."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, Exception):
            entry.future.set_exception(outcome)
        else:
            entry.future.set_result(outcome)
