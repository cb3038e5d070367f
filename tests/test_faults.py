"""Faults, injected: after each the next request is answered with the right picture, and nothing is left behind."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import uvicorn
from PIL import Image

from conftest import tiny_states
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.folders import replace_folder, temporary_folder
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import ImageRequest, Pipeline, RequestError, Service
from fastvar_trt.runtime.manifest import MANIFEST_FILE, WEIGHTS_FILE, FileSpec
from fastvar_trt.runtime.models import Models
from fastvar_trt.serving.http.app import create_app
from fastvar_trt.serving.http.server import DrainingServer, parse_rate
from faulty_backend import FaultyBackend, Gate
from server_process import FASTVAR, FASTVAR_EXPORT, serving

Export = Callable[..., tuple[Path, ExportReport]]


def decoded(answer: httpx.Response) -> Any:
    """The picture, uint8 [H, W, 3]."""
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def other_bundle(bundle: Path, path: Path) -> Path:
    """A copy with other weights, which draws other pictures."""
    shutil.copytree(bundle, path)
    with (path / WEIGHTS_FILE).open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        for entry in entries.values():
            if entry["dtype"] == "F32":
                start, stop = entry["data_offsets"]
                file.seek(8 + length + start)
                values = np.frombuffer(file.read(stop - start), dtype=np.float32) * np.float32(1.1)
                file.seek(8 + length + start)
                file.write(values.tobytes())
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    spec = FileSpec.of(path / WEIGHTS_FILE)
    manifest["files"][WEIGHTS_FILE] = {"num_bytes": spec.num_bytes, "sha256": spec.sha256}
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))
    return path


def replace(bundle: Path, new: Path) -> None:
    """Swap the folder as `fastvar-export --force` does."""
    with temporary_folder(bundle) as folder:
        shutil.copytree(new, folder, dirs_exist_ok=True)
        replace_folder(folder, bundle)


def picture(bundle: Path, label: int, seed: int) -> Any:
    """What the pipeline draws."""
    with Pipeline.load(bundle) as pipe:
        return pipe.generate([label], seeds=[seed]).images[0]


def test_a_bundle_that_is_replaced_while_it_is_served(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, other = shutil.copytree(tiny_bundle, tmp_path / "b"), other_bundle(tiny_bundle, tmp_path / "other")
    old, new = picture(bundle, 1, 3), picture(other, 1, 3)
    assert (old != new).any()
    statuses: list[int] = []
    with serving(bundle, tmp_path / "log") as server, ThreadPoolExecutor(1) as pool:
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                answer = server.draw(label=1, seed=3)
                statuses.append(answer.status_code)
                image = decoded(answer)
                assert (image == old).all() or (image == new).all(), "a mixture of both"

        np.testing.assert_array_equal(decoded(server.draw(label=1, seed=3)), old)
        loading = pool.submit(load)
        try:
            replace(bundle, other)
            np.testing.assert_array_equal(decoded(server.draw(label=1, seed=3)), old)  # until it is told
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("the bundle was loaded again")
            np.testing.assert_array_equal(decoded(server.draw(label=1, seed=3)), new)
            (bundle / "step_01.onnx").write_bytes(b"damaged")
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("cannot be loaded again; the old one stays")
            np.testing.assert_array_equal(decoded(server.draw(label=1, seed=3)), new)
        finally:
            stop.set()
        loading.result(60)
        assert server.stop() == -signal.SIGTERM
    assert set(statuses) == {200}
    assert {p.name for p in tmp_path.iterdir()} == {"b", "other", "log"}


def test_a_server_that_is_killed_under_load_serves_again(tiny_bundle: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_bundle.iterdir()}
    expected = picture(tiny_bundle, 2, 5)
    with serving(tiny_bundle, tmp_path / "log") as server, ThreadPoolExecutor(4) as pool:

        def ask(seed: int) -> bool:
            try:
                return server.draw(label=2, seed=seed).status_code == 200
            except httpx.TransportError:
                return False

        outcomes = [pool.submit(ask, seed) for seed in range(400)]  # more than there is time for
        server.wait_until(lambda: server.client.get("/healthz").json()["running"] > 0)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        found = [outcome.result(60) for outcome in outcomes]
    assert not all(found)
    with serving(tiny_bundle, tmp_path / "log2") as server:
        np.testing.assert_array_equal(decoded(server.draw(label=2, seed=5)), expected)
        assert server.stop(signal.SIGINT) == 0  # as a person ends it
        assert "Aborted" not in server.log
    assert {path: path.stat().st_mtime_ns for path in tiny_bundle.iterdir()} == before


def test_a_server_that_is_told_to_stop_ends_its_requests(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, tmp_path / "log") as server, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.draw, label=1, seed=i) for i in range(8)]
        server.wait_until(
            lambda: 'fastvar_accepted_requests_total{model="tiny"} 8.0' in server.client.get("/metrics").text
        )
        assert server.stop() == -signal.SIGTERM  # uvicorn ends as the signal asks, after everything else
        assert "Application shutdown complete" in server.log
        assert [answer.result(60).status_code for answer in answers] == [200] * 8
        with pytest.raises(httpx.ConnectError):
            server.client.get("/healthz")


def test_a_server_that_cannot_start_says_why(tiny_bundle: Path, tmp_path: Path) -> None:
    def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*FASTVAR, "serve", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    missing = serve(str(tmp_path / "none"))
    assert missing.returncode == 1
    assert "no such folder; make one with fastvar-export" in missing.stderr
    for text in ("often", "0/minute", "10/minute;1000/hour"):
        with pytest.raises(RequestError, match=r"--rate: got '.*', expected one as in 60/minute"):
            parse_rate(text)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = serve(str(tiny_bundle), "--port", str(taken.getsockname()[1]))
    assert busy.returncode == 1
    assert "cannot listen there: Address already in use" in busy.stderr


@contextmanager
def local_server(service: Service, drain_s: float = 30.0) -> Iterator[int]:
    """The application on a real socket, in a thread of this process; gives the port."""
    models = Models.of(service)
    server = DrainingServer(uvicorn.Config(create_app(models), port=0, log_level="warning"), models, drain_s)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(60)


@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/stream"])
def test_a_request_that_outlasts_the_drain_is_answered(
    tiny_bundle: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FaultyBackend()
    pipe = Pipeline.load(tiny_bundle, backend=backend)
    gate = Gate(backend, monkeypatch, "step_01")
    with ThreadPoolExecutor(1) as pool:
        with local_server(Service(pipe, max_wait_s=0), drain_s=0.1) as port:
            answer = pool.submit(httpx.post, f"http://127.0.0.1:{port}{path}", json={"label": 1}, timeout=60)
            assert gate.entered.wait(60)
            answer.add_done_callback(lambda _: gate.open.set())
        assert answer.result(60).status_code == (200 if path.endswith("stream") else 504)
        assert "the service was closed before the picture was there" in answer.result().text


@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/stream"])
def test_a_client_that_disconnects(tiny_bundle: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asked for is not drawn to the end: the batch stops before its next scale."""
    backend = FaultyBackend()
    pipe = Pipeline.load(tiny_bundle, backend=backend)
    expected = pipe.generate([1], seeds=[3]).images[0]
    ran_on = threading.Event()
    service = Service(pipe, max_wait_s=0)
    with local_server(service) as port:
        with monkeypatch.context() as patch:
            gate = Gate(backend, patch, "step_01")
            held = backend.before
            patch.setattr(backend, "before", lambda graph: (graph.name == "step_03" and ran_on.set(), held(graph)))
            body = b'{"label": 1, "seed": 3}'
            with socket.create_connection(("127.0.0.1", port)) as client:
                head = (
                    f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
                )
                client.sendall(head.encode() + b"\r\n\r\n" + body)
                assert gate.entered.wait(60)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as other:
                while not service._running[0].future.cancelled():  # the server has seen that the client is gone
                    time.sleep(0.01)
                gate.open.set()
                while (found := other.get("/healthz").json())["running"] or found["queued"]:
                    time.sleep(0.01)
                assert not ran_on.is_set()
                assert 'fastvar_requests_total{model="default",outcome="cancelled"} 1.0' in other.get("/metrics").text
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as other:
            answer = other.post("/v1/images", json={"label": 1, "seed": 3})
            np.testing.assert_array_equal(decoded(answer), expected)


_OUT_OF_MEMORY = """
import resource, sys
import numpy as np
import numpy.random
from fastvar_trt.runtime import BackendError, ImageRequest, Pipeline, Service

with Pipeline.load(sys.argv[1]) as pipe, Service(pipe, max_wait_s=0) as service:
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20), unlimited[1]))
    try:
        service.submit(ImageRequest(label=1, seed=3)).result(60)
        raise SystemExit("the limit was not reached")
    except (BackendError, MemoryError) as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    assert service.healthy
    np.save(sys.argv[2], service.submit(ImageRequest(label=1, seed=3)).result(60).image)
"""


def test_no_memory_for_the_activations(export_once: Export, tmp_path: Path) -> None:
    """A real one: the process may not grow. The decoder of 256x256 pixels wants more than is left."""
    source = VARSource.from_state(*tiny_states(patch_nums=(1, 4, 16), vae_channels=64))
    bundle, _ = export_once("large_pictures", source, ExportOptions())
    command = [sys.executable, "-c", _OUT_OF_MEMORY, str(bundle), str(tmp_path / "image.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Failed to allocate memory" in done.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "image.npy"), picture(bundle, 1, 3))


def test_an_export_that_is_killed_leaves_the_old_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    """Killed while it writes; the next one clears away what it left."""
    out = shutil.copytree(tiny_bundle, tmp_path / "b")
    expected = picture(out, 1, 1)
    command = [*FASTVAR_EXPORT, "bundle", "--from", str(tiny_bundle), "--prune", "none", "--out", str(out), "--force"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob(".b.partial-*/*")) and time.monotonic() < limit:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 1
    np.testing.assert_array_equal(picture(out, 1, 1), expected)
    with temporary_folder(out):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_no_memory_grows_over_requests(tiny_bundle: Path) -> None:
    """Pictures, previews, refused requests and abandoned ones in turn; all threads of this process are counted."""
    process = psutil.Process()
    with Pipeline.load(tiny_bundle) as pipe, Service(pipe, max_wait_s=0) as service:

        def run(count: int) -> None:
            for i in range(count):
                previews: list[Any] = []
                scales = (0, 2) if i % 5 == 0 else ()
                ticket = service.submit(ImageRequest(label=i % 10, seed=i, preview_scales=scales), previews.append)
                if i % 7 == 3:
                    ticket.cancel()
                else:
                    assert ticket.result(60).image.shape == (128, 128, 3)
                    assert len(previews) == len(scales)

        run(60)
        threads = process.num_threads()
        growths: list[float] = []
        for _ in range(3):
            before = process.memory_info().rss
            run(200)
            growths.append((process.memory_info().rss - before) / 2**20)
        assert service.drain(60)
        metrics = service.metrics()
    assert process.num_threads() <= threads
    assert metrics.completed + metrics.cancelled == 60 + 3 * 200
    # What leaks grows every time; an allocator's heaps grow once in a while.
    assert min(growths) < 3, f"{growths} MiB"
