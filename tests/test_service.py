"""The service: batches, back-pressure, cancellation, deadlines, and faults after which the next request is right."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvar_trt.runtime import (
    BackendError,
    CancelledError,
    ImageRequest,
    OverloadedError,
    Pipeline,
    RequestError,
    Service,
)
from fastvar_trt.runtime import service as service_module
from fastvar_trt.runtime.service import LATENCY_BUCKETS_S
from faulty_backend import FaultyBackend


@pytest.fixture
def backend() -> FaultyBackend:
    return FaultyBackend()


@pytest.fixture
def pipe(tiny_bundle: Path, backend: FaultyBackend) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, backend=backend) as pipeline:
        yield pipeline


class Gate:
    """Holds `Pipeline.draw` until it is opened, or the drawing is given up."""

    def __init__(self, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self._open = threading.Event(), threading.Event()
        original = pipe.draw

        def held(*args: Any, should_stop: Callable[[], bool] = lambda: False, **options: Any) -> Any:
            self.entered.set()
            while not self._open.is_set() and not should_stop():
                time.sleep(0.002)
            return original(*args, should_stop=should_stop, **options)

        monkeypatch.setattr(pipe, "draw", held)

    def open(self) -> None:
        self._open.set()


def test_pictures_are_those_of_the_pipeline_whatever_the_batch(pipe: Pipeline) -> None:
    requests = [ImageRequest(label=i % 10, seed=100 + i, cfg=None if i % 3 else 2.0, top_k=5 + i) for i in range(9)]
    expected = [pipe.generate([r.label or 0], seeds=[r.seed], cfg=r.cfg, top_k=r.top_k).images[0] for r in requests]
    found: dict[int, Any] = {}
    with Service(pipe, max_wait_s=0.05) as service:

        def client(numbers: range) -> None:
            for i in numbers:
                found[i] = service.submit(requests[i]).result(60)

        threads = [threading.Thread(target=client, args=(range(start, 9, 3),)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = service.metrics()
    for i, image in enumerate(expected):
        np.testing.assert_array_equal(found[i].image, image)
    assert {result.batch for result in found.values()} == {1, 2}
    assert (metrics.accepted, metrics.completed, metrics.failed, metrics.queued) == (9, 9, 0, 0)
    assert metrics.batches < 9
    assert metrics.p50_ms is not None
    assert metrics.p99_ms is not None
    assert 0 < metrics.p50_ms <= metrics.p99_ms


def test_a_full_queue_refuses_and_recovers(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(pipe, monkeypatch)
    with Service(pipe, max_queue=2, max_wait_s=0) as service:
        first = service.submit(ImageRequest(label=0))
        assert gate.entered.wait(10)
        waiting = [service.submit(ImageRequest(label=i)) for i in (1, 2)]
        with pytest.raises(OverloadedError, match=r"the queue is full \(2 requests\)"):
            service.submit(ImageRequest(label=3))
        gate.open()
        for ticket in (first, *waiting):
            assert ticket.result(60).image.shape == (128, 128, 3)
        assert service.submit(ImageRequest(label=3)).result(60).batch == 1
        metrics = service.metrics()
    assert (metrics.rejected, metrics.completed) == (1, 4)


def test_cancelled_requests_do_not_run(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(pipe, monkeypatch)
    with Service(pipe, max_wait_s=0) as service:
        running = service.submit(ImageRequest(label=0))
        assert gate.entered.wait(10)
        queued, other = service.submit(ImageRequest(label=1)), service.submit(ImageRequest(label=2, seed=7))
        assert queued.cancel()
        assert running.cancel()  # nobody waits for this batch any more: it stops between two scales
        with pytest.raises(CancelledError):
            running.result(60)
        gate.open()
        result = other.result(60)
        with pytest.raises(CancelledError):
            queued.result(60)
        assert not other.cancel()
        metrics = service.metrics()
    assert (metrics.cancelled, metrics.completed) == (2, 1)
    np.testing.assert_array_equal(result.image, pipe.generate([2], seeds=[7]).images[0])


def test_deadlines(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(pipe, monkeypatch)
    with Service(pipe, max_wait_s=0) as service:
        running = service.submit(ImageRequest(label=0, deadline_s=0.1))
        assert gate.entered.wait(10)
        queued = service.submit(ImageRequest(label=1, deadline_s=0.05))
        with pytest.raises(CancelledError, match=r"the deadline of 0\.1 s has passed"):
            running.result(60)
        with pytest.raises(CancelledError, match=r"the deadline of 0\.05 s has passed"):
            queued.result(60)
        gate.open()
        assert service.submit(ImageRequest(label=1, deadline_s=60)).result(60).queued_ms >= 0


def test_a_chain_stops_between_two_scales(pipe: Pipeline) -> None:
    expected = pipe.generate([3], seeds=[1])
    asked = []

    def after_two() -> bool:
        asked.append(True)
        return len(asked) > 3

    with pytest.raises(CancelledError):
        pipe.generate([4], should_stop=after_two)
    assert len(asked) == 4  # condition, step 0, step 1, and no more
    again = pipe.generate([3], seeds=[1])
    np.testing.assert_array_equal(again.images, expected.images)


def test_a_backend_that_throws_once_in_the_middle(pipe: Pipeline, backend: FaultyBackend) -> None:
    """The batch is tried again picture by picture: both come, and are right."""
    expected = [pipe.generate([i], seeds=[i]).images[0] for i in (0, 1)]
    backend.before = backend.fails(BackendError("out of memory"), name="step_02", batch=2)
    with Service(pipe, max_wait_s=1.0) as service:
        tickets = [service.submit(ImageRequest(label=i, seed=i)) for i in (0, 1)]
        results = [ticket.result(60) for ticket in tickets]
        metrics = service.metrics()
    for result, image in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result.image, image)
        assert result.batch == 1
    assert (metrics.failed, metrics.completed) == (0, 2)


def test_a_backend_that_throws_always(pipe: Pipeline, backend: FaultyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pipe.generate([5], seeds=[5]).images[0]
    with Service(pipe, max_wait_s=0) as service:
        with monkeypatch.context() as patch:
            failing = backend.fails(BackendError("the GPU is lost"), name="step_02", batch=1)
            patch.setattr(backend, "before", failing)
            with pytest.raises(BackendError, match="the GPU is lost"):
                service.submit(ImageRequest(label=5)).result(60)
        assert service.healthy
        np.testing.assert_array_equal(service.submit(ImageRequest(label=5, seed=5)).result(60).image, expected)
        assert service.metrics().failed == 1


def test_no_memory_for_the_copies_of_a_picture(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the backend has done its part: the clients are told, and the worker lives."""
    expected = pipe.generate([5], seeds=[5]).images[0]

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with Service(pipe, max_wait_s=1.0) as service:
        with monkeypatch.context() as patch:
            patch.setattr(service_module, "ImageResult", full)
            tickets = [service.submit(ImageRequest(label=i)) for i in (0, 1)]
            for ticket in tickets:
                with pytest.raises(MemoryError):
                    ticket.result(60)
        assert service.healthy
        np.testing.assert_array_equal(service.submit(ImageRequest(label=5, seed=5)).result(60).image, expected)
        metrics = service.metrics()
    assert (metrics.failed, metrics.completed, metrics.accepted) == (2, 1, 3)


def test_replacing_and_closing_at_once(pipe: Pipeline) -> None:
    """Whatever comes first, neither waits for the other for ever."""
    service = Service(pipe, max_wait_s=5.0)
    ticket = service.submit(ImageRequest(label=1))  # the worker waits for another to join it
    outcomes: list[object] = []

    def replace() -> None:
        try:
            outcomes.append(service.replace(pipe_like))
        except RequestError as error:
            outcomes.append(error)

    pipe_like: Any = _Proxy(pipe)
    threads = [threading.Thread(target=replace), threading.Thread(target=service.close)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(outcomes) == 1
    with pytest.raises(CancelledError, match="closed before the picture was there"):
        ticket.result(10)


class _Proxy:
    """Another pipeline, as far as a service can tell."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def test_abandoned_requests_do_not_wait(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(pipe, monkeypatch)
    with Service(pipe, max_wait_s=0) as service:
        service.submit(ImageRequest(label=0))
        assert gate.entered.wait(10)
        abandoned = service.submit(ImageRequest(label=1))
        assert service.metrics().queued == 1
        abandoned.cancel()
        metrics = service.metrics()
        assert (metrics.queued, metrics.cancelled) == (0, 1)
        gate.open()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ImageRequest(), "draws classes: give labels"),
        (ImageRequest(label=10), "class 10: this model has 10 classes"),
        (ImageRequest(label=1, cfg=float("nan")), "cfg: got"),
        (ImageRequest(label=1, seed=-1), "seed: got -1"),
        (ImageRequest(label=1, top_k=1000), "top_k: got"),
        (ImageRequest(label=1, text_features=np.zeros((1, 4))), "give one of them"),
        (ImageRequest(text_features=np.zeros((1, 4))), "draws classes"),
        (ImageRequest(prompt="a fox"), "draws classes"),
        (ImageRequest(label=1, negative_prompt="blurry"), "needs a prompt"),
        (ImageRequest(label=1, negative_text_features=np.zeros((1, 4))), "needs text_features"),
    ],
)
def test_bad_requests_are_refused_when_they_are_submitted(pipe: Pipeline, request_: ImageRequest, message: str) -> None:
    with Service(pipe) as service:
        with pytest.raises(RequestError, match=message):
            service.submit(request_)
        assert service.submit(ImageRequest(label=1)).result(60).image.dtype == np.uint8
        assert service.metrics().accepted == 1


def test_drain_and_close(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(pipe, monkeypatch)
    service = Service(pipe, max_wait_s=0)
    ticket = service.submit(ImageRequest(label=0))
    assert gate.entered.wait(10)
    assert not service.drain(0.05)
    assert not service.healthy
    with pytest.raises(OverloadedError, match="draining"):
        service.submit(ImageRequest(label=1))
    gate.open()
    assert service.drain(60)
    assert ticket.result(0).image.shape == (128, 128, 3)
    service.close()
    with pytest.raises(OverloadedError):
        service.submit(ImageRequest(label=1))


def test_a_service_changes_its_pipeline_between_two_batches(
    pipe: Pipeline, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(pipe, monkeypatch)
    successor = Pipeline.load(tiny_bundle)
    drawn: list[int] = []
    original = successor.draw
    monkeypatch.setattr(successor, "draw", lambda *args, **options: (drawn.append(1), original(*args, **options))[1])
    with Service(pipe, max_wait_s=0) as service:
        running = service.submit(ImageRequest(label=0))
        assert gate.entered.wait(10)
        waiting = service.submit(ImageRequest(label=1, seed=3))
        before: list[Pipeline] = []
        thread = threading.Thread(target=lambda: before.append(service.replace(successor)))
        thread.start()
        while service._successor is not successor:
            time.sleep(0.002)
        assert not drawn
        gate.open()
        thread.join(10)
        assert before == [pipe]
        assert service.pipeline is successor
        running.result(60)
        image = waiting.result(60).image
    assert drawn == [1]
    successor.close()
    np.testing.assert_array_equal(image, pipe.generate([1], seeds=[3]).images[0])
    with pytest.raises(RequestError, match="closed"):
        service.replace(pipe)


def test_latencies_are_counted_by_their_bounds(pipe: Pipeline) -> None:
    with Service(pipe, max_wait_s=0) as service:
        results = [service.submit(ImageRequest(label=1)).result(60) for _ in range(5)]
        metrics = service.metrics()
    assert metrics.latency_sum_s == pytest.approx(sum(result.total_ms for result in results) / 1e3)
    expected = np.searchsorted(LATENCY_BUCKETS_S, [result.total_ms / 1e3 for result in results])
    assert metrics.latency_counts == tuple(np.bincount(expected, minlength=len(LATENCY_BUCKETS_S) + 1))
    assert metrics.batch_sizes == {1: 5}


def test_closing_cancels_what_waits(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(pipe, monkeypatch)
    service = Service(pipe, max_wait_s=0)
    tickets = [service.submit(ImageRequest(label=i)) for i in range(3)]
    assert gate.entered.wait(10)
    service.close()
    for ticket in tickets:
        with pytest.raises(CancelledError):
            ticket.result(10)
