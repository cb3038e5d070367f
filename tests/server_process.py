"""`fastvar serve` as a process of its own, its page, and a gate that holds what it draws."""

from __future__ import annotations

import base64
import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

FASTVAR = (sys.executable, "-c", "from fastvar_trt.tools.cli import main; main()")
FASTVAR_EXPORT = (sys.executable, "-c", "from fastvar_trt.tools.cli.export import main; main()")
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

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first place of the log with the pattern, as soon as it is there."""
        limit = time.monotonic() + START_S
        while time.monotonic() < limit:
            found = re.search(pattern, self.log)
            if found is not None:
                return found
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in:\n{self.log}")

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Ask again and again, for a limited time."""
        limit = time.monotonic() + START_S
        while not condition():
            assert time.monotonic() < limit, self.log
            time.sleep(0.01)

    def draw(self, **body: object) -> httpx.Response:
        """POST /v1/images."""
        return self.client.post("/v1/images", json=body)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal, and wait for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(START_S)


class Page:
    """The server's page in a browser, loaded as far as a field of it says something."""

    def __init__(self, browser: Any, url: str, field: str = "bundle") -> None:
        self._browser = browser
        browser.get(url + "/")
        self.wait_until(lambda: self.field(field).text != "")

    def field(self, name: str) -> Any:
        """The element of that id."""
        return self._browser.find_element(By.ID, name)

    def has(self, name: str) -> bool:
        """Whether there is an element of that id."""
        return bool(self._browser.find_elements(By.ID, name))

    def enter(self, name: str, text: str) -> None:
        """Type into a field in place of what is in it."""
        self.field(name).clear()
        self.field(name).send_keys(text)

    def draw_and_wait(self, start: str) -> None:
        """Press the button, and wait for a status that starts so."""
        self.field("draw").click()
        self.wait_until(lambda: self.field("status").text.startswith(start))

    def picture(self) -> Any:
        """What is shown: uint8 [H, W, 3]."""
        source = self.field("image").get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Ask again and again, for a limited time."""
        WebDriverWait(self._browser, START_S).until(lambda _: condition())


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
