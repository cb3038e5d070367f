"""The page of the server in a real browser; skipped by name where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains

from fastvar_trt.runtime import Pipeline
from server_process import Page, serving


def test_a_person_draws_a_picture(tiny_bundle: Path, tmp_path: Path, browser: Any) -> None:
    with Pipeline.load(tiny_bundle) as pipe:
        expected = pipe.generate([4], seeds=[77], cfg=2.0).images[0]
    with serving(tiny_bundle, tmp_path / "log") as server:
        page = Page(browser, server.url)
        assert page.field("bundle").text == "var, 128x128, fp32, plan tiny"
        assert not page.has("prompt")
        # Every source that the picture gets: previews come and go too fast to be looked at.
        browser.execute_script(
            "window.sources = [];"
            "new MutationObserver((all) => all.forEach((m) => window.sources.push(m.target.src)))"
            ".observe(document.getElementById('image'), {attributes: true, attributeFilter: ['src']});"
        )
        for name, text in (("label", "4"), ("seed", "77"), ("cfg", "2")):
            page.enter(name, text)
        page.draw_and_wait("Seed 77, ")
        previews = [s for s in browser.execute_script("return window.sources") if s.startswith("data:image/jpeg")]
        assert 1 <= len(previews) <= 3
        np.testing.assert_array_equal(page.picture(), expected)
        shown = page.field("image")
        assert [shown.get_property(f"natural{side}") for side in ("Width", "Height")] == [128, 128]
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

        page.enter("cfg", "1000")  # the page allows it, the server does not
        page.draw_and_wait("body.cfg: Input should be less than or equal to 100")
        assert page.field("status").get_attribute("class") == "error"
        server.stop()
        page.enter("cfg", "2")
        page.draw_and_wait("The server cannot be reached")


def test_a_person_edits_a_picture(editing_bundle: Path, tmp_path: Path, browser: Any) -> None:
    """With a key, an example, a picture of their own and a mask that they paint; and downloads the result."""
    (tmp_path / "keys").write_text("a-key-of-somebody\n")
    y, x = np.mgrid[0:128, 0:128] / 128
    image = (255 * np.stack([x, y, 0.5 + 0.3 * np.sin(6 * x)], axis=-1)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png")
    with serving(editing_bundle, tmp_path / "log", "--api-key-file", str(tmp_path / "keys")) as server:
        page = Page(browser, server.url, "status")
        assert page.field("status").text.startswith("no valid API key")
        page.enter("key", "a-key-of-somebody\t")
        page.wait_until(lambda: page.field("bundle").text != "")
        assert page.field("editing").is_displayed() and not page.field("keep_scales").is_displayed()
        for name, text in (("label", "3"), ("seed", "5")):
            page.enter(name, text)
        page.draw_and_wait("Seed 5, ")
        drawn = page.picture()
        assert page.field("download").get_attribute("href") == page.field("image").get_attribute("src")

        page.field("file").send_keys(str(tmp_path / "in.png"))
        page.wait_until(lambda: page.field("mask").get_property("width") == 128)
        assert page.field("keep_scales").is_displayed()
        page.draw_and_wait("image: give a mask")
        canvas = page.field("mask")
        width = canvas.size["width"]
        ActionChains(browser).move_to_element_with_offset(canvas, width // 4, 0).click_and_hold().move_by_offset(
            0, width // 8
        ).release().perform()
        page.draw_and_wait("Seed 5, ")
        edited = page.picture()
        changed = (edited != image).any(axis=-1)
        assert changed[64:, 80:].any() and not changed[:, :64].any()
        page.field("stop").click()
        assert page.field("draw").text == "Draw"
        page.draw_and_wait("Seed 5, ")
        np.testing.assert_array_equal(page.picture(), drawn)
        problems = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert len(problems) == 2 and "401" in problems[0] and "422" in problems[1], problems
