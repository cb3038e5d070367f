"""Training of the demo model, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fastvar_trt.export.models.checkpoint import load_state_dict
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.tools import training as stages
from fastvar_trt.tools.train_demo import training
from fastvar_trt.tools.train_demo.cli import main
from fastvar_trt.tools.train_demo.photographs import load_photographs, random_crop
from fastvar_trt.tools.train_demo.training import TrainingConfig, train_transformer, train_vqvae
from fastvar_trt.tools.train_demo.transformer import Transformer, teacher_maps
from fastvar_trt.tools.train_demo.vqvae import VQVAE

TINY = ["--patch-nums", "1,2", "--vae-steps", "3", "--var-steps", "3", "--depth", "1", "--width", "64"]


def run(work_dir: Path, out: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["--work-dir", str(work_dir), "--out", str(out), *(options or TINY)])
    return done.exit_code, done.output


def test_training_writes_an_official_checkpoint(tmp_path: Path) -> None:
    code, output = run(tmp_path / "work", tmp_path / "out")
    assert code == 0, output
    source = VARSource.from_files(tmp_path / "out" / "var.safetensors", tmp_path / "out" / "vae.safetensors")
    assert source.config.patch_nums == (1, 2) and source.config.num_classes == 8 and source.config.shared_aln
    assert all(not t.is_floating_point() or t.dtype == torch.float16 for t in source.state.values())
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert [c["name"] for c in card["classes"]][:2] == ["astronaut", "cat"]
    assert np.isfinite(list(card["final_losses"].values())).all()

    text = (tmp_path / "out" / "README.md").read_text()
    assert "| 1 | cat | `chelsea.png` |" in text and "32x32 pixels" in text

    code, output = run(tmp_path / "work", tmp_path / "out")
    assert code == 1 and "exists already" in output


def test_an_interrupted_training_ends_as_one_that_ran_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(stage: str, losses: str, share: float) -> None:
        if share == 0.5:
            raise Interrupt

    monkeypatch.setattr(stages, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(training, "_REVIVE_EVERY", 3)  # after the interruption, with hits from before it
    config = TrainingConfig(patch_nums=(1, 2), vae_steps=4, var_steps=4, depth=1, width=64)
    photographs, cpu = load_photographs(), torch.device("cpu")

    def train(folder: Path) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        first = train_vqvae(config, photographs, folder, cpu, print)
        second = train_transformer(config, photographs, first.model, folder, cpu, print)  # type: ignore[arg-type]
        return {**first.model.state_dict(), **second.model.state_dict()}

    (tmp_path / "b").mkdir()
    with pytest.raises(Interrupt):
        train_vqvae(config, photographs, tmp_path / "b", cpu, interrupt)
    through, resumed = train(tmp_path / "a"), train(tmp_path / "b")
    for name, value in through.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_a_state_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    assert run(tmp_path / "work", tmp_path / "out")[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "work").iterdir()}
    code, output = run(tmp_path / "work", tmp_path / "other", *TINY, "--seed", "1")
    assert code == 1 and "the state of another run (seed: 0 there, 1 here)" in output
    assert {p.name: p.read_bytes() for p in (tmp_path / "work").iterdir()} == before

    (tmp_path / "work" / "vqvae.pt").write_bytes(b"damaged")
    code, output = run(tmp_path / "work", tmp_path / "other")
    assert code == 1 and "not a state of this training" in output
    assert not (tmp_path / "other").exists()


def test_teacher_forcing_sees_what_the_exported_chain_sees(tmp_path: Path) -> None:
    """The logits of the training pass equal those of the step functions on the same tokens."""
    from fastvar_trt.export.exporter import ExportOptions, export_model
    from fastvar_trt.runtime import Pipeline

    assert run(tmp_path / "work", tmp_path / "out", *TINY[:1], "1,2,3", *TINY[2:])[0] == 0
    paths = [tmp_path / "out" / name for name in ("var.safetensors", "vae.safetensors")]
    export_model(VARSource.from_files(*paths), tmp_path / "bundle", ExportOptions())
    with Pipeline.load(tmp_path / "bundle") as pipe:
        result = pipe.generate([3], cfg=0.0, greedy=True, return_logits=True)
    config = TrainingConfig(patch_nums=(1, 2, 3), depth=1, width=64)
    state, vae_state = (load_state_dict(path) for path in paths)
    vqvae, model = VQVAE(config.vqvae, config.patch_nums), Transformer(config.transformer)
    vqvae.load_state_dict({k: v.float() for k, v in vae_state.items()})
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    tokens = [torch.from_numpy(step).long() for step in result.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([3]), teacher_maps(vqvae.quantize, tokens))
    assert result.logits is not None
    np.testing.assert_allclose(np.concatenate(result.logits, axis=1), logits.numpy(), atol=1e-3)


def test_crops_are_reproducible_squares() -> None:
    image = load_photographs()[0]
    first, again = (random_crop(image, 32, np.random.default_rng(4)) for _ in range(2))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
