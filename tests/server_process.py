"""`fastvar serve` as a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

FASTVAR = (sys.executable, "-c", "from fastvar_trt.tools.cli import main; main()")
FASTVAR_EXPORT = (sys.executable, "-c", "from fastvar_trt.export.cli import main; main()")
START_S = 120  # loading takes a second; the machine may be busy


class ServerProcess:
    """A server on a free port, its messages in a file."""

    def __init__(self, bundle: Path, log: Path, *options: str) -> None:
        self._log = log
        with log.open("w") as file:
            command = [*FASTVAR, "serve", str(bundle), "--port", "0", *options]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        found = self.wait_for(r"serving .* on (http://[\d.]+:\d+)")
        self.url = found.group(1)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text()

    def wait_for(self, pattern: str, count: int = 1) -> re.Match[str]:
        """The `count`-th place of the log with the pattern, as soon as it is there."""
        limit = time.monotonic() + START_S
        while time.monotonic() < limit:
            found = list(re.finditer(pattern, self.log))
            if len(found) >= count:
                return found[count - 1]
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in:\n{self.log}")

    def draw(self, **body: object) -> httpx.Response:
        """POST /v1/images."""
        return self.client.post("/v1/images", json=body)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal, and wait for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(START_S)


@contextmanager
def serving(bundle: Path, log: Path, *options: str) -> Iterator[ServerProcess]:
    """A server that is gone when the block ends."""
    server = ServerProcess(bundle, log, *options)
    try:
        yield server
    finally:
        server.client.close()
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
