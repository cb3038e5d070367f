"""Bundles of several sizes over one weights file, and of other weights over the same graphs."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import INFINITY_MAPS, INFINITY_PLAN, run, tiny_infinity, tiny_states
from fastvar_trt.export.exporter import ExportOptions, ExportReport, export_again, export_model
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.models.lora import MergedState, merged
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import (
    CheckpointError,
    ExportError,
    ImageRequest,
    Pipeline,
    PruningPlan,
    RequestError,
    Service,
)
from fastvar_trt.runtime.layout import passed_bytes
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, read_manifest
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.tools.cli import main
from fastvar_trt.tools.cli.export import main as export_main
from fastvar_trt.tools.random_checkpoints import random_infinity_checkpoint
from server_process import serving

Export = Callable[..., tuple[Path, ExportReport]]
WIDE, TALL = ((1, 1), (2, 3), (4, 5), (4, 8)), ((1, 1), (3, 2), (5, 4), (8, 4), (10, 5))
FEATURES = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)


def at(maps: tuple[tuple[int, int], ...]) -> InfinitySource:
    """The tiny Infinity at one size, its image encoder included."""
    source = tiny_infinity(maps, with_encoder=True).with_encoder()
    return dataclasses.replace(source, config=dataclasses.replace(source.config, rope_span=maps[-1]))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes, the second with a scale more and a plan of its own."""
    out = tmp_path_factory.mktemp("sizes") / "both"
    report = export_model(at(WIDE), out, ExportOptions(INFINITY_PLAN), more=[(at(TALL), PruningPlan())])
    assert len(report.errors) == len(report.manifest.graphs)  # all compared with PyTorch, the condition once
    return out


@pytest.mark.parametrize(("maps", "size", "plan"), [(WIDE, "128x64", INFINITY_PLAN), (TALL, "80x160", PruningPlan())])
def test_each_size_draws_as_a_bundle_of_its_own(
    both: Path, maps: Any, size: str, plan: Any, export_once: Export
) -> None:
    alone, _ = export_once(f"alone_{size}", at(maps), ExportOptions(plan, compare=False))
    with Pipeline.load(both) as ours, Pipeline.load(alone) as theirs:
        height, width = theirs.manifest.default.image_height, theirs.manifest.default.image_width
        picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for edit in ({}, {"image": picture, "keep_scales": 2}):
            found = ours.generate(text_features=[FEATURES], seeds=3, size=size, **edit)
            np.testing.assert_array_equal(
                found.images, theirs.generate(text_features=[FEATURES], seeds=3, **edit).images
            )
        by_ratio = ours.generate(text_features=[FEATURES], seeds=3, h_div_w=height / width)
        assert by_ratio.images.shape == (1, height, width, 3)
        with pytest.raises(RequestError, match="size: got '64x64', this bundle draws 128x64, 80x160"):
            ours.generate(text_features=[FEATURES], size="64x64")


def test_sizes_share_weights_and_memory(both: Path, export_once: Export) -> None:
    manifest = read_manifest(both)
    files = [graph.file for graph in manifest.graphs]
    assert files.count("condition.onnx") == 1
    assert "step_03.onnx" in files and "step_04_80x160.onnx" in files
    alone, _ = export_once("alone_128x64", at(WIDE), ExportOptions(INFINITY_PLAN, compare=False))
    more = (both / WEIGHTS_FILE).stat().st_size - (alone / WEIGHTS_FILE).stat().st_size
    assert 0 < more < 60_000  # positions and interpolations
    needed = {variant.size: passed_bytes(variant.chain(1)) for variant in manifest.variants}
    with Pipeline.load(both) as pipe:
        assert list(pipe.buffer_shapes) == [("128x64", 1)]  # the other is loaded when it is drawn with
        pipe.generate(text_features=[FEATURES])
        before = pipe.num_buffer_bytes
        pipe.generate(text_features=[FEATURES], size="80x160")
        assert pipe._memory is not None
        assert pipe._memory.shape[0] == max(needed.values()) < sum(needed.values())
        assert pipe.num_buffer_bytes - before < needed["80x160"]  # results alone
        expected = pipe.generate(text_features=[FEATURES], seeds=1).images
        pipe.generate(text_features=[FEATURES], size="80x160", seeds=2)
        np.testing.assert_array_equal(pipe.generate(text_features=[FEATURES], seeds=1).images, expected)


def test_a_service_draws_all_sizes(both: Path) -> None:
    with Pipeline.load(both) as pipe, Service(pipe, max_wait_s=0.05) as service:
        sizes = ["128x64", "80x160"] * 3
        tickets = [
            service.submit(ImageRequest(text_features=FEATURES, seed=i, variant=size)) for i, size in enumerate(sizes)
        ]
        for i, (ticket, size) in enumerate(zip(tickets, sizes, strict=True)):
            expected = pipe.generate(text_features=[FEATURES], seeds=i, size=size).images[0]
            np.testing.assert_array_equal(ticket.result(60).image, expected)
        with pytest.raises(RequestError, match="variant: got 'x', this bundle holds 128x64, 80x160"):
            service.submit(ImageRequest(text_features=FEATURES, variant="x"))


def test_all_sizes_get_another_plan_or_precision(both: Path, tmp_path: Path) -> None:
    report = export_again(both, tmp_path / "dense", PruningPlan())
    assert {variant.plan.name for variant in report.manifest.variants} == {"none"}
    assert "step_03.onnx" in report.traced and "step_03_80x160.onnx" not in report.traced
    report = export_again(both, tmp_path / "w8", precision="w8")
    assert [variant.plan.name for variant in report.manifest.variants] == ["half", "none"]
    with Pipeline.load(tmp_path / "w8") as pipe:
        assert pipe.generate(text_features=[FEATURES], size="80x160").images.shape == (1, 160, 80, 3)


def test_a_size_is_held_once(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="sizes: 128x64 is asked for twice"):
        export_model(at(WIDE), tmp_path / "b", ExportOptions(), more=[(at(WIDE), PruningPlan())])
    assert not (tmp_path / "b").exists()


# Another checkpoint, and LoRA.


def test_a_fine_tune_takes_the_graphs_of_a_bundle(both: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"depth": 2, "width": 128, "num_heads": 2, "block_chunks": 1}
    state, _ = random_infinity_checkpoint(**sizes, text_width=128, text_length=12, seed=1)
    torch.save(state, tmp_path / "tuned.pth")
    found = run(export_main, "bundle", "--from", both, "--checkpoint", tmp_path / "tuned.pth", "--out", tmp_path / "b")
    assert found.exit_code == 0, found.output
    assert "(0 traced)" in found.output
    for graph in read_manifest(both).graphs:
        assert (tmp_path / "b" / graph.file).read_bytes() == (both / graph.file).read_bytes()
    fresh = InfinitySource.from_state(state, at(WIDE).vae_state, INFINITY_MAPS, WIDE[-1]).with_encoder()
    export_model(fresh, tmp_path / "fresh", ExportOptions(INFINITY_PLAN, compare=False))
    assert run(main, "verify", tmp_path / "b").exit_code == 0  # its reference is the new checkpoint's
    with Pipeline.load(tmp_path / "b") as ours, Pipeline.load(tmp_path / "fresh") as theirs:
        found, expected = (p.generate(text_features=[FEATURES], seeds=3) for p in (ours, theirs))
        np.testing.assert_array_equal(found.images, expected.images)


def test_graphs_tell_weights_apart_that_were_equal(tmp_path: Path) -> None:
    """As at initialisation; those of a fine-tune differ, and small ones most easily go by another's name."""
    tuned = tiny_infinity(seed=1)
    state = {key: torch.zeros_like(value) if value.numel() <= 1024 else value for key, value in tuned.state.items()}
    equal = dataclasses.replace(tuned, state=state)
    for name, source in (("equal", equal), ("fresh", tuned)):
        export_model(source, tmp_path / name, ExportOptions(INFINITY_PLAN, compare=False))
        assert "blocks.0.attn.q_scale" in external_names(tmp_path / name / "step_00.onnx")
        assert "blocks.1.attn.q_scale" in external_names(tmp_path / name / "step_00.onnx")
    torch.save(dict(tuned.state), tmp_path / "tuned.pth")
    export_again(tmp_path / "equal", tmp_path / "again", checkpoint=tmp_path / "tuned.pth")
    for graph in read_manifest(tmp_path / "again").graphs:
        assert external_names(tmp_path / "again" / graph.file) == external_names(tmp_path / "fresh" / graph.file)
    with Pipeline.load(tmp_path / "again") as ours, Pipeline.load(tmp_path / "fresh") as theirs:
        found, expected = (p.generate(text_features=[FEATURES], seeds=3) for p in (ours, theirs))
        np.testing.assert_array_equal(found.images, expected.images)


def external_names(path: Path) -> set[str]:
    """The weights that a graph reads."""
    graph = onnx.load(path, load_external_data=False).graph
    return {tensor.name for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}


def test_other_checkpoints_are_refused(both: Path, tmp_path: Path) -> None:
    other, _ = random_infinity_checkpoint(
        depth=3, width=128, num_heads=2, block_chunks=1, text_width=128, text_length=12
    )
    torch.save(other, tmp_path / "deep.pth")
    with pytest.raises(CheckpointError, match=r"--checkpoint: \d+ unexpected: block_chunks.0.module.2"):
        export_again(both, tmp_path / "b", checkpoint=tmp_path / "deep.pth")
    for more, message in (
        (("--precision", "w8"), "--checkpoint: not with --precision"),
        (("--integer-kv",), "--checkpoint: not with --precision or --integer-kv"),
        (("--lora", tmp_path / "none"), f"checkpoint {tmp_path / 'none'}: no such file"),
    ):
        state, _ = random_infinity_checkpoint(
            depth=2, width=128, num_heads=2, block_chunks=1, text_width=128, text_length=12
        )
        torch.save(state, tmp_path / "same.pth")
        arguments = ("--from", both, "--checkpoint", tmp_path / "same.pth", "--out", tmp_path / "b", *more)
        found = run(export_main, "bundle", *arguments)
        assert found.exit_code == 1 and message in found.output, found.output
    found = run(export_main, "bundle", "--from", both, "--lora", tmp_path / "none", "--out", tmp_path / "b")
    assert found.exit_code == 2 and "--lora needs --checkpoint" in found.output
    assert not (tmp_path / "b").exists()


MATRIX = "blocks.0.attn.mat_qkv"


def lora_factors(rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rank, 128, generator=generator), torch.randn(384, rank, generator=generator)


def test_a_lora_is_merged(tmp_path: Path) -> None:
    states = tiny_states()
    down, up = lora_factors()
    changed = {**states[0], f"{MATRIX}.weight": states[0][f"{MATRIX}.weight"] + 0.5 * (8 / 4) * (up @ down)}
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}))
    prefix = f"base_model.model.{MATRIX}"
    save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    plain_keys = {
        f"{MATRIX}.lora_down.weight": down,
        f"{MATRIX}.lora_up.weight": up,
        f"{MATRIX}.alpha": torch.tensor(8.0),
    }
    save_file(plain_keys, tmp_path / "plain.safetensors")
    torch.save(states[0], tmp_path / "var.pth")
    torch.save(states[1], tmp_path / "vae.pth")
    plain = VARSource.from_state(changed, states[1])
    export_model(plain, tmp_path / "expected", ExportOptions(compare=False))
    for lora in (folder, tmp_path / "plain.safetensors"):
        source = VARSource.from_state(*states).with_lora(lora, 0.5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MergedState, "__getitem__", None)  # shapes are known without a product
            assert source.shapes(PRECISIONS["fp32"], 0) == plain.shapes(PRECISIONS["fp32"], 0)
        export_model(source, tmp_path / "merged", ExportOptions(compare=False), force=True)
        for name in (WEIGHTS_FILE, "step_03.onnx"):
            assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    files = ("--checkpoint", tmp_path / "var.pth", "--vae", tmp_path / "vae.pth", "--prune", "none", "--no-compare")
    found = run(export_main, "var", *files, "--lora", folder, "--lora-scale", 0.5, "--out", tmp_path / "cli")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "cli" / WEIGHTS_FILE).read_bytes() == (tmp_path / "expected" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {}, "holds no matrix"),
        (lambda f: {**f, "text_model.x": torch.zeros(1)}, "key text_model.x is no factor of a matrix"),
        (lambda f: {k.replace("attn", "mlp"): v for k, v in f.items()}, "this checkpoint has no such matrix"),
        (lambda f: dict(list(f.items())[:1]), "one of its two factors is missing"),
        (lambda f: {k: v[:, :2] for k, v in f.items()}, r"got factors \[384, 2\] and \[4, 2\] of \[384, 128\]"),
        (lambda f: {k: v * float("nan") for k, v in f.items()}, "has values that are not finite"),
    ],
)
def test_files_that_are_no_lora(change: Any, message: str, tmp_path: Path) -> None:
    down, up = lora_factors()
    factors = {f"{MATRIX}.lora_A.weight": down, f"{MATRIX}.lora_B.weight": up}
    torch.save({k: v.clone() for k, v in change(factors).items()}, tmp_path / "lora.pth")
    with pytest.raises(CheckpointError, match=message):
        merged(tiny_states()[0], tmp_path / "lora.pth")


# On the command line and over HTTP, with the model of the package.


def test_sizes_of_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "b"
    sizes = ("--pn", "0.06M,2K", "--aspect", "1:1,16:9,9:16")
    arguments = ("scenes", *sizes, "--prune", "none", "--no-compare", "--out", out)
    for wrong, message in (
        (("--pn", "3M"), "expected of 0.06M"),
        (("--aspect", "1:0"), "expected two numbers each as in 4:3"),
        (("--pn", "2K", "--aspect", "5:1"), "pn 2K has the ratios"),
        (("--h-div-w", "1"), "--h-div-w and --aspect say the same"),
    ):
        found = run(export_main, *arguments, *wrong)
        assert found.exit_code != 0 and message in found.output, found.output
        assert not out.exists()
    found = run(export_main, *arguments, "--pn", "0.06M", "--with-encoder")
    assert found.exit_code == 0, found.output
    manifest = read_manifest(out)
    assert list(manifest.sizes) == ["256x256", "336x192", "192x336"]
    assert manifest.examples
    with Pipeline.load(out) as pipe:
        shapes = [pipe.generate(prompts=["a red cube"], size=size).images.shape for size in manifest.sizes]
    assert shapes == [(1, 256, 256, 3), (1, 192, 336, 3), (1, 336, 192, 3)]
    for size in manifest.sizes:
        width, height = map(int, size.split("x"))
        found = run(main, "generate", out, "--prompt", "a red cube", "--size", size, "-o", tmp_path / f"{size}.png")
        assert found.exit_code == 0, found.output
        with Image.open(tmp_path / f"{size}.png") as image:
            assert image.size == (width, height)
    with serving(out, tmp_path / "log") as server:
        for size in manifest.sizes:
            answer = server.draw(prompt="a red cube", seed=0, size=size)
            assert answer.status_code == 200
            assert Image.open(io.BytesIO(answer.content)).size == tuple(map(int, size.split("x")))
            body = {"prompt": "a red cube", "seed": 0, "size": size}
            streamed = server.client.post("/v1/images/stream", json=body).text  # previews of scales that it has
            assert streamed.count("event: preview") == 3 and "event: image" in streamed
            body["n"] = 2
            pictures = server.client.post("/v1/images/generations", json=body).json()["data"]
            assert base64.b64decode(pictures[0]["b64_json"]) == answer.content
        assert server.draw(prompt="a red cube", size="1x1").status_code == 422
