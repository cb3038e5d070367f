"""The page of the server in a real browser: Chromium, driven by Selenium. Skipped by name where there is none."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as DriverService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from fastvar_trt.runtime import Pipeline
from server_process import serving

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # No sandbox: it does not start as root, which CI is; the page is our own.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}/profile",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=DriverService(DRIVER))
    yield driver
    driver.quit()


def test_a_person_draws_a_picture(tiny_bundle: Path, tmp_path: Path, browser: Any) -> None:
    with Pipeline.load(tiny_bundle) as pipe:
        expected = pipe.generate([4], seeds=[77], cfg=2.0).images[0]

    def enter(name: str, text: str) -> None:
        field = browser.find_element(By.ID, name)
        field.clear()
        field.send_keys(text)

    def status() -> str:
        return str(browser.find_element(By.ID, "status").text)

    def draw_and_wait(start: str) -> None:
        browser.find_element(By.ID, "draw").click()
        WebDriverWait(browser, 60).until(lambda _: status().startswith(start))

    with serving(tiny_bundle, tmp_path / "log") as server:
        browser.get(server.url + "/")
        WebDriverWait(browser, 60).until(lambda _: browser.find_element(By.ID, "label").is_displayed())
        assert browser.find_element(By.ID, "bundle").text == "var, 128x128, fp32, plan tiny"
        assert not browser.find_element(By.ID, "prompt").is_displayed()
        # Every source that the picture gets: previews come and go too fast to be looked at.
        browser.execute_script(
            "window.sources = [];"
            "new MutationObserver((all) => all.forEach((m) => window.sources.push(m.target.src)))"
            ".observe(document.getElementById('image'), {attributes: true, attributeFilter: ['src']});"
        )
        for name, text in (("label", "4"), ("seed", "77"), ("cfg", "2")):
            enter(name, text)
        draw_and_wait("Seed 77, ")
        *previews, last = browser.execute_script("return window.sources")
        assert len({source[:22] for source in previews}) == 1 and len(previews) == 3
        assert previews[0].startswith("data:image/jpeg")
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(last.partition(",")[2]))))
        np.testing.assert_array_equal(picture, expected)
        size = browser.execute_script(
            "const i = document.getElementById('image'); return [i.naturalWidth, i.naturalHeight]"
        )
        assert size == [128, 128]
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

        enter("temperature", "0.0000001")  # the browser allows it, the server does not
        draw_and_wait("temperature: got")
        assert browser.find_element(By.ID, "status").get_attribute("class") == "error"
        server.stop()
        enter("temperature", "1")
        draw_and_wait("The server cannot be reached")
