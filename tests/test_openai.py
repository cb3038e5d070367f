"""OpenAI's images API by its own client, API keys, and several bundles behind one server."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from PIL import Image

from fastvar_trt.runtime import OverloadedError, Pipeline, RequestError, Service
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.runtime.models import Models, needed_bytes
from fastvar_trt.runtime.pictures import fitted, fitted_mask
from fastvar_trt.serving.http.app import ServerOptions, create_app
from fastvar_trt.serving.http.openai import GENERATIONS, _value
from fastvar_trt.tools.cli import main
from faulty_backend import FaultyBackend, Gate
from server_process import ServerProcess, serving

KEY, OTHER_KEY = "a-key-of-the-first-user", "a-key-of-another-user"


@pytest.fixture(scope="module")
def image() -> Any:
    """A picture of twice the size that the tiny model draws."""
    y, x = np.mgrid[0:256, 0:256] / 256
    return (255 * np.stack([x, y, 0.5 + 0.3 * np.sin(6 * x)], axis=-1)).astype(np.uint8)


@pytest.fixture(scope="module")
def mask() -> Any:
    """OpenAI's: transparent where it is drawn, in the right half."""
    alpha = np.full((256, 256), 255, np.uint8)
    alpha[:, 128:] = 0
    return np.dstack([np.zeros((256, 256, 3), np.uint8), alpha])


def png(array: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def decoded(data: str | None) -> Any:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def server(
    editing_bundle: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Two bundles, and keys."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text(f"# who may draw\n{KEY}\n\n{OTHER_KEY}\n")
    options = (f"plain={tiny_bundle}", "--api-key-file", str(folder / "keys"), "--max-images", "4")
    with serving(f"edits={editing_bundle}", folder / "log", *options) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def pipe(editing_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(editing_bundle) as pipeline:
        yield pipeline


def test_pictures_are_generated(client: openai.OpenAI, pipe: Pipeline) -> None:
    # A model of classes takes an index as its prompt.
    answer = client.images.generate(
        model="edits", prompt="4", n=3, size="128x128", response_format="b64_json", user="somebody",
        extra_body={"seed": 7, "cfg": 2.0},
    )  # fmt: skip
    assert answer.data is not None and len(answer.data) == 3
    expected = pipe.generate([4] * 3, seeds=7, cfg=2.0).images
    for picture, own in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(decoded(picture.b64_json), own)
    text = Image.open(io.BytesIO(base64.b64decode(answer.data[1].b64_json or ""))).text  # type: ignore[attr-defined]
    told = json.loads(text["fastvar"])
    assert (told["label"], told["seed"], told["cfg"], told["plan"]) == (4, 8, 2.0, "skipping")
    assert told["bundle_sha256"] == pipe.manifest.identity
    jpeg = client.images.generate(model="plain", prompt="1", output_format="jpeg", extra_body={"seed": 1}).data
    assert jpeg is not None and base64.b64decode(jpeg[0].b64_json or "")[:2] == b"\xff\xd8"
    assert [model.id for model in client.models.list()] == ["edits", "plain"]


def test_pictures_are_edited(client: openai.OpenAI, pipe: Pipeline, image: Any, mask: Any) -> None:
    ours = fitted(Image.fromarray(image), 128, 128)
    own_mask = fitted_mask(Image.fromarray(mask), 128, 128)
    expected = pipe.generate([3, 3], seeds=5, image=ours, mask=own_mask).images
    answer = client.images.edit(
        image=("in.png", png(image)),
        mask=("mask.png", png(mask)),
        prompt="3",
        n=2,
        size="auto",
        extra_body={"seed": 5},
    )
    assert answer.data is not None
    for picture, own in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(decoded(picture.b64_json), own)
    # A picture may be transparent itself where it is drawn.
    clear = np.dstack([image, mask[..., 3]])
    (own,) = client.images.edit(image=png(clear), prompt="3", extra_body={"seed": 5}).data or ()
    shown = decoded(own.b64_json)
    np.testing.assert_array_equal(shown[:, :60], ours[:, :60])  # next to the mask, white is scaled in
    (kept,) = client.images.edit(image=png(image), prompt="3", extra_body={"seed": 5, "keep_scales": 2}).data or ()
    expected = pipe.generate([3], seeds=5, image=ours, keep_scales=2).images
    np.testing.assert_array_equal(decoded(kept.b64_json), expected[0])


@pytest.mark.parametrize(
    ("kind", "call", "message", "param", "code"),
    [
        (openai.BadRequestError, {"n": 5}, "n: got 5, expected 1 to 4", "n", None),
        (openai.BadRequestError, {"n": 0}, "n: got 0, expected 1 to 4", "n", None),
        (openai.BadRequestError, {"size": "64x64"}, "size: got '64x64', this model draws 128x128", "size", None),
        (openai.BadRequestError, {"response_format": "url"}, "expected b64_json", "response_format", None),
        (openai.BadRequestError, {"prompt": "a fox"}, "this model draws classes", "prompt", None),
        (openai.BadRequestError, {"prompt": "10"}, "class 10: this model has 10 classes", None, None),
        (openai.BadRequestError, {"extra_body": {"cfg": "much"}}, "cfg: got 'much', expected a number", "cfg", None),
        (openai.BadRequestError, {"output_format": "gif"}, "expected one of png, jpeg, webp", "output_format", None),
        (openai.BadRequestError, {"extra_body": {"cfg": 1e30}}, "cfg: got 1e+30, expected -100 to 100", "cfg", None),
        (openai.BadRequestError, {"extra_body": {"n": "--5"}}, "n: got '--5', expected a whole number", "n", None),
        (openai.BadRequestError, {"extra_body": {"size": ["a"]}}, "size: got ['a']", "size", None),
        (openai.BadRequestError, {"extra_body": {"output_format": ["png"]}}, "expected one of", "output_format", None),
        (openai.BadRequestError, {"prompt": "9" * 5000}, "give an index", "prompt", None),
        (openai.BadRequestError, {"prompt": "x" * 20_000}, "got 20000 characters", "prompt", None),
        (openai.NotFoundError, {"model": "gpt-image-1"}, "this server has edits, plain", None, "model_not_found"),
    ],
)
def test_what_cannot_be_generated(
    client: openai.OpenAI, kind: Any, call: Any, message: str, param: Any, code: Any
) -> None:
    with pytest.raises(kind) as caught:
        client.images.generate(**{"prompt": "4", **call})
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["type"], body["param"], body["code"]) == ("invalid_request_error", param, code)
    assert message in body["message"]


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, format="PNG")
    return file.getvalue()


def test_what_cannot_be_edited(client: openai.OpenAI, server: ServerProcess, image: Any, mask: Any) -> None:
    for call, message in (
        ({"mask": png(mask[:64, :64])}, "mask: got 64x64, expected 256x256"),
        ({"image": b"no picture"}, "image: cannot be read as a picture"),
        ({"image": bomb()}, "image: got 10000x10000, expected at most 40 megapixels"),
        ({}, "image: give a mask"),
        ({"extra_body": {"keep_scales": 9}}, "keep_scales: got 9, expected 1 to 3"),
        ({"model": "plain", "mask": png(mask)}, "this bundle has no image encoder; export it with --with-encoder"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(**{"image": png(image), "prompt": "3", **call})
        assert message in caught.value.body["message"]
    headers = {"authorization": f"Bearer {KEY}"}
    for content, files in (({"json": {"prompt": "3"}}, None), ({"data": {"prompt": "3"}}, {"other": png(image)})):
        answer = server.client.post("/v1/images/edits", **content, files=files, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    unasked = {**headers, "content-type": "text/plain"}  # what a page of another site may send
    answer = server.client.post("/v1/images/generations", content=b'{"prompt": "3"}', headers=unasked)
    assert answer.status_code == 400 and "expected application/json" in answer.json()["error"]["message"]
    foreign = {**headers, "sec-fetch-site": "cross-site"}
    answer = server.client.post("/v1/images/edits", **edit_form(image, mask), headers=foreign)
    assert answer.status_code == 400 and "another site" in answer.json()["error"]["message"]
    answer = server.client.get("/v1/images/edits", headers=headers)
    assert answer.status_code == 405 and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    large = server.client.post("/v1/images/edits", content=b"x" * (17 << 20), headers=headers)
    assert large.status_code == 413 and "more than" in large.json()["error"]["message"]


def test_keys(server: ServerProcess, tmp_path: Path, tiny_bundle: Path) -> None:
    for key in ("", "wrong-key-of-a-user", KEY[:-1], f"{KEY}x"):
        stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key or "none", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as caught:
            stranger.images.generate(prompt="4")
        assert caught.value.body["code"] == "invalid_api_key"
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key=OTHER_KEY, max_retries=0)
    assert other.images.generate(prompt="4").data
    assert server.draw(label=1).status_code == 401
    assert server.client.get("/v1/model").headers["www-authenticate"] == "Bearer"
    assert [server.client.get(path).status_code for path in ("/healthz", "/metrics", "/")] == [200] * 3
    for content, message in (
        (None, "cannot be read"),
        ("\ufeff  # none\n", "has no key"),
        ("short\n", "has 5 characters"),
    ):
        path = tmp_path / "keys"
        if content is not None:
            path.write_text(content)
        found = CliRunner().invoke(main, ["serve", str(tiny_bundle), "--api-key-file", str(path), "--port", "0"])
        assert found.exit_code == 1 and message in found.output, found.output


# Faults, as for drawing.


def edit_form(image: Any, mask: Any) -> dict[str, Any]:
    return {"data": {"prompt": "3", "seed": "1"}, "files": {"image": png(image), "mask": png(mask)}}


def test_a_client_that_goes_and_a_full_queue(
    editing_bundle: Path, image: Any, mask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FaultyBackend()
    gate = Gate(backend, monkeypatch)
    form = edit_form(image, mask)
    with Pipeline.load(editing_bundle, backend=backend) as pipe:
        app = create_app(Service(pipe, max_queue=1, max_wait_s=0), ServerOptions(max_deadline_s=30))
        with TestClient(app, raise_server_exceptions=False) as client, ThreadPoolExecutor(2) as pool:
            first = pool.submit(client.post, "/v1/images/edits", **form)
            assert gate.entered.wait(30)
            second = pool.submit(client.post, "/v1/images/edits", **form)
            while client.get("/healthz").json()["queued"] == 0:
                time.sleep(0.01)
            full = client.post("/v1/images/edits", **form)
            assert full.status_code == 503 and full.headers["retry-after"] == "1"
            assert full.json()["error"]["code"] == "overloaded"
            gate.open.set()
            assert [task.result(60).status_code for task in (first, second)] == [200, 200]
            assert first.result().json()["data"] == second.result().json()["data"]


def test_a_server_that_loses_its_client_or_its_life_edits_again(
    editing_bundle: Path, tmp_path: Path, image: Any, mask: Any
) -> None:
    form = edit_form(image, mask)
    before = {path: path.stat().st_mtime_ns for path in editing_bundle.rglob("*")}
    with serving(editing_bundle, tmp_path / "log") as server, ThreadPoolExecutor(4) as pool:
        expected = server.client.post("/v1/images/edits", **form).json()["data"]

        def leave() -> None:
            with pytest.raises(httpx.TransportError):
                httpx.post(f"{server.url}/v1/images/edits", **form, timeout=0.03)

        for task in [pool.submit(leave) for _ in range(8)]:
            task.result(60)
        server.wait_until(lambda: server.client.get("/healthz").json() == {"status": "ok", "queued": 0, "running": 0})
        assert server.client.post("/v1/images/edits", **form).json()["data"] == expected
        asked = [pool.submit(httpx.post, f"{server.url}/v1/images/edits", **form, timeout=60) for _ in range(100)]
        server.wait_until(lambda: server.client.get("/healthz").json()["running"] > 0)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        for task in asked:
            task.cancel()
    with serving(editing_bundle, tmp_path / "log") as server:
        assert server.client.post("/v1/images/edits", **form).json()["data"] == expected
    assert {path: path.stat().st_mtime_ns for path in editing_bundle.rglob("*")} == before


# Several bundles.


def loader(bundle: Path, loaded: list[str], name: str) -> Callable[[], Service]:
    def load() -> Service:
        loaded.append(name)
        return Service(Pipeline.load(bundle, check="size"), max_wait_s=0)

    return load


def test_models_are_loaded_when_they_are_asked_for(tiny_bundle: Path) -> None:
    loaded: list[str] = []
    size = needed_bytes(read_manifest(tiny_bundle))
    names = ("a", "b", "c")
    read = dict.fromkeys(names, lambda: read_manifest(tiny_bundle))
    models = Models({n: loader(tiny_bundle, loaded, n) for n in names}, read, 2 * size, 5)
    try:
        for name in ("a", None, "b", "a", "c"):
            with models.using(name) as service:
                assert service.healthy
        assert loaded == ["a", "b", "c"]
        assert set(models.loaded) == {"a", "c"}  # b was not used for longest
        gone = models.loaded["a"]
        with models.using("c"), models.using("b"):
            assert set(models.loaded) == {"c", "b"}
        assert not gone.healthy
        with pytest.raises(RequestError, match="the pipeline is closed"):
            gone.pipeline.generate([1])
        with pytest.raises(RequestError, match="model: got 'x', this server has a, b, c"):
            models.acquire("x")
    finally:
        models.close()
    with pytest.raises(OverloadedError, match="the server stops"):
        models.acquire("a")


def test_a_model_in_use_stays(tiny_bundle: Path) -> None:
    loaded: list[str] = []
    size = needed_bytes(read_manifest(tiny_bundle))
    load = {name: loader(tiny_bundle, loaded, name) for name in ("a", "b")}
    read = dict.fromkeys(load, lambda: read_manifest(tiny_bundle))
    models = Models(load, read, size, wait_s=0.2)
    try:
        service = models.acquire("a")
        with pytest.raises(OverloadedError, match="model b: no memory while others draw; try again later"):
            models.acquire("b")
        assert service.healthy
        threading.Timer(0.05, models.release, ["a"]).start()
        with models.using("b"):
            assert set(models.loaded) == {"b"}
    finally:
        models.close()
    with pytest.raises(RequestError, match="model a: needs about"):
        Models(load, read, size - 1)


def test_what_is_refused_loads_no_model(tiny_bundle: Path) -> None:
    loaded: list[str] = []
    models = Models(
        {name: loader(tiny_bundle, loaded, name) for name in ("a", "b")},
        dict.fromkeys(("a", "b"), lambda: read_manifest(tiny_bundle)),
        needed_bytes(read_manifest(tiny_bundle)),
        wait_s=5,
    )
    with TestClient(create_app(models)) as client:
        for path, values in {
            "/v1/images": {"label": 1000},
            "/v1/images/stream": {"label": 1000},
            GENERATIONS: {"prompt": "a fox"},
        }.items():
            answer = client.post(path, json={**values, "model": "b"})
            assert answer.status_code in (400, 422), answer.text
        assert client.post("/v1/images", content=b"{", headers={"content-type": "application/json"}).is_client_error
        assert loaded == []
        assert client.post("/v1/images", json={"label": 1, "model": "b"}).status_code == 200
    assert loaded == ["b"]


def test_under_a_prefix_errors_are_openais_too(tiny_bundle: Path) -> None:
    app = create_app(Service(Pipeline.load(tiny_bundle), max_wait_s=0))
    with TestClient(app, root_path="/pre") as client:
        answer = client.post(f"/pre{GENERATIONS}", json={"prompt": "1", "n": 99})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


def test_texts_are_limited() -> None:
    with pytest.raises(RequestError, match="negative_prompt: got 1000000 characters, expected at most"):
        _value("negative_prompt", "text", "x" * 10**6)


def test_a_model_that_cannot_be_loaded_harms_no_other(tiny_bundle: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_bundle, tmp_path / "broken")
    with serving(tiny_bundle, tmp_path / "log", f"other={broken}", "--max-memory", "1") as server:
        assert server.client.get("/v1/model").json()["models"] == [tiny_bundle.name, "other"]
        (broken / "step_01.onnx").write_bytes(b"damaged")
        answer = server.draw(label=1, model="other")
        assert answer.status_code == 500 and "step_01.onnx" in answer.json()["error"]["message"]
        assert server.draw(label=1, model="none").status_code == 422
        assert server.draw(label=1, seed=1).status_code == 200
        shutil.copy(tiny_bundle / "step_01.onnx", broken)
        assert server.draw(label=1, seed=1, model="other").content == server.draw(label=1, seed=1).content
        metrics = server.client.get("/metrics").text
        assert 'fastvar_accepted_requests_total{model="other"} 1.0' in metrics
        assert server.stop() == -signal.SIGTERM
