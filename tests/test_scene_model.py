"""The text-to-image checkpoint that comes with the package: what it is, and that it draws what it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.models.infinity.checkpoint import rope_tables
from fastvar_trt.export.models.infinity.family import SCENE_FOLDER, load_scenes
from fastvar_trt.export.models.registry import load_plan
from fastvar_trt.runtime import Pipeline
from fastvar_trt.tools.scenes.checker import read_picture


def test_the_card_says_what_the_files_are() -> None:
    source, card = load_scenes("1M"), json.loads((SCENE_FOLDER / "card.json").read_text())
    transformer = card["config"]["transformer"]
    assert (source.config.depth, source.config.width) == (transformer["depth"], transformer["width"])
    assert source.config.bits == transformer["bits"]["code_bits"] and len(source.config.schedule) == 13
    assert source.text is not None and source.text.config.text_length == transformer["text"]["text_length"]
    assert sum(path.stat().st_size for path in SCENE_FOLDER.rglob("*.safetensors")) < 30e6


def test_larger_sizes_keep_the_positions_that_it_knows() -> None:
    trained, larger = load_scenes("1M").config, load_scenes("2K").config
    for scale in range(len(trained.schedule)):
        for known, got in zip(rope_tables(trained, scale), rope_tables(larger, scale), strict=True):
            assert torch.equal(known, got)
    assert larger.schedule[-1] == (84, 84)
    for config in (larger, load_scenes("2K", h_div_w=0.5).config):
        cos, sin = rope_tables(config, 13)
        angles = torch.atan2(sin, cos).view(*config.schedule[13], 2, -1)[
            ..., 0
        ]  # positions of row and column, mod 2 pi
        for steps in (torch.diff(angles[:, 0, 0]), torch.diff(angles[0, :, 1])):
            assert (steps.remainder(2 * torch.pi) > 0.5).all(), "no two have the same position"


def test_it_draws_what_it_is_asked_for(export_once: Callable[..., tuple[Path, ExportReport]]) -> None:
    """At 1024x1024, pruned as published."""
    options = ExportOptions(plan=load_plan("fastvar-infinity"), compare=False)
    bundle, _ = export_once("scenes", load_scenes("1M"), options)
    build_targets(bundle, "cpu")
    asked = {
        "a green sphere in the middle on sand at sunset": ("sand", "sunset", [("green", "sphere")]),
        "a red sphere left of a blue cube on sand": ("sand", "day", [("red", "sphere"), ("blue", "cube")]),
        "a purple cone on the left on tiles at night": ("tiles", "night", [("purple", "cone")]),
    }
    with Pipeline.load(bundle) as pipe:
        for prompt, (ground, sky, solids) in asked.items():
            image = pipe.generate(prompts=[prompt], seeds=1).images[0]
            assert image.shape == (1024, 1024, 3)
            reading = read_picture(image)
            assert (reading.ground, reading.sky) == (ground, sky), prompt
            assert [(solid.colour, solid.shape) for solid in reading.solids] == solids, prompt
