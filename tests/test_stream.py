"""Previews: what the decoder makes of the codes so far, from `generate`, `stream` and the service."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvar_trt.export.exporter import load_bundle_model
from fastvar_trt.runtime import (
    BackendError,
    CancelledError,
    ImageRequest,
    Pipeline,
    Preview,
    RequestError,
    Service,
)
from fastvar_trt.runtime.manifest import GraphSpec
from faulty_backend import FaultyBackend


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle) as pipeline:
        yield pipeline


def test_previews_are_the_decoded_codes_so_far(tiny_bundle: Path, pipe: Pipeline) -> None:
    """PyTorch adds up the codes of the tokens and decodes them; levels may differ by rounding."""
    items = list(pipe.stream([3, 4, 5], seeds=2, preview_scales=[0, 1, 2]))
    result = items[-1].result
    assert result is not None
    assert [(p.scale, p.start, len(p.images)) for p in items] == [
        *((scale, start, count) for start, count in ((0, 2), (2, 1)) for scale in (0, 1, 2)),  # batch sizes 1 and 2
        (3, 0, 3),
    ]
    model, _ = load_bundle_model(tiny_bundle)
    f_hat: Any = None
    for scale, tokens in enumerate(result.tokens):
        f_hat = model.accumulate(torch.from_numpy(tokens), f_hat, scale)
        with torch.no_grad():
            expected = model.decode(f_hat)[1].numpy()
        got = np.concatenate([p.images for p in items if p.scale == scale])
        difference = np.abs(got.astype(int) - expected.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
    plain = pipe.generate([3, 4, 5], seeds=2)
    np.testing.assert_array_equal(plain.images, result.images)
    np.testing.assert_array_equal(items[-1].images, result.images)
    assert result.timings.keys() == plain.timings.keys()


def test_a_reader_may_draw_between_two_previews(pipe: Pipeline) -> None:
    expected = pipe.generate([1], seeds=9).images
    for _ in pipe.stream([2], preview_scales=[0, 1]):
        np.testing.assert_array_equal(pipe.generate([1], seeds=9).images, expected)


def test_a_reader_that_goes_stops_the_drawing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, gate, ran, stopped = FaultyBackend(), threading.Event(), [], threading.Event()

    def before(graph: GraphSpec) -> None:
        ran.append(graph.name)
        if graph.name == "step_01":
            gate.wait(10)

    pipe = Pipeline.load(tiny_bundle, backend=backend)
    backend.before = before
    original = pipe.draw
    monkeypatch.setattr(
        pipe,
        "draw",
        lambda *a, should_stop, **o: original(*a, should_stop=lambda: _noted(should_stop, stopped), **o),
    )
    stream = pipe.stream([2], preview_scales=[0])
    assert next(stream).scale == 0
    closing = threading.Thread(target=stream.close)  # which waits for the scale that runs
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    gate.set()
    closing.join(60)
    assert ran == ["condition", "step_00", "decoder", "step_01"]  # the decoder, of the preview
    assert stopped.is_set()
    assert not any(thread.name == "fastvar-stream" for thread in threading.enumerate())
    pipe.close()


def _noted(should_stop: Callable[[], bool], stopped: threading.Event) -> bool:
    if should_stop():
        stopped.set()
    return stopped.is_set()


@pytest.mark.parametrize("scales", [[3], [-1], [99], ["1"], [True]])
def test_scales_without_preview(pipe: Pipeline, scales: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"preview_scales: got .*, expected some of 0, 1, 2 \(the computed scales"):
        next(pipe.stream([2], preview_scales=scales))
    with Service(pipe) as service, pytest.raises(RequestError, match="preview_scales"):
        service.submit(ImageRequest(label=1, preview_scales=tuple(scales)))


def test_errors_reach_the_reader(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="class 10"):
        next(pipe.stream([10], preview_scales=[0]))
    stream = pipe.stream([1], cfg=1e38, preview_scales=[0])
    with pytest.raises(BackendError, match="not finite"):
        list(stream)


def test_requests_of_one_batch_get_their_own_previews(pipe: Pipeline) -> None:
    alone = {
        label: {p.scale: p.images[0] for p in pipe.stream([label], seeds=label, preview_scales=[0, 1, 2])}
        for label in (6, 7)
    }
    found: dict[int, list[Preview]] = {6: [], 7: []}

    def raising(preview: Preview) -> None:
        found[7].append(preview)
        raise ValueError("the client is gone")

    with Service(pipe, max_wait_s=1.0) as service:
        tickets = [
            service.submit(ImageRequest(label=6, seed=6, preview_scales=(0, 2)), found[6].append),
            service.submit(ImageRequest(label=7, seed=7, preview_scales=(1,)), raising),
        ]
        results = [ticket.result(60) for ticket in tickets]
    assert [result.batch for result in results] == [2, 2]
    for (label, previews), result, scales in zip(found.items(), results, ([0, 2], [1]), strict=True):
        assert [preview.scale for preview in previews] == scales
        for preview in previews:
            np.testing.assert_array_equal(preview.images, alone[label][preview.scale][None])
        np.testing.assert_array_equal(result.image, alone[label][3])


def test_a_request_is_awaited_and_given_up_in_asyncio(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pipe.generate([1], seeds=1).images[0]

    async def client(service: Service) -> None:
        result = await service.submit(ImageRequest(label=1, seed=1))
        np.testing.assert_array_equal(result.image, expected)
        with monkeypatch.context() as patch:
            original = pipe.draw

            def slow(*arguments: Any, **options: Any) -> Any:
                while not options["should_stop"]():
                    time.sleep(0.002)
                return original(*arguments, **options)

            patch.setattr(pipe, "draw", slow)
            ticket = service.submit(ImageRequest(label=2))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await ticket
        with pytest.raises(CancelledError):
            ticket.result(10)

    with Service(pipe) as service:
        asyncio.run(client(service))
        assert service.drain(10)
        assert (service.metrics().completed, service.metrics().cancelled) == (1, 1)
