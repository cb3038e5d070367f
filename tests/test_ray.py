"""Two replicas behind Ray Serve on this machine, one killed under load."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar_trt.runtime import Pipeline, RequestError
from fastvar_trt.serving.ray_deployment import app

# A process of its own: Ray starts servers and changes the process that it is imported into.
_DRIVER = """
import hashlib, io, json, os, signal, sys, threading, time
import httpx, numpy as np, psutil, ray
from PIL import Image
from ray import serve
from fastvar_trt.serving.ray_deployment import app

bundle, port, name = sys.argv[1], int(sys.argv[2]), f"test{os.getpid()}"
url = f"http://127.0.0.1:{port}"
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(app({"bundle": bundle, "num_replicas": "2", "num_cpus": 0.5, "num_threads": 1}), name=name)

def replicas():
    found = psutil.process_iter(["pid", "cmdline"])
    return {p.pid for p in found if any(f"ServeReplica:{name}:" in part for part in p.info["cmdline"] or ())}

before, statuses, images = replicas(), [], {}
assert len(before) == 2, before
stop = threading.Event()

def client(start):
    seed = start
    while not stop.is_set():
        try:
            answer = httpx.post(url + "/v1/images", json={"label": 1, "seed": seed % 5}, timeout=60)
        except httpx.HTTPError as error:
            statuses.append(0)
            continue
        statuses.append(answer.status_code)
        if answer.status_code == 200:
            pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
            images.setdefault(seed % 5, set()).add(hashlib.sha256(pixels.tobytes()).hexdigest())
        seed += 1

threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(4)]
for thread in threads:
    thread.start()
while statuses.count(200) < 20:
    time.sleep(0.05)
os.kill(min(before), signal.SIGKILL)
limit = time.monotonic() + 90
while (len(replicas() - {min(before)}) < 2) and time.monotonic() < limit:
    time.sleep(0.1)
restarted = statuses.count(200)
while statuses.count(200) < restarted + 20 and time.monotonic() < limit:
    time.sleep(0.05)
stop.set()
for thread in threads:
    thread.join()
after = replicas()
print(json.dumps({
    "before": len(before), "after": len(after), "new": len(after - before), "ok": statuses.count(200),
    "lost": len(statuses) - statuses.count(200), "last": statuses[-5:],
    "images": {seed: sorted(hashes) for seed, hashes in images.items()},
}))
serve.shutdown()
ray.shutdown()
"""


def test_a_replica_that_is_killed_is_replaced(tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(tiny_bundle), str(port)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"before"')))
    assert (found["before"], found["after"], found["new"]) == (2, 2, 1)
    assert found["ok"] >= 40
    assert found["lost"] <= 10  # what the dead replica had taken; its clients are told
    assert found["last"] == [200] * 5
    with Pipeline.load(tiny_bundle) as pipe:
        for seed, hashes in found["images"].items():
            expected = pipe.generate([1], seeds=[int(seed)]).images[0].tobytes()
            assert hashes == [hashlib.sha256(expected).hexdigest()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "bundle: is missing"),
        ({"bundle": "b", "num_replicas": "two"}, "num_replicas: got 'two', expected a number"),
        ({"bundle": "b", "replicas": 2}, "replicas: no such argument"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        app(arguments)
