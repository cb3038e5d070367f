"""HART: the goldens through exported graphs and the runtime, and what is particular to it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Qwen2Config, Qwen2Model

from conftest import Golden, run, thorough, told_by
from fastvar_trt.export.exporter import ExportOptions, ExportReport, export_model
from fastvar_trt.export.models.hart.source import HARTSource
from fastvar_trt.export.models.registry import load_plan
from fastvar_trt.export.weights_file import map_weights
from fastvar_trt.runtime import GenerationResult, Pipeline, PruningPlan, Request
from fastvar_trt.runtime.errors import CheckpointError, PlanError
from fastvar_trt.runtime.manifest import Role, TensorSpec
from fastvar_trt.runtime.service import Service
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.serving.http.app import create_app
from fastvar_trt.tools.cli import main
from fastvar_trt.tools.cli.export import main as export_main
from fastvar_trt.tools.random_checkpoints import random_hart_folders

PROBED = 64  # positions of the logits that a golden holds
PLANS = {"hart_d4_dense": load_plan("none"), "hart_d6_1024_fastvar": load_plan("fastvar-hart")}
Export = Callable[..., tuple[Path, ExportReport]]


def golden_requests(golden: Golden) -> list[Request]:
    """Its texts and its noise, which comes in the order in which the reference draws it."""
    case, expected = golden.case, golden.expected
    batch, last = case["batch"], len(case["patch_nums"]) - 1
    steps = [expected["noise_init"], *expected["noise_steps"][:-1]]  # the last step adds none
    noise = np.stack([step.reshape(batch, -1, case["cvae"]) for step in steps], axis=1).astype(np.float32)
    return [
        Request(
            text_features=expected["text_features"][i].astype(np.float32),
            text_tokens=int(expected["text_lens"][i]),
            cfg=case["cfg"],
            greedy=True,
            normal_noise={last: noise[i]},
        )
        for i in range(batch)
    ]


@pytest.fixture(params=sorted(PLANS))
def drawn(request: pytest.FixtureRequest, export_once: Export) -> tuple[Golden, list[GenerationResult]]:
    """All pictures of a golden in one batch, and one by one."""
    golden = Golden(request.param)
    batches = tuple(sorted({1, golden.case["batch"]}))
    source = HARTSource.from_folders(golden.folder / "llm", more_smooth=False)
    options = ExportOptions(plan=PLANS[request.param], batches=batches, compare=False)
    bundle, _ = export_once(request.param, source, options)
    requests = golden_requests(golden)
    with Pipeline.load(bundle) as pipe:
        options = {"return_logits": True, "return_float_images": True}
        results = [pipe.draw(requests, **options)]  # type: ignore[arg-type]
        if len(requests) > 1:
            results += [pipe.draw([one], **options) for one in requests]  # type: ignore[arg-type]
    return golden, results


def test_the_reference_is_reproduced(drawn: tuple[Golden, list[GenerationResult]]) -> None:
    golden, results = drawn
    together, singles = results[0], results[1:]
    check_golden(golden, together, slice(None))
    for i, single in enumerate(singles):
        check_golden(golden, single, slice(i, i + 1))


def check_golden(golden: Golden, result: GenerationResult, rows: slice) -> None:
    expected, batch = golden.expected, golden.case["batch"]
    assert result.logits is not None and result.float_images is not None
    for k, (tokens, logits) in enumerate(zip(result.tokens, result.logits, strict=True)):
        np.testing.assert_array_equal(tokens, expected[f"tokens_s{k:02d}"][rows], err_msg=f"scale {k}")
        np.testing.assert_allclose(logits[:, :PROBED], expected[f"logits_s{k:02d}"][rows], atol=1e-3, rtol=0)
    discrete = expected["f_hat_discrete"][rows]
    residual = expected["residual"].reshape(batch, -1, golden.case["cvae"])[rows].transpose(0, 2, 1)
    errors = np.abs(result.f_hat - discrete - residual.reshape(discrete.shape))
    assert (errors <= 1e-3).mean() >= 0.999
    truncated = (result.float_images * 255).astype(np.uint8)  # as the reference makes its pixels
    off = np.abs(truncated.astype(int) - expected["image_u8"][rows].astype(int))
    assert (off <= 1).mean() >= 0.999


@pytest.fixture
def smooth_bundle(export_once: Export) -> Path:
    """The dense golden's model as published: with blended codes."""
    source = HARTSource.from_folders(Golden("hart_d4_dense").folder / "llm")
    return export_once("hart_smooth", source, ExportOptions(batches=(1, 4), max_top_k=600))[0]


@pytest.mark.thorough
def test_a_bundle_verifies(smooth_bundle: Path) -> None:
    with Pipeline.load(smooth_bundle) as pipe:
        found = verify_bundle(pipe)
    assert not found.failures and found.num_images_equal == found.num_images == 5


@pytest.mark.thorough
def test_a_batch_of_four_is_four_single_runs(smooth_bundle: Path) -> None:
    """A picture is that of its seed, whatever its neighbours; another seed gives another."""
    features = Golden("hart_d4_dense").expected["text_features"].astype(np.float32)
    requests = [Request(text_features=features[i % 2], text_tokens=5 + i, seed=i, greedy=i < 3) for i in range(4)]
    with Pipeline.load(smooth_bundle) as pipe:
        together = pipe.draw(requests)
        for i, request in enumerate(requests):
            alone = pipe.draw([request])
            pairs = zip(alone.tokens, together.tokens, strict=True)
            equal = np.concatenate([own[0] == other[i] for own, other in pairs]).mean()
            close = (np.abs(alone.f_hat[0] - together.f_hat[i]) <= 1e-3).mean()
            # Without `greedy`, blends multiply the rounding of logits: see below.
            least = (1.0, 0.999) if request.greedy else (0.99, 0.8)
            assert equal >= least[0] and close >= least[1]
        same_text = pipe.draw([dataclasses.replace(requests[0], seed=9)])
    assert (np.abs(same_text.f_hat[0] - together.f_hat[0]) > 0.05).mean() > 0.5  # by the residual's noise alone


SYSTEM = "draw what the user says :"
WORDS = f"{SYSTEM} a red fox in the snow <pad> <unk>".split()


def qwen2_folder(folder: Path, side: str, prefix: str, width: int = 160) -> Path:
    """A small random Qwen2 with a tokenizer of whole words, in a layout of Hugging Face."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS) + 3,
        hidden_size=width,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1e6,
    )
    model = Qwen2Model(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    state = {f"{prefix}{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    if prefix:
        state |= {"visual.patch_embed.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    save_file(state, folder / "model.safetensors")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(WORDS))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "padding_side": side}))
    return folder


def transformers_features(folder: Path, source: HARTSource, prompt: str) -> NDArray[Any]:
    """As HART's `encode_prompts` has them: system prompt, padded prompt, no position ids, the last positions kept."""
    assert source.text is not None
    config, tokenizer = source.text.config, Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Qwen2Model(Qwen2Config.from_pretrained(folder)).eval()
    model.load_state_dict({key: source.text.state[key] for key in model.state_dict()})
    ids = tokenizer.encode(prompt).ids[: config.text_length]
    count = config.text_length - len(ids)
    padding, tokens = ([config.pad_id] * count, [0] * count), (ids, [1] * len(ids))
    first, second = (padding, tokens) if config.pads_left else (tokens, padding)
    system = tokenizer.encode(SYSTEM).ids
    with torch.inference_mode():
        states = model(
            input_ids=torch.tensor([[*system, *first[0], *second[0]]]),
            attention_mask=torch.tensor([[*[1] * len(system), *first[1], *second[1]]]),
            output_hidden_states=True,
        ).hidden_states
    return np.asarray(states[-1][0, len(system) :].numpy())


@pytest.mark.parametrize(("side", "prefix"), [("right", ""), thorough("left", "model.language_model.")])
def test_text_features_are_those_of_transformers(side: str, prefix: str, tmp_path: Path, export_once: Export) -> None:
    golden = Golden("hart_d4_dense")
    folder = qwen2_folder(tmp_path / "qwen", side, prefix)
    source = HARTSource.from_folders(golden.folder / "llm", None, folder, SYSTEM)
    bundle, _ = export_once(f"hart_text_{side}", source, ExportOptions(compare=side == "right"))
    prompt = "a red fox in the snow"
    expected = transformers_features(folder, source, prompt)
    with Pipeline.load(bundle) as pipe:
        assert side == "left" or not verify_bundle(pipe).failures
        (features,), _ = pipe.encode([prompt])
        np.testing.assert_allclose(features, expected, atol=2e-5)
        drawn = pipe.generate(prompts=[prompt], seeds=3)
        same = pipe.draw([Request(text_features=features, text_tokens=6, seed=3)])
        np.testing.assert_array_equal(drawn.tokens[-1], same.tokens[-1])
        long, _ = pipe.encode(["a " * 50])  # cut off, as the reference does
        np.testing.assert_allclose(long[0], transformers_features(folder, source, "a " * 50), atol=2e-5)


def test_smooth_codes_are_those_of_the_reference(smooth_bundle: Path) -> None:
    """With `more_smooth`: near a tie, a blend multiplies the rounding of logits by a hundred."""
    golden = Golden("hart_d4_dense")
    recorded = load_arrays(golden.folder / "smooth_noise.safetensors")
    # The least uniform number draws the likeliest code, as greedy does, which would not blend.
    likeliest = {k: np.zeros(side**2, np.float32) for k, side in enumerate(golden.case["patch_nums"])}
    requests = [dataclasses.replace(r, greedy=False, noise=likeliest) for r in golden_requests(golden)]
    with Pipeline.load(smooth_bundle) as pipe:
        # Our noise is by rank, the recorded one by code: each scale's order is known when it has been drawn.
        noise: list[dict[int, NDArray[Any]]] = [{}, {}]
        specs = gumbel_specs(pipe)
        for scale, spec in enumerate(specs):
            unknown = {k: np.zeros(s.shape[1:], np.float32) for k, s in enumerate(specs) if k >= scale}
            drawn = pipe.draw(
                [dataclasses.replace(r, gumbel_noise=n | unknown) for r, n in zip(requests, noise, strict=True)],
                return_logits=True,
            )
            assert drawn.logits is not None
            order = np.argsort(-drawn.logits[scale], axis=-1, kind="stable")[..., : spec.shape[-1]]
            gumbel = np.take_along_axis(-np.log(recorded[f"exp_s{scale:02d}"].astype(np.float32)), order, axis=-1)
            for i, own in enumerate(noise):
                own[scale] = gumbel[i]
        result = pipe.draw(
            [dataclasses.replace(r, gumbel_noise=n) for r, n in zip(requests, noise, strict=True)],
            return_float_images=True,
        )
    equal = [t == golden.expected[f"smooth_tokens_s{k:02d}"] for k, t in enumerate(result.tokens)]
    assert np.concatenate([scale.ravel() for scale in equal]).mean() >= 0.995
    assert result.float_images is not None
    truncated = (result.float_images * 255).astype(np.uint8).astype(int)
    assert (np.abs(truncated - golden.expected["smooth_image_u8"].astype(int)) <= 1).mean() >= 0.99


def gumbel_specs(pipe: Pipeline) -> list[TensorSpec]:
    """That noise of every step."""
    return [spec for graph in pipe.manifest.default.steps(4) if (spec := graph.input(Role.GUMBEL)) is not None]


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    """A tiny HART with random weights, whose map is 80 pixels wide."""
    return random_hart_folders(
        tmp_path / "hart",
        depth=1,
        width=64,
        num_heads=2,
        patch_nums=(1, 2, 3, 5),
        context_tokens=12,
        text_width=48,
        vocab_size=32,
        attn_l2_norm=True,
    )


def test_the_last_scale_is_what_the_residual_diffusion_starts_from(llm: Path) -> None:
    model = HARTSource.from_folders(llm).new_model(ExportOptions().check("hart"))
    with pytest.raises(PlanError, match="is skipped, from which HART's residual diffusion starts; prune it instead"):
        model.resolve(PruningPlan("short", ((-1, 1.0),)))


def test_folders_that_are_not_a_hart_are_named(llm: Path, tmp_path: Path) -> None:
    vae = llm.parent / "tokenizer"

    def refused(match: str, *arguments: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            HARTSource.from_folders(*arguments)

    refused(r"--checkpoint .*: config\.json is missing", tmp_path)
    refused(r"attn_type: got None, expected 'llama'", vae)  # a VAE in place of an llm
    refused(r"--vae .*: no key begins with vae\.: no image tokenizer", llm, llm_as_safetensors(llm))
    refused(r"--text-encoder .*: config\.json is missing", llm, vae, tmp_path)
    wide = qwen2_folder(tmp_path / "qwen", "right", "")
    refused("its features are 160 wide, the model takes 48", llm, vae, wide)
    (wide / "config.json").write_text('{"model_type": "t5"}')
    refused("got model_type 't5', expected qwen2 or qwen2_vl", llm, vae, wide)

    own = {"model_type": "qwen2", "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2}
    for heads, kv_heads in ((0, 1), (4, 0), (5, 1), (4, 3)):
        own |= {"vocab_size": 11, "rms_norm_eps": 1e-6, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        (wide / "config.json").write_text(json.dumps(own))
        refused(f"got num_attention_heads {heads} and num_key_value_heads {kv_heads}", llm, vae, wide)

    state = torch.load(llm / "ema_model.bin", weights_only=True)
    del state["decoder_norm.weight"]
    state["blocks.0.attn.proj.bias"] = torch.zeros(3)
    state["surplus"] = torch.zeros(1)
    torch.save(state, llm / "ema_model.bin")
    refused(r"1 missing: decoder_norm\.weight; 1 unexpected: surplus; 1 mis-shaped: blocks\.0\.attn\.proj\.bias", llm)
    data = json.loads((llm / "config.json").read_text())
    for key, value, got in (("patch_nums", [2, 3], r"\[2, 3\]"), ("norm_eps", None, "None"), ("norm_eps", "x", "'x'")):
        (llm / "config.json").write_text(json.dumps(data | {key: value}))
        refused(f"{key}: got {got}", llm)


def llm_as_safetensors(llm: Path) -> Path:
    """The llm in the place of its image tokenizer."""
    folder = llm.parent / "other"
    folder.mkdir()
    (folder / "config.json").write_text((llm / "config.json").read_text())
    save_file(torch.load(llm / "ema_model.bin", weights_only=True), folder / "model.safetensors")
    return folder


def test_long_prompts_of_a_calibration_are_cut_off(llm: Path, tmp_path: Path) -> None:
    """As those of requests are: the scales are those of the first twelve tokens."""
    text = qwen2_folder(tmp_path / "qwen", "right", "", width=48)
    source = HARTSource.from_folders(llm, None, text, SYSTEM)
    scales = []
    for count in (12, 50):
        options = ExportOptions(precision="w8a8", calibration=("snow " * count,), compare=False)
        export_model(source, tmp_path / str(count), options)
        tensors = map_weights(tmp_path / str(count))
        scales.append({name: float(x) for name, x in tensors.items() if name.endswith("input_scale")})
    assert scales[0] == scales[1] != {}


def test_the_commands_work(llm: Path, tmp_path: Path) -> None:
    """From folders to a picture and back, pruned, in half precision, with normalised attention, by words."""
    plan, half = tmp_path / "plan.json", {"pruned": [{"scale": -1, "fraction": 0.5}], "cache_scale": -2}
    plan.write_text(json.dumps(half))
    text = qwen2_folder(tmp_path / "qwen", "right", "", width=48)
    (tmp_path / "system.txt").write_text(SYSTEM)
    dense, pruned, features = tmp_path / "dense", tmp_path / "pruned", tmp_path / "features.npz"
    command = ["hart", "--checkpoint", llm, "--max-top-k", "8", "--target", "cpu"]
    command += ["--text-encoder", text, "--system-prompt", tmp_path / "system.txt"]
    prompts = ["--prompt", "a red fox", "--prompt", "the snow"]
    told_by(export_main, *command, "--prune", "none", "--no-compare", "--out", dense)
    told_by(export_main, *command, "--prune", plan, "--precision", "fp16", "--out", pruned)
    np.savez(features, **{"0": np.random.default_rng(0).standard_normal((12, 48)).astype(np.float32), "tokens": [5]})
    told_by(main, "generate", pruned, "--text-features", features, "-o", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (80, 80)
    told = told_by(main, "generate", pruned, "--prompt", "snow " * 13, "-o", tmp_path / "b.png")
    assert "warning: image 0: prompt: has 13 tokens; the model reads the first 12" in told
    np.savez(features, **{"0": np.zeros((12, 48), np.float32), "tokens": [13]})
    done = run(main, "generate", pruned, "--text-features", features, "-o", "c.png")
    assert done.exit_code == 1 and "text_tokens: got 13, expected 1 to 12" in done.output
    told_by(main, "inspect", pruned)
    told_by(main, "verify", pruned)
    told_by(main, "profile", pruned, "--runs", "1", "--out", tmp_path / "profile")
    told_by(main, "compare", dense, pruned, *prompts, "--seeds", "1", "--json", tmp_path / "compare.json")
    per_prompt = json.loads((tmp_path / "compare.json").read_text())["prompts"]
    assert per_prompt["a red fox"]["ssim"] < 1 and len(per_prompt) == 2
    axes = ["--fractions", "0.5", "--cache-scales", "-2", "--first-layers", "0"]
    told_by(main, "tune", dense, *prompts, "--seeds", "1", *axes, "--out", tmp_path / "tune")
    with Pipeline.load(pruned) as pipe:
        assert [graph.name for graph in pipe.manifest.default.chain(1)][-2:] == ["residual", "decoder"]
        app = create_app(Service(pipe))
        with TestClient(app) as client:
            check_answers(client, pipe)


def check_answers(client: TestClient, pipe: Pipeline) -> None:
    """What is served is what the pipeline draws; prompts that are cut off are told."""
    features = np.random.default_rng(0).standard_normal((12, 48)).astype(np.float32)
    expected = pipe.draw([Request(text_features=features, text_tokens=5, seed=2)]).images[0]
    answer = client.post("/v1/images", json={"text_features": features.tolist(), "text_tokens": 5, "seed": 2})
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), expected)
    assert "x-fastvar-warning" not in answer.headers
    answer = client.post("/v1/images", json={"prompt": "snow " * 13})
    assert answer.headers["x-fastvar-warning"] == "prompt: has 13 tokens; the model reads the first 12"
    events = client.post("/v1/images/stream", json={"prompt": "snow " * 13, "preview_scales": []}).text
    assert '"warnings": ["prompt: has 13 tokens; the model reads the first 12"]' in events
    for more, problem in (
        ({"text_tokens": 4}, "text_tokens: got 4, text_features has 3"),
        ({"negative_text_tokens": 2}, "negative_text_tokens: needs negative_text_features"),
    ):
        refused = client.post("/v1/images", json={"text_features": features[:3].tolist(), **more})
        assert refused.status_code == 422 and problem in refused.text
