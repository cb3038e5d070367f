"""The T5 encoder against `transformers`, and prompts through a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

from fastvar_trt.export import calibration, exporter
from fastvar_trt.export.build.tensorrt.builder import RtxBuilder, tensorrt_graph
from fastvar_trt.export.build.tensorrt.engine import build_engine
from fastvar_trt.export.build.tensorrt.flavour import Flavour
from fastvar_trt.export.build.tensorrt.layers import count_kernels
from fastvar_trt.export.exporter import ExportOptions, ExportReport, export_model
from fastvar_trt.export.models.infinity.schedules import schedule
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.models.reference import generate
from fastvar_trt.export.models.t5 import T5Config as OurConfig
from fastvar_trt.export.models.t5 import T5Source, position_bias
from fastvar_trt.export.tracing import build_graph, save_graph, text_function
from fastvar_trt.export.validation import compare_with_torch, run_in_onnxruntime
from fastvar_trt.export.weights_file import map_weights, write_weights
from fastvar_trt.runtime import BundleError, CheckpointError, ExportError, ImageRequest, Pipeline, RequestError, Service
from fastvar_trt.runtime.manifest import MANIFEST_FILE
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.runtime.text import TextEncoder
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.serving.http.app import create_app
from fastvar_trt.tools.random_checkpoints import random_infinity_checkpoint
from fuzzing import answers_to_valid_bodies
from server_process import Page, serving

Export = Callable[..., tuple[Path, ExportReport]]

WORDS = ["</s>", "<unk>", "a", "fox", "in", "the", "snow", "red", "dog", "blurry"]
TEXT_LENGTH = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small flan-t5 with random weights, as `transformers` and `tokenizers` write it."""
    path = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=128, d_kv=32, d_ff=192, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[str], Any]:
    """Features of a prompt by `transformers`, padded and masked as `encode_prompt` of Infinity does."""
    model = T5EncoderModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def features(prompt: str) -> Any:
        ids = tokenizer.encode(prompt).ids
        padded = torch.zeros(1, 512, dtype=torch.int64)
        padded[0, : len(ids)] = torch.tensor(ids)
        mask = (torch.arange(512) < len(ids))[None].long()
        with torch.inference_mode():
            return model(input_ids=padded, attention_mask=mask).last_hidden_state[0, : len(ids)].numpy()

    return features


def _source(folder: Path) -> InfinitySource:
    state, vae = random_infinity_checkpoint(
        depth=1, width=128, num_heads=2, text_width=128, text_length=64, block_chunks=1
    )
    maps, span = schedule("0.06M", 1.0)
    source = InfinitySource.from_state(state, vae, maps[:4], span, TEXT_LENGTH)
    text = T5Source.from_folder(folder, source.config.text_length, source.config.text_width)
    return InfinitySource(source.config, source.vae_config, source.state, source.vae_state, text)


@pytest.fixture(scope="module")
def bundle(folder: Path, export_once: Export) -> Path:
    return export_once("infinity_text", _source(folder), ExportOptions(batches=(1, 2)))[0]


def test_the_encoder_may_be_there_only_while_it_runs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded once for all prompts of a call, and dropped; the pictures are the same."""
    arguments: dict[str, Any] = {"prompts": ["a fox", "a dog"], "negative_prompts": ["blurry", None], "seeds": 3}
    release = TextEncoder.release
    held_locks: list[bool] = []

    def noted(encoder: TextEncoder) -> None:
        held_locks.append((low if encoder._backend is low.backend else usual)._lock.locked())
        release(encoder)

    monkeypatch.setattr(TextEncoder, "release", noted)
    with Pipeline.load(bundle, low_memory=True) as low, Pipeline.load(bundle) as usual:
        loads: list[str] = []
        load = low.backend.load
        low.backend.load = lambda graph: (loads.append(graph.name), load(graph))[1]  # type: ignore[method-assign]
        for _ in range(2):
            np.testing.assert_array_equal(low.generate(**arguments).images, usual.generate(**arguments).images)
        assert [name for i, name in enumerate(loads) if loads[i - 1] != name] == ["text_encoder", "decoder"] * 2
        held = low.backend._sessions  # type: ignore[attr-defined]
        assert held and not {file for file in held if file.startswith(("text_encoder", "decoder"))}
        assert low.encode(["a fox"])[0][0].shape == usual.encode(["a fox"])[0][0].shape
        # Weights are shared with whatever else is loaded on demand: nobody may load anything until it is gone.
        assert len(held_locks) == 6 and all(held_locks)


def test_features_are_those_of_transformers(bundle: Path, reference: Callable[[str], Any]) -> None:
    prompts = ["a fox", "the red fox in the snow a dog", "unheard of"]
    with Pipeline.load(bundle) as pipe:
        ours, negatives = pipe.encode(prompts, [None, "blurry", ""])
    assert [item is None for item in negatives] == [True, False, True]
    for prompt, features in zip(prompts, ours, strict=True):
        expected = reference(prompt)
        assert features.shape == expected.shape
        np.testing.assert_allclose(features, expected, atol=2e-5)


def test_prompts_draw_what_their_features_draw(bundle: Path, reference: Callable[[str], Any]) -> None:
    with Pipeline.load(bundle) as pipe:
        assert not verify_bundle(pipe).failures
        of_text = pipe.generate(prompts=["a fox", "the snow"], negative_prompts=["blurry", "blurry"], seeds=3)
        of_features = pipe.generate(
            text_features=[reference("a fox"), reference("the snow")],
            negative_text_features=[reference("blurry")] * 2,
            seeds=3,
        )
        alone = pipe.generate(prompts=["the snow"], negative_prompts=["blurry"], seeds=[4])
        other = pipe.generate(prompts=["a dog"], seeds=3)
    np.testing.assert_array_equal(of_text.images, of_features.images)
    np.testing.assert_array_equal(of_text.images[1], alone.images[0])
    assert (other.images[0] != of_text.images[0]).any()


def test_words_that_the_encoder_does_not_know_are_told(bundle: Path) -> None:
    with Pipeline.load(bundle) as pipe:
        found = pipe.generate(prompts=["a fox", "an unheard\nof fox"], negative_prompts=[None, "caf\u00e9"]).warnings
    told = "prompt: the text encoder of this bundle does not know"
    assert found == [[], [f"{told} 'an', 'unheard', 'of'", f"negative_{told} 'caf\\xe9'"]]


def test_a_service_takes_prompts_and_features_in_one_batch(bundle: Path) -> None:
    with Pipeline.load(bundle) as pipe:
        expected = pipe.generate(prompts=["a fox", "the snow"], negative_prompts=["blurry", None], seeds=[1, 2])
        features, _ = pipe.encode(["the snow"])
        with Service(pipe, max_wait_s=2.0) as service:
            tickets = [
                service.submit(ImageRequest(prompt="a fox", negative_prompt="blurry", seed=1)),
                service.submit(ImageRequest(text_features=features[0], seed=2)),
            ]
            results = [ticket.result(60) for ticket in tickets]
            with pytest.raises(RequestError, match="got 11 tokens"):
                service.submit(ImageRequest(prompt="a " * 10))
            with pytest.raises(RequestError, match="got label and prompt"):
                service.submit(ImageRequest(label=1, prompt="a"))
    assert [result.batch for result in results] == [2, 2]
    for result, image in zip(results, expected.images, strict=True):
        np.testing.assert_array_equal(result.image, image)


def test_a_person_draws_from_a_prompt(bundle: Path, tmp_path: Path, browser: Any) -> None:
    with Pipeline.load(bundle) as pipe:
        expected = pipe.generate(prompts=["a fox"], negative_prompts=["blurry"], seeds=[7]).images[0]
    with serving(bundle, tmp_path / "log") as server:
        page = Page(browser, server.url)
        assert not page.has("label")
        for name, text in (("prompt", "a fox"), ("negative_prompt", "blurry"), ("seed", "7")):
            page.enter(name, text)
        page.draw_and_wait("Seed 7, ")
        np.testing.assert_array_equal(page.picture(), expected)
        page.enter("prompt", "a " * 10)
        page.draw_and_wait("prompt: got 11 tokens")


def test_a_warm_pipeline_reads_no_file_later(bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "b")
    with Pipeline.load(copied) as pipe:
        expected = pipe.generate(prompts=["a fox"]).images
    with Pipeline.load(copied) as pipe:
        pipe.warm_up()
        shutil.rmtree(copied)
        np.testing.assert_array_equal(pipe.generate(prompts=["a fox"]).images, expected)


def test_a_text_encoder_that_was_replaced_is_not_used(bundle: Path, tmp_path: Path) -> None:
    """It is read at the first prompt, and must be the one that belongs to the loaded graphs."""
    copied = shutil.copytree(bundle, tmp_path / "b")
    with Pipeline.load(copied) as pipe:
        manifest = json.loads((copied / MANIFEST_FILE).read_text())
        manifest["tools"]["torch"] = "another"
        (copied / MANIFEST_FILE).write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="was replaced by another"):
            pipe.generate(prompts=["a fox"])
        shutil.rmtree(copied)
        with pytest.raises(BundleError, match="no such folder"):
            pipe.generate(prompts=["a fox"])
        features = [np.zeros((2, 128), dtype=np.float32)]
        assert pipe.generate(text_features=features).images.shape[0] == 1  # what is loaded goes on


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["a " * 10]}, "^prompt: got 11 tokens, this bundle takes up to 10; shorten it"),
        ({"prompts": ["a \ud800"]}, "prompt: is no text that can be encoded"),
        ({"prompts": ["a", " "]}, "image 1: prompt: got ' ', expected some text"),
        ({"prompts": "a fox"}, "expected a list of at least one text"),
        ({"prompts": []}, "expected a list of at least one text"),
        ({"prompts": ["a"], "negative_prompts": ["a", "b"]}, r"negative_prompts: got 2, expected one per image \(1\)"),
        ({"prompts": ["a"], "text_features": [np.zeros((1, 128))]}, "got prompt and text_features: give one of them"),
        ({"negative_prompts": ["a"]}, "negative_prompt: needs a prompt"),
    ],
)
def test_prompts_out_of_range(bundle: Path, arguments: dict[str, Any], message: str) -> None:
    with Pipeline.load(bundle) as pipe, pytest.raises(RequestError, match=message):
        pipe.generate(**arguments)


def test_long_prompts_of_a_calibration_are_refused_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_write_weights", None)
    with pytest.raises(ExportError, match=r"calibration: 'a a .* has 11 tokens, the bundle takes 10; shorten it"):
        export_model(_source(folder), tmp_path / "b", ExportOptions(precision="w8a8", calibration=("a " * 10,)))
    assert not list(tmp_path.iterdir())


def test_without_prompts_a_calibration_encodes_random_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Mapping[str, torch.Tensor]] = []

    def recorded(model: Any, plan: Any, inputs: Mapping[str, torch.Tensor], *more: Any) -> Any:
        drawn.append(inputs)
        return generate(model, plan, inputs, *more)

    monkeypatch.setattr(calibration, "generate", recorded)
    export_model(_source(folder), tmp_path / "b", ExportOptions(precision="w8a8", compare=False))
    assert [int(inputs["text_lengths"][0]) for inputs in drawn] == [1, 2, 3, 5]
    for inputs in drawn:
        features, length = inputs["text_features"][0], int(inputs["text_lengths"][0])
        assert features[:length].abs().amax(dim=1).min() > 0 and not features[length:].any()
    scales = [float(x) for name, x in map_weights(tmp_path / "b").items() if name.endswith("input_scale")]
    assert scales and all(0 < scale < 100 for scale in scales)


def test_another_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its features are 128 wide, the model takes 2048"):
        T5Source.from_folder(folder, 10, 2048)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        T5Source.from_folder(tmp_path, 10, 128)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: no such file"):
        T5Source.from_folder(tmp_path, 10, 128)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="got model_type 'bert'"):
        T5Source.from_folder(tmp_path, 10, 128)


def test_relative_positions_are_those_of_transformers() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    length = 512
    config = OurConfig(128, 32, 4, 192, 1, 64, 32, 128, 1e-6, length)
    table = torch.arange(32.0)[:, None].expand(32, 4)  # the bias tells the bucket
    ours = position_bias(config, table)[0]
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    buckets = T5Attention._relative_position_bucket(distance, bidirectional=True, num_buckets=32, max_distance=128)
    assert (ours == buckets).all()


def test_the_text_encoder_in_half_precision_and_as_an_engine(folder: Path, tmp_path: Path) -> None:
    source = _source(folder)
    precision = PRECISIONS["fp16"]
    places = write_weights(tmp_path, source.shapes(precision, 0), source.tensors(precision, 0))
    model = source.new_model(precision)
    model.load_tensors(map_weights(tmp_path))
    function = text_function(model)
    assert function is not None
    graph = build_graph(function, model, places, tmp_path)
    save_graph(graph, tmp_path / function.spec.file)
    inputs = model.example_text()
    with torch.inference_mode():
        got = run_in_onnxruntime(tmp_path, function.spec, graph, inputs)
        error = compare_with_torch(function, inputs, got, PRECISIONS["fp16"].tolerance)
    assert error.relative_error < PRECISIONS["fp16"].tolerance.error

    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    built = build_engine(
        Flavour.load(RtxBuilder.folder),
        tensorrt_graph(tmp_path / function.spec.file)[0],
        "text_encoder",
        ("sm86",),
        lambda phase, share: None,
    )
    assert count_kernels(built.layers)["attention"] == 3, "one per layer"
    assert [t.name for t in built.outputs] == ["encoded"]


def test_the_schema_says_what_the_bundle_takes(bundle: Path) -> None:
    with TestClient(create_app(Service(Pipeline.load(bundle), max_wait_s=0))) as client:
        of_prompts = answers_to_valid_bodies(client, 25, only="prompt")
        of_features = answers_to_valid_bodies(client, 10, only="text_features")
    assert set(of_features) <= {"200", "504"} and of_features["200"] > 10
    too_long = {answer for answer in of_prompts if "tokens, this bundle takes up to 10" in answer}
    assert set(of_prompts) - too_long <= {"200", "504"}  # how many tokens a text becomes, no schema can say
    assert of_prompts["200"] > 30
