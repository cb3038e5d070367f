"""Infinity: exported graphs against eager PyTorch, batches of prompts, plans that skip scales, requests, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import save_file

from conftest import INFINITY_MAPS, INFINITY_PLAN, INFINITY_SPAN, tiny_infinity
from fastvar_trt.export.exporter import ExportOptions, ExportReport, export_again
from fastvar_trt.export.models.base import Request
from fastvar_trt.export.models.checkpoint import load_state_dict
from fastvar_trt.export.models.infinity.checkpoint import rope_tables
from fastvar_trt.export.models.infinity.family import PLAN_OF_SIZE
from fastvar_trt.export.models.infinity.schedules import SIZES, ratios, schedule
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.models.registry import load_plan
from fastvar_trt.runtime import (
    CheckpointError,
    ExportError,
    Pipeline,
    PlanError,
    PruningPlan,
    RequestError,
    read_manifest,
)
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.tools.cli import main as fastvar_main
from fastvar_trt.tools.cli.export import main as export_main
from fastvar_trt.tools.random_checkpoints import random_infinity_checkpoint

Export = Callable[..., tuple[Path, ExportReport]]
FP32 = PRECISIONS["fp32"]

_LONGER = ((1, 1), (2, 3), (4, 5), (4, 6), (4, 8))


def features(*lengths: int, seed: int = 0) -> list[NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((length, 128)).astype(np.float32) for length in lengths]


@pytest.fixture(scope="module")
def bundle(export_once: Export) -> Path:
    return export_once("infinity", tiny_infinity(), ExportOptions(plan=INFINITY_PLAN, batches=(1, 4)))[0]


VARIANTS: dict[str, tuple[dict[str, Any], PruningPlan]] = {
    "patchify": ({"patchify": True, "bits": 6}, PruningPlan("end", ((2, 0.5), (3, 1.0)), cache_scale=1)),
    "skip_in_the_middle": ({"maps": _LONGER}, PruningPlan("skip", ((3, 1.0), (4, 0.25)), cache_scale=2)),
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_variants_match_pytorch(variant: str, export_once: Export) -> None:
    changes, plan = VARIANTS[variant]
    bundle, report = export_once(f"infinity_{variant}", tiny_infinity(**changes), ExportOptions(plan=plan))
    assert all(error.relative_error < PRECISIONS["fp32"].tolerance.error / 10 for error in report.errors.values())
    pixels = 8 * 2 if changes.get("patchify") else 16
    with Pipeline.load(bundle) as pipe:
        outcome = verify_bundle(pipe)
        result = pipe.generate(text_features=features(3))
    assert not outcome.failures
    assert outcome.num_images_equal == outcome.num_images == 1
    assert result.images.shape == (1, 4 * pixels, 8 * pixels, 3)
    bits = 24 if changes.get("patchify") else 8
    maps = changes.get("maps", INFINITY_MAPS)
    steps = plan.resolve(maps, 2).steps
    assert [t.shape for t in result.tokens] == [(1, maps[k][0] * maps[k][1], bits) for k in steps]
    assert all(t.dtype == np.uint8 and t.max() == 1 for t in result.tokens[1:])


def test_half_precision(export_once: Export) -> None:
    _, report = export_once("infinity_fp16", tiny_infinity(), ExportOptions(plan=INFINITY_PLAN, precision="fp16"))
    assert max(error.relative_error for error in report.errors.values()) < PRECISIONS["fp16"].tolerance.error


def test_a_batch_gives_each_prompt_its_own_picture(bundle: Path) -> None:
    texts = features(3, 12, 1, 7)
    negatives = [None, features(5, seed=1)[0], None, features(2, seed=2)[0]]
    with Pipeline.load(bundle) as pipe:
        options: dict[str, Any] = {"return_logits": True, "greedy": True}
        together = pipe.generate(text_features=texts, negative_text_features=negatives, **options)
        drawn = pipe.generate(text_features=texts, negative_text_features=negatives, seeds=[5, 6, 7, 8], cfg=2.0)
        for i, text in enumerate(texts):
            alone = pipe.generate(text_features=[text], negative_text_features=[negatives[i]], **options)
            assert alone.logits is not None
            assert together.logits is not None
            for ours, theirs, ours_logits, theirs_logits in zip(
                together.tokens, alone.tokens, together.logits, alone.logits, strict=True
            ):
                np.testing.assert_allclose(ours_logits[i], theirs_logits[0], atol=1e-3)
                np.testing.assert_array_equal(ours[i], theirs[0])
            one = pipe.generate(text_features=[text], negative_text_features=[negatives[i]], seeds=[5 + i], cfg=2.0)
            np.testing.assert_array_equal(drawn.images[i], one.images[0])
        without = pipe.generate(text_features=texts, **options)
    assert (without.images[0] == together.images[0]).all()
    assert (without.images[1] != together.images[1]).any()


def test_padding_is_not_read(bundle: Path) -> None:
    """The same prompt in a graph of another text length."""
    with Pipeline.load(bundle) as pipe:
        expected = pipe.generate(text_features=features(4), greedy=True, return_logits=True)
    source = tiny_infinity()
    short = dataclasses.replace(source.config, text_length=4)
    source = dataclasses.replace(source, config=short)
    model = source.new_model(FP32)
    model.load_tensors(dict(source.tensors(FP32, 0)))
    text = torch.zeros(2, 4, 128)
    text[0] = torch.from_numpy(features(4)[0])
    from fastvar_trt.export.models.reference import generate

    plan = INFINITY_PLAN.resolve(INFINITY_MAPS, 2)
    defaults = model.sampling_spec()
    request = Request(
        torch.tensor([defaults.cfg]),
        torch.tensor([defaults.temperature]),
        torch.tensor([2]),
        torch.tensor([1.0]),
        torch.tensor([True]),
    )
    inputs = {"text_features": text, "text_lengths": torch.tensor([4, 4]), "negative": torch.tensor([False])}
    noise = {k: torch.zeros(1, *model.token_spec(k)[0]) for k in plan.steps}
    result = generate(model, plan, inputs, noise, request)
    assert expected.logits is not None
    for k in plan.steps:
        np.testing.assert_allclose(expected.logits[k], result.logits[k].numpy(), atol=1e-3)
        np.testing.assert_array_equal(expected.tokens[k], result.tokens[k].numpy())


def test_guidance_and_temperature_per_scale(bundle: Path) -> None:
    with Pipeline.load(bundle) as pipe:
        same = pipe.generate(text_features=features(5), cfg=3.0, temperature=0.7)
        spelt = pipe.generate(text_features=features(5), cfg=np.full((1, 4), 3.0), temperature=np.full((1, 4), 0.7))
        late = pipe.generate(text_features=features(5), cfg=np.array([[3.0, 3.0, 3.0, 1.0]]), temperature=0.7)
    np.testing.assert_array_equal(same.images, spelt.images)
    np.testing.assert_array_equal(same.tokens[2], late.tokens[2])
    assert (same.tokens[3] != late.tokens[3]).any()


def test_bits_are_drawn_as_the_reference_draws() -> None:
    """Top-p and temperature over two values, against the probabilities that the reference's function leaves."""
    model = tiny_infinity().new_model(FP32)
    logits = torch.randn(1, 6, 8, 2, generator=torch.Generator().manual_seed(0))
    for top_p, tau in ((0.97, 0.5), (0.6, 1.0), (0.3, 1.0), (0.01, 0.7), (2.0, 1.3)):
        probabilities = (logits / tau).softmax(-1)
        least = probabilities.min(-1, keepdim=True).values
        kept = probabilities * ~((probabilities == least) & (probabilities <= 1 - top_p))
        expected = kept[..., 1] / kept.sum(-1)
        request = Request(
            torch.ones(1), torch.tensor([tau]), torch.ones(1), torch.tensor([top_p]), torch.tensor([False])
        )
        grid = (torch.arange(400) + 0.5) / 400
        drawn = torch.stack([model.draw(logits, u.expand(1, 6, 8), request, 1) for u in grid]).mean(0)
        torch.testing.assert_close(drawn, expected, atol=1 / 399, rtol=0)
    greedy = Request(torch.ones(1), torch.ones(1), torch.ones(1), torch.ones(1), torch.tensor([True]))
    assert (model.draw(logits, torch.rand(1, 6, 8), greedy, 1) == logits.argmax(-1)).all()


def test_another_plan_on_the_same_weights(bundle: Path, tmp_path: Path) -> None:
    report = export_again(bundle, tmp_path / "dense", PruningPlan())
    assert set(report.errors) == {f"step_0{k}{b}.onnx" for k in (2, 3) for b in ("", "_b4")}
    with Pipeline.load(tmp_path / "dense") as pipe:
        assert not verify_bundle(pipe).failures


def test_schedules_of_every_size_and_ratio() -> None:
    assert schedule("1M", 1.0)[0][-5:] == ((24, 24), (32, 32), (40, 40), (48, 48), (64, 64))
    assert [len(schedule(size, 1.0)[0]) for size in SIZES] == [7, 10, 12, 13, 14, 15]
    for size in SIZES:
        for ratio in ratios(size):
            maps, span = schedule(size, ratio)
            assert abs(maps[-1][0] / maps[-1][1] - ratio) < 0.01
            assert span[0] >= maps[-1][0]
            if (size, ratio) != ("2K", 1.333):  # the one without an inverse
                assert schedule(size, maps[-1][1] / maps[-1][0])[0] == tuple((w, h) for h, w in maps)
            preset = load_plan(PLAN_OF_SIZE[size].name)
            assert PruningPlan.from_json(preset.to_json()) == preset
            plan = preset.resolve(maps, 32)
            assert plan.steps[-1] == len(maps) - 1 or plan.num_kept[-1] == 0
    assert schedule("2K", 0.5)[0][-1] == (60, 120)
    assert schedule("2K", 1.333)[0][-1] == (84, 63)
    assert tuple(PLAN_OF_SIZE) == SIZES


def test_the_published_plan() -> None:
    plan = load_plan("fastvar-infinity").resolve(schedule("1M", 1.0)[0], 32)
    kept = {plan.schedule[k][0]: plan.num_kept[k] for k in range(13)}
    assert (kept[32], kept[40], kept[48], kept[64]) == (1024 - 409, 800, 0, 0)
    assert plan.cache_scale is not None
    assert plan.schedule[plan.cache_scale] == (24, 24)
    assert (plan.first_layer, plan.last_layer) == (3, 27)
    wide = load_plan("fastvar-infinity").resolve(schedule("1M", 0.5)[0], 32)
    assert [wide.is_pruned(k) for k in range(13)] == [plan.is_pruned(k) for k in range(13)]


def test_rotary_positions_span_the_full_map() -> None:
    source = tiny_infinity()
    cos, sin = rope_tables(source.config, 1)  # 2 x 3 of 8 x 16, D = 64
    assert cos.shape == (6, 32)
    position = 4  # row 1 -> 4, column 1 -> 5 (5.33 rounded)
    angle = torch.atan2(sin[position], cos[position])
    assert angle[0] == pytest.approx(4 - 2 * np.pi, abs=1e-5)
    assert angle[16] == pytest.approx(5 - 2 * np.pi, abs=1e-5)
    assert angle[1] == pytest.approx(4 / 10000 ** (1 / 16), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [1]}, "draws from text: give text_features"),
        ({}, "draws from text"),
        ({"prompts": ["a dog"]}, r"give text_features; it has no text encoder \(export with --text-encoder"),
        ({"text_features": []}, "expected a list of at least one array"),
        ({"text_features": features(13)}, r"text_features: got 13 tokens, this bundle takes 1 to 12"),
        ({"text_features": [np.zeros((0, 128))]}, "got 0 tokens"),
        ({"text_features": [np.zeros((3, 64))]}, r"got shape \[3, 64\], expected \[tokens, 128\]"),
        ({"text_features": [np.full((3, 128), np.nan)]}, "expected finite numbers"),
        ({"text_features": features(3), "negative_text_features": features(3, 3)}, "expected one per image"),
        ({"text_features": features(3), "h_div_w": 2.0}, r"got 2, this bundle holds 0\.5 \(128x64\); export another"),
        ({"text_features": features(3), "top_k": 5}, "draws bits, which have two values"),
        ({"text_features": features(3), "cfg": np.ones((1, 3))}, r"cfg: got \(1, 3\)"),
    ],
)
def test_requests_out_of_range(bundle: Path, arguments: dict[str, Any], message: str) -> None:
    with Pipeline.load(bundle) as pipe, pytest.raises(RequestError, match=message):
        pipe.generate(**arguments)


def test_a_class_bundle_takes_no_text(tiny_bundle: Path) -> None:
    with Pipeline.load(tiny_bundle) as pipe:
        with pytest.raises(RequestError, match="draws classes: give labels"):
            pipe.generate(prompts=["a dog"])
        with pytest.raises(RequestError, match="draws classes: give labels"):
            pipe.generate(text_features=features(3))


def test_checkpoints_that_do_not_fit() -> None:
    state, vae = random_infinity_checkpoint(
        depth=2, width=128, num_heads=2, text_width=128, text_length=12, block_chunks=1
    )
    _, other_vae = random_infinity_checkpoint(
        depth=2, width=128, num_heads=2, text_width=128, text_length=12, block_chunks=1, bits=16
    )
    with pytest.raises(CheckpointError, match=r"the VAE has 16 bits, the transformer 8 per token"):
        InfinitySource.from_state(state, other_vae, INFINITY_MAPS, INFINITY_SPAN)
    with pytest.raises(CheckpointError, match=r"--text-length: got 13, this model takes 1 to 12"):
        InfinitySource.from_state(state, vae, INFINITY_MAPS, INFINITY_SPAN, 13)
    key = "block_chunks.0.module.1.ca.mat_q.weight"
    with pytest.raises(CheckpointError, match=f"1 missing: {key}"):
        InfinitySource.from_state({k: v for k, v in state.items() if k != key}, vae, INFINITY_MAPS, INFINITY_SPAN)
    with pytest.raises(CheckpointError, match=r"1 unexpected: other\.weight"):
        InfinitySource.from_state({**state, "other.weight": torch.ones(1)}, vae, INFINITY_MAPS, INFINITY_SPAN)
    with pytest.raises(CheckpointError, match="not an Infinity VAE"):
        InfinitySource.from_state(state, {"encoder.x": torch.ones(1)}, INFINITY_MAPS, INFINITY_SPAN)
    with pytest.raises(CheckpointError, match=r"not an Infinity transformer: key word_embed\.weight is missing"):
        InfinitySource.from_state({"x": torch.ones(1)}, vae, INFINITY_MAPS, INFINITY_SPAN)


def test_official_file_formats(tmp_path: Path) -> None:
    """Flat, nested as the trainer leaves it, and shards with an index, each with VAEs nested under `vae`."""
    state, vae = random_infinity_checkpoint(
        depth=2, width=128, num_heads=2, text_width=128, text_length=12, block_chunks=2
    )
    torch.save(state, tmp_path / "flat.pth")
    torch.save({"trainer": {"gpt_fsdp": state}, "epoch": 3}, tmp_path / "nested.pth")
    torch.save({"vae": vae}, tmp_path / "vae.pth")
    shards = tmp_path / "shards"
    shards.mkdir()
    names = sorted(state)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: state[n].contiguous() for n in names if weight_map[n] == file}, shards / file)
    import json

    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for checkpoint in ("flat.pth", "nested.pth", "shards"):
        source = InfinitySource.from_files(tmp_path / checkpoint, tmp_path / "vae.pth", "0.06M", 0.5)
        assert set(source.state) == set(state)
        assert source.config.depth == 2
        assert source.config.schedule[-1] == (11, 22)
        assert source.config.rope_span == (45, 90)
    (shards / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the shard model-1\.safetensors of its index is missing"):
        load_state_dict(shards)


def test_export_and_generate_commands(tmp_path: Path) -> None:
    state, vae = random_infinity_checkpoint(
        depth=1, width=128, num_heads=2, text_width=128, text_length=8, block_chunks=1
    )
    torch.save(state, tmp_path / "infinity.pth")
    torch.save({"vae": vae}, tmp_path / "vae.pth")
    files = ["infinity", "--checkpoint", str(tmp_path / "infinity.pth"), "--vae", str(tmp_path / "vae.pth")]
    run = CliRunner().invoke
    refused = run(export_main, [*files, "--pn", "0.06M", "--h-div-w", "0.9", "--out", str(tmp_path / "b")])
    assert refused.exit_code == 1
    assert "pn 0.06M has the ratios 0.333, 0.4, 0.5, 0.571, 0.666, 0.75, 0.8, 1, 1.25" in refused.output
    out = str(tmp_path / "b")
    done = run(export_main, [*files, "--pn", "0.06M", "--aspect", "2:1", "--text-length", "5", "--out", out])
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "b").default.schedule[-1] == (11, 22)
    np.savez(tmp_path / "text.npz", **{"0": features(3)[0], "1": features(5)[0]})
    picture = str(tmp_path / "x.png")
    options = ["--text-features", str(tmp_path / "text.npz"), "--cfg", "3,3,3,3,2,2,1", "--temperature", "0.5"]
    drawn = run(fastvar_main, ["generate", out, *options, "-o", picture])
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "x.png").is_file()
    shown = run(fastvar_main, ["inspect", out])
    assert "text features of up to 5 tokens, 8 bits per token, 352x176 pixels" in shown.output
    wrong = run(fastvar_main, ["generate", out, "--class", "1", "-o", picture])
    assert "draws from text" in wrong.output
    usage = run(fastvar_main, ["generate", out, "-o", picture])
    assert usage.exit_code == 2


def test_an_unknown_size_or_plan() -> None:
    with pytest.raises(ExportError, match=r"expected one of 0\.06M"):
        schedule("3M", 1.0)
    with pytest.raises(PlanError, match="scale 9 does not exist"):
        load_plan("fastvar-infinity").resolve(schedule("0.06M", 1.0)[0], 32)
