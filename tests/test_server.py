"""The HTTP server, in this process: what it answers, refuses and counts."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from limits import parse
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from fastvar_trt.runtime import BackendError, OutOfMemoryError, Pipeline, RequestError, Service
from fastvar_trt.serving.http.app import ServerOptions, create_app
from faulty_backend import FaultyBackend, Gate

Serve = Callable[..., TestClient]


@pytest.fixture
def backend() -> FaultyBackend:
    return FaultyBackend()


@pytest.fixture
def pipe(tiny_bundle: Path, backend: FaultyBackend) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, backend=backend) as pipeline:
        yield pipeline


@pytest.fixture
def serve(pipe: Pipeline) -> Iterator[Serve]:
    clients: list[TestClient] = []

    def start(max_queue: int = 64, **options: Any) -> TestClient:
        app = create_app(Service(pipe, max_queue=max_queue, max_wait_s=0), ServerOptions(**options))
        client = TestClient(app, raise_server_exceptions=False)
        clients.append(client)
        return client.__enter__()

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def decoded(data: bytes) -> tuple[Any, str | None]:
    """The picture, uint8 [H, W, 3], and its format."""
    image = Image.open(io.BytesIO(data))
    return np.asarray(image), image.format


def coarse(image: Any) -> Any:
    """Means of blocks of 8x8: pictures of random weights are noise, which JPEG and WebP blur."""
    height, width, _ = image.shape
    return image.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events: name and data."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_are_those_of_the_pipeline(serve: Serve, pipe: Pipeline, kind: str) -> None:
    expected = pipe.generate([4], seeds=[9], cfg=2.0, top_k=20, top_p=0.9, temperature=0.8).images[0]
    body = {"label": 4, "seed": 9, "cfg": 2.0, "top_k": 20, "top_p": 0.9, "temperature": 0.8, "format": kind}
    client = serve()
    answer = client.post("/v1/images", json=body)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"image/{kind}"
    image, file_format = decoded(answer.content)
    assert file_format == kind.upper()
    assert image.shape == expected.shape
    if kind == "png":
        np.testing.assert_array_equal(image, expected)
    else:
        assert np.abs(coarse(image) - coarse(expected)).mean() < 2
        assert len(client.post("/v1/images", json={**body, "quality": 10}).content) < len(answer.content)


def test_a_seed_that_was_drawn_gives_the_picture_again(serve: Serve) -> None:
    client = serve()
    first, second = (client.post("/v1/images", json={"label": 1}) for _ in range(2))
    assert first.headers["x-fastvar-seed"] != second.headers["x-fastvar-seed"]
    again = client.post("/v1/images", json={"label": 1, "seed": int(first.headers["x-fastvar-seed"])})
    assert again.content == first.content != second.content
    assert float(first.headers["x-fastvar-total-ms"]) >= float(first.headers["x-fastvar-queued-ms"]) >= 0
    assert first.headers["x-fastvar-batch"] == "1"


@pytest.mark.parametrize("scales", [None, [2, 0], []])
def test_a_stream_ends_with_the_picture(serve: Serve, pipe: Pipeline, scales: list[int] | None) -> None:
    body = {"label": 2, "seed": 5, **({} if scales is None else {"preview_scales": scales})}
    answer = serve().post("/v1/images/stream", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *previews, last = events(answer.text)
    wanted = [0, 1, 2] if scales is None else sorted(scales)
    assert [(name, data["scale"]) for name, data in previews] == [("preview", scale) for scale in wanted]
    assert last[0] == "image"
    assert last[1]["seed"] == 5
    *expected, final = pipe.stream([2], seeds=5, preview_scales=wanted)
    for (_, data), preview in zip(previews, expected, strict=True):
        assert data["image"]["media_type"] == "image/jpeg"
        image, _ = decoded(base64.b64decode(data["image"]["base64"]))
        assert np.abs(coarse(image) - coarse(preview.images[0])).mean() < 2
    np.testing.assert_array_equal(decoded(base64.b64decode(last[1]["image"]["base64"]))[0], final.images[0])


@pytest.fixture(scope="module")
def shared_client(tiny_bundle: Path) -> Iterator[TestClient]:
    """For requests that leave nothing behind."""
    app = create_app(Service(Pipeline.load(tiny_bundle), max_wait_s=0))
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "body.label: Field required"),
        ({"label": 10}, "body.label: Input should be less than or equal to 9"),
        ({"label": "one"}, "body.label: Input should be a valid integer"),
        ({"label": 1, "seed": -1}, "body.seed: Input should be greater than or equal to 0"),
        ({"label": 1, "seed": 2**64}, "body.seed: Input should be less than or equal to"),
        ({"label": 1, "cfgs": 2}, "body.cfgs: Extra inputs are not permitted"),
        ({"label": 1, "top_k": 1000}, "body.top_k: Input should be less than or equal to 96"),
        ({"label": 1, "cfg": 1e38}, "body.cfg: Input should be less than or equal to 100"),
        ({"label": 1, "temperature": 1e-9}, "body.temperature: Input should be greater than or equal to 0.001"),
        ({"label": 1, "format": "gif"}, "body.format: Input should be 'png', 'jpeg' or 'webp'"),
        ({"label": 1, "quality": 0}, "body.quality"),
        ({"label": 1, "deadline_s": 0}, "body.deadline_s"),
        ({"prompt": "a fox"}, "body.label: Field required; body.prompt: Extra inputs are not permitted"),
        ({"label": 1, "prompt": "a fox"}, "body.prompt: Extra inputs are not permitted"),
        ({"text_features": [[1.0]]}, "body.text_features: Extra inputs are not permitted"),
        ([], "body: Input should be an object"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/stream"])
def test_bad_requests(shared_client: TestClient, path: str, body: Any, message: str) -> None:
    answer = shared_client.post(path, json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["type"] == "RequestError"
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [(b'{"label": NaN}', 422), (b'{"label": 1, "cfg": Infinity}', 422), (b"{", 422), (b"[" * 100_000, 422), (b"", 422)],
)
def test_bodies_that_are_not_json(shared_client: TestClient, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = shared_client.post("/v1/images", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"type", "message"}
    assert shared_client.post("/v1/images", json={"label": 1}).status_code == 200


def test_scales_without_preview_are_refused(shared_client: TestClient) -> None:
    answer = shared_client.post("/v1/images/stream", json={"label": 1, "preview_scales": [3]})
    assert answer.status_code == 422
    assert "body.preview_scales.0: Input should be 0, 1 or 2" in answer.json()["error"]["message"]


def test_a_body_that_is_too_large(serve: Serve) -> None:
    client = serve(max_body_bytes=100)
    large = json.dumps({"label": 1, "prompt": "x" * 100}).encode()

    def chunks() -> Iterator[bytes]:
        yield large[:60]
        yield large[60:]

    for content in (large, chunks()):  # with the length declared, and without
        answer = client.post("/v1/images", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert "more than 100 bytes" in answer.json()["error"]["message"]
    assert client.post("/v1/images", json={"label": 1}).status_code == 200


def test_a_client_that_asks_too_often(serve: Serve) -> None:
    client = serve(rate=parse("2/hour"))
    statuses = [client.post("/v1/images", json={"label": 1}).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    answer = client.post("/v1/images/stream", json={"label": 1})
    assert answer.status_code == 429
    assert 3000 < int(answer.headers["retry-after"]) <= 3600
    assert client.get("/healthz").status_code == 200


def test_a_full_queue_and_deadlines(serve: Serve, backend: FaultyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(backend, monkeypatch)
    client = serve(max_queue=1, max_deadline_s=60)
    answers: list[Any] = []

    def ask(**body: Any) -> None:
        answers.append(client.post("/v1/images", json={"label": 1, **body}))

    first = threading.Thread(target=ask)
    first.start()
    assert gate.entered.wait(10)
    ask(deadline_s=0.2)  # waits in the queue
    assert answers[0].status_code == 504
    assert answers[0].json()["error"] == {"type": "CancelledError", "message": "the deadline of 0.2 s has passed"}
    second = threading.Thread(target=ask)
    second.start()
    while client.get("/healthz").json()["queued"] == 0:
        time.sleep(0.01)
    ask()
    assert answers[1].status_code == 503
    assert answers[1].headers["retry-after"] == "1"
    assert "the queue is full (1 requests)" in answers[1].json()["error"]["message"]
    gate.open.set()
    first.join(60)
    second.join(60)
    assert [answer.status_code for answer in answers[2:]] == [200, 200]


@pytest.mark.parametrize(
    ("error", "status", "kind", "message"),
    [
        (BackendError("the GPU is lost"), 500, "BackendError", "the GPU is lost"),
        (MemoryError(), 503, "MemoryError", "out of memory"),
        (OutOfMemoryError("a GPU: out of memory"), 503, "OutOfMemoryError", "a GPU: out of memory"),
        (ValueError("an internal detail"), 500, "InternalError", "the server failed; see its log"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/stream"])
def test_a_backend_that_fails(
    serve: Serve,
    pipe: Pipeline,
    backend: FaultyBackend,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    error: Exception,
    status: int,
    kind: str,
    message: str,
) -> None:
    client = serve()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "before", backend.fails(error, name="step_02", batch=1))
        answer = client.post(path, json={"label": 1, "seed": 1})
    if path.endswith("stream"):
        assert answer.status_code == 200
        name, found = events(answer.text)[-1]
        assert name == "error"
    else:
        assert answer.status_code == status
        found = answer.json()["error"]
        assert f'fastvar_http_responses_total{{path="{path}",status="{status}"}} 1.0' in client.get("/metrics").text
    assert found["type"] == kind
    assert message in found["message"]
    assert "internal detail" not in answer.text
    again = client.post("/v1/images", json={"label": 1, "seed": 1})
    np.testing.assert_array_equal(decoded(again.content)[0], pipe.generate([1], seeds=[1]).images[0])


def test_metrics_count_what_happened(serve: Serve) -> None:
    client = serve()
    for body in ({"label": 1}, {"label": 2}, {"label": 10}):
        client.post("/v1/images", json=body)
    while client.get("/healthz").json()["running"]:  # the answer is there a moment before the batch has ended
        time.sleep(0.01)
    client.get("/nowhere/at/all")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = {
        (s.name, *sorted(v for label, v in s.labels.items() if label != "model")): s.value
        for family in text_string_to_metric_families(answer.text)
        for s in family.samples
    }
    assert samples["fastvar_requests_total", "completed"] == 2
    assert samples["fastvar_requests_total", "failed"] == 0
    assert samples["fastvar_accepted_requests_total",] == 2
    assert samples["fastvar_batches_total", "1"] == 2
    assert samples["fastvar_queued_requests",] == samples["fastvar_running_requests",] == 0
    assert samples["fastvar_request_duration_seconds_count",] == 2
    assert samples["fastvar_request_duration_seconds_bucket", "+Inf"] == 2
    assert 0 < samples["fastvar_request_duration_seconds_sum",] < 60
    assert samples["fastvar_bundle_info", "128x128", "faulty", "fp32", "tiny", "var"] == 1
    assert samples["fastvar_http_responses_total", "/v1/images", "200"] == 2
    assert samples["fastvar_http_responses_total", "/v1/images", "422"] == 1
    assert samples["fastvar_http_responses_total", "404", "other"] == 1  # one label for all that is not there
    assert samples["process_resident_memory_bytes",] > 1e6


def test_health_and_the_end(pipe: Pipeline) -> None:
    service = Service(pipe)
    with TestClient(create_app(service)) as client:
        assert client.get("/healthz").json() == {"status": "ok", "queued": 0, "running": 0}
        service.drain(10)
        answer = client.get("/healthz")
        assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
        assert client.post("/v1/images", json={"label": 1}).status_code == 503
    with pytest.raises(RequestError, match="the pipeline is closed"):
        pipe.generate([1])


def test_the_api_describes_itself(shared_client: TestClient) -> None:
    client = shared_client
    schema = client.get("/openapi.json").json()
    paths = {"/v1/images", "/v1/images/stream", "/v1/model", "/healthz", "/metrics"}
    assert set(schema["paths"]) == paths
    responses = schema["paths"]["/v1/images"]["post"]["responses"]
    assert set(responses["200"]["content"]) == {"image/png", "image/jpeg", "image/webp"}
    assert {"413", "422", "429", "500", "503", "504"} < set(responses)
    model = client.get("/v1/model").json()
    assert model["takes"] == ["label"]
    assert (model["num_classes"], model["width"], model["preview_scales"]) == (10, 128, [0, 1, 2])
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    answer = client.get("/nowhere")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "HTTPError"
