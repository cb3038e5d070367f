"""The page of the server in a real browser; skipped by name where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

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
