"""Training of the scene model, at sizes that take seconds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from tokenizers import Tokenizer
from torch import Tensor
from transformers import T5EncoderModel

from fastvar_trt.export.models.decoder import Decoder
from fastvar_trt.export.models.infinity.schedules import schedule
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.models.reference import default_request, generate
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.plan import DENSE
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.tools import training
from fastvar_trt.tools.random_checkpoints import random_infinity_checkpoint
from fastvar_trt.tools.train_scenes import cli
from fastvar_trt.tools.train_scenes.autoencoder import BitAutoEncoder, quantize, resized
from fastvar_trt.tools.train_scenes.cli import train
from fastvar_trt.tools.train_scenes.config import (
    SCHEDULE,
    BitsConfig,
    DecoderConfig,
    SceneTraining,
    TextConfig,
    TransformerConfig,
    View,
)
from fastvar_trt.tools.train_scenes.text import T5Encoder, token_batch, write_text_encoder
from fastvar_trt.tools.train_scenes.text_stage import captions_tokenizer
from fastvar_trt.tools.train_scenes.transformer import Transformer, window
from fastvar_trt.tools.train_scenes.vae_stages import begin_as_identity, half_pool, partly_decoded

_BITS = BitsConfig(code_bits=8, channels=(8, 8), num_pictures=2, steps=2, batch=1)
TINY = SceneTraining(
    DecoderConfig(_BITS, level_channels=(48, 48, 48, 24, 24), num_pictures=1, phases=((1, 1, 2, 1024), (1, 1, 0, 256))),
    TransformerConfig(
        _BITS,
        TextConfig(width=64, depth=1, mlp_width=64, text_length=40, steps=2, batch=2),
        depth=1,
        width=64,
        num_heads=2,
        views=(View(5, 2), View(13, 1, 5, 0.1)),
        parts=((1, (1.0, 0.0)), (1, (0.0, 1.0))),
    ),
)


def run(work_dir: Path, out: Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli.main, ["--work-dir", str(work_dir), "--out", str(out)])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the pictures in it, and no training."""
    folder = tmp_path_factory.mktemp("rendered")
    half_pool(_BITS, folder).render(lambda share: None, 1)
    return folder


@pytest.fixture
def work_dir(rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(cli.SIZES, "small", TINY)
    return Path(shutil.copytree(rendered, tmp_path / "work"))


def test_training_writes_official_checkpoints(work_dir: Path, tmp_path: Path) -> None:
    code, output = run(work_dir, tmp_path / "out")
    assert code == 0, output
    files = [tmp_path / "out" / name for name in (cli.CHECKPOINT, cli.VAE)]
    source = InfinitySource.from_files(*files, "0.06M", 1.0, None, tmp_path / "out" / cli.TEXT_ENCODER)
    assert source.config.depth == 1 and source.vae_config.level_channels == (48, 48, 48, 24, 24)
    assert source.text is not None and source.text.config.width == 64
    assert all(t.dtype == torch.float16 for t in (*source.state.values(), *source.vae_state.values()))
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["steps"] == {"bits": 2, "text": 2, "transformer": 2, "decoder": 2}
    assert np.isfinite(list(card["final_losses"].values())).all()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "(1 layers x 64)" in text and "| transformer | 2 |" in text and "`t5/model.safetensors`" in text
    code, output = run(work_dir, tmp_path / "out")
    assert code == 1 and "exists already" in output


def test_an_interrupted_training_ends_as_one_that_ran_through(
    work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(Exception):
        pass

    other = Path(shutil.copytree(work_dir, tmp_path / "other"))
    monkeypatch.setattr(training, "_SAVE_EVERY_S", 0.0)
    interrupted: set[str] = set()

    def interrupt(stage: str, phase: str, share: float) -> None:
        if share == 0.5 and phase not in ("rendering", "encoding") and stage not in interrupted:
            interrupted.add(stage)
            raise Interrupt

    def states(folder: Path, progress: Any) -> dict[str, Any]:
        stages = train(TINY, folder, torch.device("cpu"), progress, 1)
        return {
            f"{stage.name}.{name}": value for stage in stages for name, value in stage.model.state_dict().items()
        } | {
            f"{stage.name}.{kind}.{name}": torch.as_tensor(values)
            for stage in stages
            for kind, own in (("loss", stage.losses), ("extra", stage.extra))
            for name, values in own.items()
        }

    through = states(work_dir, lambda *_: None)
    while True:
        try:
            resumed = states(other, interrupt)
            break
        except Interrupt:
            continue
    assert interrupted == {"bits", "text", "transformer", "decoder"}
    assert through.keys() == resumed.keys()
    for name, value in through.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_what_is_damaged_is_named(work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = work_dir / "half" / "1.npy"
    content = picture.read_bytes()
    picture.write_bytes(content[:1000])
    code, output = run(work_dir, tmp_path / "out")
    assert code == 1 and "1.npy: not a picture of this training" in output and "remove it" in output
    picture.write_bytes(content)
    assert run(work_dir, tmp_path / "out")[0] == 0

    before = {path: path.read_bytes() for path in work_dir.glob("*.pt")}
    changed = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, lr=1.0))
    monkeypatch.setitem(cli.SIZES, "small", changed)
    code, output = run(work_dir, tmp_path / "again")
    assert code == 1 and "decoder.pt: the state of another run (lr: 0.002 there, 1.0 here)" in output
    assert {path: path.read_bytes() for path in work_dir.glob("*.pt")} == before

    (features,) = work_dir.glob("features_*.npy")
    features.write_bytes(b"damaged")
    code, output = run(work_dir, tmp_path / "again")
    assert code == 1 and f"{features.name}: is damaged" in output and not (tmp_path / "again").exists()


@torch.no_grad()
def test_the_text_encoder_is_t5(tmp_path: Path) -> None:
    """Its features are those that `transformers` computes from the files that are written."""
    config = TextConfig(width=64, text_length=40)
    tokenizer = captions_tokenizer(config)
    torch.manual_seed(0)
    model = T5Encoder(config.sizes(tokenizer.get_vocab_size())).half().float()
    write_text_encoder(tmp_path / "t5", model, tokenizer)
    reference = T5EncoderModel.from_pretrained(tmp_path / "t5", dtype=torch.float32).eval()
    again = Tokenizer.from_file(str(tmp_path / "t5" / "tokenizer.json"))
    captions = ["Two red cubes on sand", "a glossy blue sphere left of a unicorn, at night"]
    ids, counts = token_batch(again, captions, 40)
    assert again.encode(captions[1]).tokens[-5:] == ["<unk>", ",", "at", "night", "</s>"]
    mask = (torch.arange(40) < counts[:, None]).long()
    expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
    for ours, theirs, count in zip(model(ids, counts), expected, counts, strict=True):
        torch.testing.assert_close(ours[:count], theirs[:count], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_decoder_grows_without_a_break() -> None:
    """A level that joins doubles the picture of those before; all levels are the decoder that is exported."""
    torch.manual_seed(0)
    model = Decoder(8, (48, 48, 48, 24, 24), 1, attention=False)
    begin_as_identity(model, 2)
    f_hat = torch.randn(1, 8, 4, 4)
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1.0
    model.conv_out.weight *= centre  # else its neighbours are others at twice the size
    quarter, half, whole = (partly_decoded(model, f_hat, finest) for finest in (2, 1, 0))
    torch.testing.assert_close(whole, model(f_hat))
    torch.testing.assert_close(half, F.interpolate(quarter, scale_factor=2.0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, F.interpolate(half, scale_factor=2.0), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_pyramid_of_bits_adds_up() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 8, 64, 64)
    pyramid = quantize(features, SCHEDULE)
    assert [tuple(bits.shape[-2:]) for bits in pyramid.bits] == list(SCHEDULE)
    f_hat = torch.zeros_like(features)
    for k, bits in enumerate(pyramid.bits):
        if k:
            torch.testing.assert_close(pyramid.inputs[k - 1], resized(f_hat, SCHEDULE[k]))
        f_hat = f_hat + resized((2 * bits.float() - 1) * 8**-0.5, SCHEDULE[-1])
    torch.testing.assert_close(pyramid.f_hat, f_hat)
    errors = [float((quantize(features, SCHEDULE, num_scales=k).f_hat - features).abs().mean()) for k in (1, 9, 13)]
    assert errors[0] > errors[1] > errors[2]
    wrong = quantize(features, SCHEDULE, torch.full((2, 1, 1, 1), 0.1))
    assert torch.equal(wrong.bits[0], pyramid.bits[0])  # what is learnt is right, what is seen is not
    assert not torch.equal(wrong.inputs[0], pyramid.inputs[0])
    model = BitAutoEncoder(8, (8, 8))
    assert model.decoder(model.encoder(torch.zeros(1, 3, 64, 64))).shape == (1, 3, 64, 64)


def small_transformer() -> tuple[TransformerConfig, Transformer]:
    config = TransformerConfig(
        BitsConfig(code_bits=8), TextConfig(width=64, text_length=12), depth=2, width=64, num_heads=2
    )
    maps, _ = schedule("0.06M", 1.0)
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(config.sizes, schedule=maps))
    for parameter in model.parameters():  # zeros and ones would hide what is missing
        parameter.data += 0.1 * torch.randn_like(parameter)
    return config, model


@torch.no_grad()
def test_teacher_forcing_sees_what_the_exported_chain_sees() -> None:
    """The logits of the training pass are those of the step functions on the same bits, with and without text."""
    _, model = small_transformer()
    maps, span = schedule("0.06M", 1.0)
    _, vae_state = random_infinity_checkpoint(depth=2, width=64, num_heads=2, bits=8)
    source = InfinitySource.from_state(model.state_dict(), vae_state, maps, span)
    precision = PRECISIONS["fp32"]
    chain = source.new_model(precision)
    chain.load_tensors(dict(source.tensors(precision, 0)))

    features, counts = torch.randn(2, 12, 64), torch.tensor([5, 12])
    condition = {
        names.TEXT_FEATURES: features.repeat(2, 1, 1),
        names.TEXT_LENGTHS: counts.repeat(2),
        names.NEGATIVE: torch.zeros(2, dtype=torch.bool),
    }
    plan = DENSE.resolve(maps, 2)
    noise = {
        k: torch.from_numpy(np.stack([uniform_noise(s, k, chain.token_spec(k)[0]) for s in (0, 1)])) for k in range(7)
    }
    for cfg in (1.0, 0.0):
        result = generate(chain, plan, condition, noise, default_request(chain, 2, greedy=False, cfg=cfg))
        dropped = torch.full((2,), cfg == 0.0)
        logits = model(features, counts, dropped, _inputs(result.tokens, maps), window(maps, 7, 1.0, (0.0, 0.0)))
        for k, own in enumerate(logits):
            margin = result.logits[k][..., 1] - result.logits[k][..., 0]
            torch.testing.assert_close(own, margin, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def _inputs(tokens: dict[int, Tensor], maps: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """What every scale but the first embeds."""
    f_hat, inputs = torch.zeros(()), []
    for k, size in enumerate(maps):
        if k:
            inputs.append(resized(f_hat, size))
        codes = (2 * tokens[k].float() - 1) * tokens[k].shape[-1] ** -0.5
        f_hat = f_hat + resized(codes.transpose(1, 2).unflatten(2, size), maps[-1])
    return inputs
