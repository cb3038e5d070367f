"""Editing: pictures as tokens, in-painting, kept scales; against what the public reference code computed, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import Golden
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.runtime import Pipeline

Export = Callable[..., tuple[Path, ExportReport]]
PROBED = 64  # positions of the logits that a golden holds


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("var_encode_256")


@pytest.fixture(scope="module")
def golden_pipe(golden: Golden, export_once: Export) -> Iterator[Pipeline]:
    source = Golden("var_d4_256").source().with_encoder()
    bundle, _ = export_once("var_encode_256", source, ExportOptions(compare=False))
    with Pipeline.load(bundle) as pipe:
        yield pipe


def golden_mask(golden: Golden) -> np.ndarray:
    """The box of the case, which is drawn."""
    box, side = golden.case["edit_box"], golden.case["patch_nums"][-1]
    rows = slice(*(16 * round(side * box[name]) for name in ("y0", "y1")))
    columns = slice(*(16 * round(side * box[name]) for name in ("x0", "x1")))
    mask = np.zeros((16 * side, 16 * side), dtype=bool)
    mask[rows, columns] = True
    return mask


def test_a_picture_has_the_reference_s_tokens(golden: Golden, golden_pipe: Pipeline) -> None:
    picture = golden_pipe.encode_image(golden.expected["source_image"][0])
    for k, tokens in enumerate(picture.tokens):
        np.testing.assert_array_equal(tokens, golden.expected[f"enc_idx_{k}"][0], err_msg=f"scale {k}")
    np.testing.assert_allclose(picture.f_hat, golden.expected["enc_f_hat_9"][0], atol=1e-4)
    assert not picture.detail.any()  # nothing is skipped


def test_a_kept_picture_is_its_reconstruction(golden: Golden, golden_pipe: Pipeline) -> None:
    image = golden.expected["source_image"][0]
    nothing = np.zeros(image.shape[:2], dtype=bool)
    result = golden_pipe.generate(golden.case["labels"], image=image, mask=nothing, return_float_images=True)
    assert result.float_images is not None
    np.testing.assert_allclose(result.float_images, golden.expected["enc_image"], atol=1 / 255)


def test_in_painting_reproduces_the_reference(golden: Golden, golden_pipe: Pipeline) -> None:
    result = golden_pipe.generate(
        golden.case["labels"],
        image=golden.expected["source_image"][0],
        mask=golden_mask(golden),
        cfg=golden.case["cfg"],
        greedy=True,
        return_logits=True,
        return_float_images=True,
    )
    assert result.logits is not None and result.float_images is not None
    for k, (tokens, logits) in enumerate(zip(result.tokens, result.logits, strict=True)):
        np.testing.assert_array_equal(tokens, golden.expected[f"idx_{k}"], err_msg=f"scale {k}")
        np.testing.assert_allclose(logits[:, :PROBED], golden.expected[f"logits_{k}"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(result.f_hat, golden.expected["f_hat_9"], atol=1e-3)
    np.testing.assert_allclose(result.float_images, golden.expected["image"], atol=1 / 255)
