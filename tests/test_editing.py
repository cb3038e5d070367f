"""Editing: pictures as tokens, in-painting, kept scales; against what the public reference code computed, and ours."""

from __future__ import annotations

import dataclasses
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY_PATCH_NUMS, Golden, run, thorough, tiny_infinity, tiny_states
from fastvar_trt.export.exporter import ExportOptions, ExportReport, export_again, export_model, load_bundle_model
from fastvar_trt.export.models.hart.source import HARTSource
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import CheckpointError, Pipeline, PruningPlan, Request, RequestError
from fastvar_trt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fastvar_trt.runtime.given import given_tensors
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.runtime.pictures import check_same_size, fitted, fitted_mask, pasted, read_picture
from fastvar_trt.runtime.request import example_requests
from fastvar_trt.tools.cli import main
from fastvar_trt.tools.random_checkpoints import random_hart_folders
from test_code import tiny_pair

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


# Our own tiny models, whose plan skips the last scale.


@pytest.fixture(scope="module")
def pipe(editing_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(editing_bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def image() -> Any:
    """A picture of the tiny model's size, smooth but for a disc."""
    y, x = np.mgrid[0:128, 0:128] / 128
    picture = np.stack([0.3 + 0.5 * x, 0.2 + 0.6 * y, 0.5 + 0.3 * np.sin(6 * x)], axis=-1)
    picture[(x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.06] = (0.9, 0.3, 0.1)
    return (255 * picture).astype(np.uint8)


@pytest.fixture(scope="module")
def mask() -> Any:
    """The right half."""
    found = np.zeros((128, 128), dtype=bool)
    found[:, 64:] = True
    return found


def test_what_is_kept_is_the_picture_s_at_skipped_scales_too(editing_bundle: Path, image: Any, pipe: Pipeline) -> None:
    model, manifest = load_bundle_model(editing_bundle)
    with torch.inference_mode():
        tokens, f_hat, detail = model.encode(torch.from_numpy(image)[None], manifest.resolved_plan)
        expected = model.decode(f_hat)[0]
    assert detail.abs().max() > 0.01
    picture = pipe.encode_image(image)
    for k, own in enumerate(picture.tokens):
        np.testing.assert_array_equal(own, tokens[k][0])
    np.testing.assert_allclose(picture.detail, detail[0], atol=1e-4)
    nothing = np.zeros((128, 128), dtype=bool)
    result = pipe.generate([3], image=image, mask=nothing, return_float_images=True, paste=False)
    assert result.float_images is not None
    np.testing.assert_allclose(result.float_images, expected, atol=2e-3)
    np.testing.assert_array_equal(pipe.generate([3], image=image, mask=nothing).images[0], image)  # pasted


def test_only_what_is_masked_is_drawn(pipe: Pipeline, image: Any, mask: Any) -> None:
    picture = pipe.encode_image(image)
    first, second = (pipe.generate([3], seeds=seed, image=image, mask=mask) for seed in (1, 2))
    side = TINY_PATCH_NUMS[-2]
    for result in (first, second):
        own = result.tokens[-1].reshape(side, side)
        np.testing.assert_array_equal(own[:, : side // 2], picture.tokens[2].reshape(side, side)[:, : side // 2])
        np.testing.assert_array_equal(result.images[0][:, :64], image[:, :64])
    assert (first.tokens[-1] != second.tokens[-1]).any()
    assert (first.images[0][:, 80:] != image[:, 80:]).any()
    again = pipe.generate([3], seeds=1, image=image, mask=mask)
    np.testing.assert_array_equal(again.images, first.images)


@pytest.mark.parametrize("kept", [1, 2])
def test_kept_scales_are_the_picture_s(pipe: Pipeline, image: Any, kept: int) -> None:
    picture = pipe.encode_image(image)
    result = pipe.generate([3], seeds=5, image=image, keep_scales=kept)
    plain = pipe.generate([3], seeds=5)
    for k, tokens in enumerate(result.tokens):
        assert (tokens[0] == picture.tokens[k]).all() == (k < kept), k
    assert (plain.tokens[0] != result.tokens[0]).any()


def test_an_edit_does_not_depend_on_its_neighbours(pipe: Pipeline, image: Any, mask: Any) -> None:
    requests = [
        Request(label=1, seed=4),
        Request(label=3, seed=1, image=image, mask=mask),
        Request(label=2, seed=9, image=image, keep_scales=1),
    ]
    together = pipe.draw(requests)
    for i, request in enumerate(requests):
        np.testing.assert_array_equal(pipe.draw([request]).images[0], together.images[i])


def test_without_a_picture_nothing_changes(pipe: Pipeline, export_once: Export, editing_bundle: Path) -> None:
    source = VARSource.from_state(*tiny_states(with_encoder=True))
    plan = read_manifest(editing_bundle).default.plan
    bundle, _ = export_once("without_encoder", source, ExportOptions(plan=plan, batches=(1, 2)))
    with Pipeline.load(bundle) as other:
        ours, theirs = (each.generate([1, 2, 3], seeds=4) for each in (pipe, other))
        np.testing.assert_array_equal(ours.images, theirs.images)
        with pytest.raises(RequestError, match="no image encoder; export it with --with-encoder"):
            other.generate([1], image=np.zeros((128, 128, 3), np.uint8), keep_scales=1)
        with pytest.raises(RequestError, match="no image encoder"):
            other.encode_image(np.zeros((128, 128, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image": "half"},
            r"image: got uint8 \[64, 64, 3\], expected uint8 \[128, 128, 3\]; `runtime.pictures.fitted`",
        ),
        ({"image": "floats"}, r"image: got float64 \[128, 128, 3\], expected uint8"),
        ({"image": None}, "mask: needs an image"),
        ({"image": None, "mask": None, "keep_scales": 1}, "keep_scales: needs an image"),
        ({"mask": None}, r"image: give a mask .*, keep_scales .*, or both"),
        ({"mask": np.zeros((64, 64), bool)}, r"mask: got bool \[64, 64\], expected bool \[128, 128\]"),
        ({"mask": np.zeros((128, 128))}, "mask: got float64"),
        ({"keep_scales": 0}, "keep_scales: got 0, expected 1 to 3"),
        ({"keep_scales": 4}, "keep_scales: got 4, expected 1 to 3"),
        ({"image": ["one", "two"]}, r"image: got 2, expected one, or one per image \(1\)"),
    ],
)
def test_what_cannot_be_edited(pipe: Pipeline, image: Any, mask: Any, changes: dict[str, Any], message: str) -> None:
    named = {"half": image[:64, :64], "floats": image / 255}
    given = {"image": image, "mask": mask, **changes}
    if isinstance(given["image"], str):
        given["image"] = named[given["image"]]
    with pytest.raises(RequestError, match=message):
        pipe.generate([1], **given)


def test_given_tokens_are_checked(pipe: Pipeline, image: Any, mask: Any) -> None:
    given = given_tensors(pipe.manifest.default, pipe.encode_image(image), mask)
    expected = pipe.generate([3], seeds=1, image=image, mask=mask, paste=False).images[0]
    np.testing.assert_array_equal(pipe.draw([Request(label=3, seed=1, given=given)]).images[0], expected)
    for changed, message in (
        ({"given_01": given["given_01"].astype(np.int64)}, r"given: given_01: got int64 \[9\], expected int32 \[9\]"),
        ({"is_given_01": given["is_given_02"]}, r"given: is_given_01: got bool \[25\], expected bool \[9\]"),
        ({"given_09": given["given_01"]}, "given: got 'given_09', this size takes given_00"),
    ):
        with pytest.raises(RequestError, match=message):
            pipe.draw([Request(label=3, given={**given, **changed})])


def test_the_encoder_leaves_no_memory_behind(editing_bundle: Path, image: Any, mask: Any) -> None:
    with Pipeline.load(editing_bundle) as usual, Pipeline.load(editing_bundle, low_memory=True) as low:
        expected = usual.generate([3], image=image, mask=mask)
        np.testing.assert_array_equal(low.generate([3], image=image, mask=mask).images, expected.images)
        assert isinstance(low.backend, OnnxRuntimeBackend)
        assert not [file for file in low.backend._sessions if file.startswith(("image_encoder", "decoder"))]
        *previews, last = usual.stream([3], image=image, mask=mask, preview_scales=[0, 1])
        assert [preview.scale for preview in previews] == [0, 1]
        np.testing.assert_array_equal(last.images, expected.images)


@pytest.mark.parametrize("patchify", [thorough(False), True])
def test_infinity_encodes_as_pytorch(patchify: bool, export_once: Export, tmp_path: Path) -> None:
    """The comparison at export says so; here, that another plan has its own detail."""
    source = tiny_infinity(with_encoder=True, patchify=patchify).with_encoder()
    plan = PruningPlan("skipping", ((-2, 0.5), (-1, 1.0)), cache_scale=-3, first_layer=1)
    bundle, report = export_once(f"infinity_{patchify}", source, ExportOptions(plan=plan))
    assert report.errors["image_encoder.onnx"].relative_error < 1e-4
    height, width = source.config.code_schedule[-1]
    factor = source.vae_config.pixels_per_code
    picture = np.random.default_rng(0).integers(0, 256, (factor * height, factor * width, 3), dtype=np.uint8)
    dense = tmp_path / "dense"
    again = export_again(bundle, dense, PruningPlan())
    assert "image_encoder.onnx" in again.traced  # nothing is skipped any more
    for path, is_skipped in ((bundle, True), (dense, False)):
        with Pipeline.load(path) as pipe:
            encoded = pipe.encode_image(picture)
            assert encoded.detail.any() == is_skipped
            features = np.zeros((3, 128), np.float32)
            nothing = np.zeros(picture.shape[:2], bool)
            kept = pipe.generate(text_features=[features], image=picture, mask=nothing)
            total = kept.f_hat[0] + encoded.detail
            np.testing.assert_allclose(total, encoded.f_hat, atol=1e-4)


@pytest.mark.thorough
def test_a_pair_and_a_hart_encode_pictures(tmp_path: Path) -> None:
    pair = tiny_pair(with_encoder=True).with_encoder()
    llm = random_hart_folders(
        tmp_path,
        depth=2,
        width=128,
        num_heads=2,
        patch_nums=TINY_PATCH_NUMS,
        context_tokens=6,
        text_width=64,
        vocab_size=96,
        with_encoder=True,
    )
    for name, source in (("pair", pair), ("hart", HARTSource.from_folders(llm).with_encoder())):
        report = export_model(source, tmp_path / name, ExportOptions())
        assert report.errors["image_encoder.onnx"].relative_error < 1e-3, name
        with Pipeline.load(tmp_path / name) as pipe:
            side = pipe.manifest.default.image_width
            picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
            encoded = pipe.encode_image(picture)
            request = example_requests(pipe.manifest, 1)[0]
            result = pipe.draw([dataclasses.replace(request, image=picture, keep_scales=2)])
            for k in range(2):
                np.testing.assert_array_equal(result.tokens[k][0], encoded.tokens[k], err_msg=name)


def test_a_file_without_encoder_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"--with-encoder: --vae: \d+ missing: encoder.conv_in.weight"):
        VARSource.from_state(*tiny_states()).with_encoder()
    with pytest.raises(CheckpointError, match="--with-encoder: --vae: the file has no encoder"):
        tiny_infinity().with_encoder()
    odd = tiny_infinity(with_encoder=True)
    key = "encoder.down.0.block.0.conv1.conv.weight"
    state = {**odd.vae_state, key: torch.zeros(40, *odd.vae_state[key].shape[1:])}
    with pytest.raises(CheckpointError, match=r"block\.0\.conv1: got 40 channels, expected a multiple of 32 or 24"):
        dataclasses.replace(odd, vae_state=state).with_encoder()


# Pictures as files.


def png(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", **options)
    return file.getvalue()


def test_files_become_pictures(image: Any) -> None:
    exact = fitted(read_picture(png(image)), 128, 128)
    np.testing.assert_array_equal(exact, image)
    turned = Image.fromarray(np.rot90(image).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera that was held upright
    file = io.BytesIO()
    turned.save(file, format="PNG", exif=exif)
    np.testing.assert_array_equal(fitted(read_picture(file.getvalue()), 128, 128), image)
    grey = fitted(read_picture(png(image[..., 0])), 128, 128)
    np.testing.assert_array_equal(grey, np.repeat(image[..., :1], 3, axis=-1))
    deep = fitted(read_picture(png(image[..., 0].astype(np.uint16) << 8)), 128, 128)
    np.testing.assert_array_equal(deep, grey)
    clear = fitted(read_picture(png(np.dstack([image, np.zeros_like(image[..., 0])]))), 128, 128)
    assert (clear == 255).all()  # what is transparent is white
    wide = fitted(read_picture(png(np.pad(image, ((0, 0), (64, 64), (0, 0))))), 128, 128)
    np.testing.assert_array_equal(wide, image)  # the middle
    assert fitted(read_picture(png(image)), 256, 64).shape == (64, 256, 3)


def test_masks_are_light_or_transparent(image: Any, mask: Any) -> None:
    light = png(np.where(mask, 255, 0).astype(np.uint8))
    clear = png(np.dstack([image, np.where(mask, 0, 255).astype(np.uint8)]))
    opaque = png(np.dstack([*3 * [np.where(mask, 255, 0)], np.full(mask.shape, 255)]).astype(np.uint8))  # a browser's
    for file in (light, clear, opaque):
        np.testing.assert_array_equal(fitted_mask(read_picture(file), 128, 128), mask)
    with pytest.raises(RequestError, match="mask: got 128x128, expected 64x64, the size of its image"):
        check_same_size(read_picture(png(image[:64, :64])), read_picture(light))


def test_what_is_pasted_has_the_picture_s_colours(image: Any, mask: Any) -> None:
    off = np.clip(image + np.array([9, -7, 5]), 0, 255).astype(np.uint8)  # as if decoded a little off
    found = pasted(off, image, mask)
    np.testing.assert_array_equal(found[:, :64], image[:, :64])
    assert np.abs(found.astype(int) - image)[:, 66:].max() <= 3
    everything, nothing = (np.full(mask.shape, value) for value in (True, False))
    np.testing.assert_array_equal(pasted(off, image, everything), off)  # of which nothing is known
    np.testing.assert_array_equal(pasted(off, image, nothing), image)
    odd = np.zeros((37, 23, 3), np.uint8)
    assert pasted(odd, odd, np.ones((37, 23), bool)).shape == odd.shape


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="image: cannot be read as a picture"):
        read_picture(b"no picture")
    with pytest.raises(RequestError, match=f"image {tmp_path / 'none.png'}: cannot be read as a picture"):
        read_picture(tmp_path / "none.png")
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, format="PNG")
    assert len(bomb.getvalue()) < 20_000
    tracemalloc.start()
    with pytest.raises(RequestError, match="image: got 10000x10000, expected at most 40 megapixels"):
        read_picture(bomb.getvalue())
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    half = png(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(RequestError, match="mask: cannot be read as a picture"):
        read_picture(half[: len(half) // 2], "mask")


# The command.


def test_the_command_edits_and_says_how(editing_bundle: Path, tmp_path: Path, pipe: Pipeline, image: Any) -> None:
    big = np.repeat(np.repeat(image, 2, 0), 2, 1)
    (tmp_path / "in.png").write_bytes(png(big))
    box = np.zeros(big.shape[:2], np.uint8)
    box[:, 128:] = 255
    (tmp_path / "mask.png").write_bytes(png(box))
    out = tmp_path / "out.png"
    common = ("edit", editing_bundle, "--image", tmp_path / "in.png", "--class", 3, "--seed", 7, "-o", out)
    found = run(main, *common, "--mask", tmp_path / "mask.png")
    assert found.exit_code == 0, found.output
    ours = fitted(Image.fromarray(big), 128, 128)
    expected = pipe.generate([3], seeds=7, image=ours, mask=fitted_mask(Image.fromarray(box), 128, 128))
    with Image.open(out) as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), expected.images[0])
        text = json.loads(drawn.text["fastvar"])
    assert (text["labels"], text["seed"], text["edited"], text["plan"]) == ([3], 7, True, "skipping")
    assert text["bundle_sha256"] == pipe.manifest.identity and text["paste"] is True
    values = ("--class", 3, "--cfg", "3,3,2,1", "--top-p", 0.9)
    assert run(main, "generate", editing_bundle, *values, "-o", tmp_path / "drawn.png").exit_code == 0
    with Image.open(tmp_path / "drawn.png") as drawn:
        told = json.loads(drawn.text["fastvar"])
    assert (told["labels"], told["cfg"], told["top_p"], told["edited"]) == ([3], [3, 3, 2, 1], 0.9, False)
    assert run(main, *common, "--keep-scales", 2).exit_code == 0
    (tmp_path / "mask.png").write_bytes(png(box[:64, :64]))
    for arguments, code, message in (
        ((*common, "--mask", tmp_path / "mask.png"), 1, "mask: got 64x64, expected 256x256"),
        (common, 2, "give --mask, --keep-scales, or a picture that is transparent"),
        ((*common, "--keep-scales", 9), 1, "keep_scales: got 9"),
        ((*common, "--keep-scales", 1, "--size", "64x64"), 1, "size: got '64x64', this bundle draws 128x128"),
    ):
        before = out.read_bytes()
        found = run(main, *arguments)
        assert found.exit_code == code and message in found.output, found.output
        assert out.read_bytes() == before
