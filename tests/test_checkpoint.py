"""Loading checkpoints: official files, training checkpoints, and everything that is not one."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_states
from fastvar_trt.export.models.checkpoint import load_state_dict
from fastvar_trt.export.models.var.config import VARConfig
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.export.models.vqvae import VQVAEConfig
from fastvar_trt.runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return tiny_states()


def test_training_checkpoint_is_unwrapped(tmp_path: Path, states: Any) -> None:
    state, vae_state = states
    torch.save({"epoch": 3, "trainer": {"var_wo_ddp": state, "vae_local": vae_state}}, tmp_path / "ar-ckpt.pth")
    assert load_state_dict(tmp_path / "ar-ckpt.pth", ("trainer", "var_wo_ddp")).keys() == state.keys()
    assert load_state_dict(tmp_path / "ar-ckpt.pth", ("trainer", "vae_local")).keys() == vae_state.keys()


def test_all_key_problems_are_in_one_error(states: Any) -> None:
    state, vae_state = dict(states[0]), dict(states[1])
    # The first of these is what depth and variant could be read from.
    del state["blocks.1.attn.mat_qkv.weight"], state["blocks.0.attn.scale_mul_1H11"], state["head.bias"]
    del vae_state["decoder.up.0.block.2.norm1.weight"]
    state["blocks.0.attn.extra"] = torch.zeros(1)
    state["blocks.0.ffn.fc2.weight"] = torch.zeros(3, 4)
    with pytest.raises(CheckpointError) as caught:
        VARSource.from_state(state, vae_state)
    message = str(caught.value)
    assert "3 missing: head.bias, blocks.0.attn.scale_mul_1H11, blocks.1.attn.mat_qkv.weight" in message
    assert "--vae: 1 missing: decoder.up.0.block.2.norm1.weight" in message
    assert "1 unexpected: blocks.0.attn.extra" in message
    assert "1 mis-shaped: blocks.0.ffn.fc2.weight (got [3, 4], expected [128, 512])" in message


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        (0, "word_embed.weight", torch.zeros(4), "word_embed.weight: got shape [4], expected 2 axes"),
        (0, "blocks.0.attn.scale_mul_1H11", torch.zeros(2), "scale_mul_1H11: got shape [2], expected 4 axes"),
        (0, "lvl_1L", torch.tensor([[0, -1]]), "lvl_1L: expected the scale of every position"),
        (1, "quantize.embedding.weight", torch.zeros(96), "embedding.weight: got shape [96], expected 2 axes"),
        (1, "decoder.up.0.block.0.norm2.weight", None, "key decoder.up.0.block.0.norm2.weight is missing"),
        (1, "decoder.up.0.block.0.norm2.weight", torch.zeros(33), "got 33 channels, expected a multiple of 32"),
    ],
)
def test_tensors_that_sizes_are_read_from(states: Any, part: int, key: str, value: Any, message: str) -> None:
    parts = [dict(states[0]), dict(states[1])]
    if value is None:
        del parts[part][key]
    else:
        parts[part][key] = value
    with pytest.raises(CheckpointError) as caught:
        VARSource.from_state(*parts)
    assert message in str(caught.value)


def test_quant_resi_is_an_override(states: Any) -> None:
    assert VARSource.from_state(*states).vae_config.phi_ratio == 0.5
    assert VARSource.from_state(*states, {"quant_resi": 0.25}).vae_config.phi_ratio == 0.25
    with pytest.raises(CheckpointError, match="quant_resi: got 2, expected a number from 0 to 1"):
        VARSource.from_state(*states, {"quant_resi": 2})


def test_training_buffers_and_the_encoder_are_ignored(states: Any) -> None:
    state, vae_state = dict(states[0]), dict(states[1])
    state["attn_bias_for_masking"] = torch.zeros(1, 1, 2, 2)
    state["blocks.0.attn.zero_k_bias"] = torch.zeros(128)
    vae_state |= {"encoder.conv_in.weight": torch.zeros(1), "quantize.ema_vocab_hit_SV": torch.zeros(1)}
    assert VARSource.from_state(state, vae_state).config.depth == 2


def test_a_checkpoint_of_another_model(states: Any) -> None:
    infinity = {"text_norm.weight": torch.zeros(4), "word_embed.bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"not a VAR transformer: key word_embed.weight is missing"):
        VARSource.from_state(infinity, states[1])
    with pytest.raises(CheckpointError, match=r"not a VAR VQVAE: key quantize.embedding.weight is missing"):
        VARSource.from_state(states[0], states[0])


def test_a_vae_of_another_model(states: Any) -> None:
    _, other = tiny_states(vocab_size=64)
    with pytest.raises(CheckpointError, match="vocab_size: the VAE has 64, the transformer 96"):
        VARSource.from_state(states[0], other)


def test_sizes_that_contradict_each_other(states: Any) -> None:
    state = dict(states[0])
    state["lvl_1L"] = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(CheckpointError, match=r"lvl_1L: got \[1, 3\] positions per scale, expected squares"):
        VARConfig.from_state_dict(state)
    state["lvl_1L"] = torch.tensor([[0, 1, 1, 1, 1]])
    with pytest.raises(CheckpointError, match=r"pos_1LC: got 99 positions, but patch_nums \[1, 2\] need 5"):
        VARConfig.from_state_dict(state)


def test_what_the_state_dict_cannot_tell(states: Any) -> None:
    state = dict(states[0])
    del state["lvl_1L"]
    with pytest.raises(CheckpointError, match="no buffer lvl_1L"):
        VARConfig.from_state_dict(state)
    assert VARConfig.from_state_dict(state, {"patch_nums": [1, 3, 5, 8]}).patch_nums == (1, 3, 5, 8)
    with pytest.raises(CheckpointError, match="unknown key 'depth'; the keys are num_heads, patch_nums, quant_resi"):
        VARSource.from_state(*states, {"depth": 2})
    with pytest.raises(CheckpointError, match="num_heads: got 5, expected a divisor of the width 128"):
        VARConfig.from_state_dict(states[0], {"num_heads": 5})
    with pytest.raises(CheckpointError, match="patch_nums: got 'all'"):
        VARConfig.from_state_dict(state, {"patch_nums": "all"})
    plain, _ = tiny_states(attn_l2_norm=False)
    assert VARConfig.from_state_dict(plain).num_heads == 2  # width / 64, the official convention
    assert VARConfig.from_state_dict(plain, {"num_heads": 4}).num_heads == 4


@pytest.mark.parametrize("kind", ["shared", "partially_shared", "non_shared"])
def test_sharing_of_the_residual_convolutions(kind: str, states: Any) -> None:
    vae_state = {k: v for k, v in states[1].items() if ".quant_resi." not in k}
    names = {
        "shared": ["qresi"],
        "partially_shared": [f"qresi_ls.{i}" for i in range(4)],
        "non_shared": ["0", "1", "2"],
    }
    for name in names[kind]:
        vae_state[f"quantize.quant_resi.{name}.weight"] = torch.zeros(32, 32, 3, 3)
        vae_state[f"quantize.quant_resi.{name}.bias"] = torch.zeros(32)
    config = VQVAEConfig.from_state_dict(vae_state)
    assert (config.phi, config.num_phi) == (kind, len(names[kind]))
    indices = [config.phi_index(k, 10) for k in range(10)]
    # By `PhiPartiallyShared.__getitem__` of the reference; scale 2 lies between two ticks but for rounding.
    expected = {
        "shared": [0] * 10,
        "partially_shared": [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
        "non_shared": [0, 0, 0, 0, 1, 1, 1, 2, 2, 2],
    }
    assert indices == expected[kind]
    VARSource.from_state(states[0], vae_state)


class _Payload:
    def __reduce__(self) -> Any:
        return print, ("this pickle ran code",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "no such file"),
        ("empty.pth", b"", "not a readable PyTorch file"),
        ("garbage.pth", b"\x80\x02garbage that is no pickle", "not loaded|not a readable PyTorch file"),
        ("garbage.safetensors", b"\x10" * 64, "not a readable safetensors file"),
    ],
)
def test_files_that_are_not_checkpoints(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / name, ("trainer", "var_wo_ddp"))


def test_a_truncated_checkpoint(tmp_path: Path, states: Any) -> None:
    torch.save(states[0], tmp_path / "var.pth")
    content = (tmp_path / "var.pth").read_bytes()
    (tmp_path / "var.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"var.pth: not a readable PyTorch file"):
        load_state_dict(tmp_path / "var.pth", ("trainer", "var_wo_ddp"))


def test_a_pickle_with_flipped_bits(tmp_path: Path, rng: Any) -> None:
    torch.save({"weight": torch.zeros(300)}, tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    for place in rng.integers(len(content), size=300):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.pth").write_bytes(damaged)
        with contextlib.suppress(CheckpointError):  # any other error is a traceback for the user
            load_state_dict(tmp_path / "bad.pth", ("trainer", "var_wo_ddp"))
    assert load_state_dict(tmp_path / "good.pth", ("trainer", "var_wo_ddp")).keys() == {"weight"}


def test_a_pickle_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": _Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_state_dict(tmp_path / "evil.pth", ("trainer", "var_wo_ddp"))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Payload()))
    with pytest.raises(CheckpointError):
        load_state_dict(tmp_path / "plain.pth", ("trainer", "var_wo_ddp"))
    assert "ran code" not in capsys.readouterr().out


def test_not_a_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="got no flat state dict"):
        load_state_dict(tmp_path / "x.pth", ("trainer", "var_wo_ddp"))
