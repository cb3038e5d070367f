"""The command line of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from safetensors.torch import save_file

from fastvar_trt.export.models.decoder import Decoder
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.progress import Progress
from fastvar_trt.tools.cli.command import ErrorCommand, examples, progress_bars
from fastvar_trt.tools.train_scenes.autoencoder import BitAutoEncoder
from fastvar_trt.tools.train_scenes.config import ROPE_SPAN, SCHEDULE, SIZES, SceneTraining
from fastvar_trt.tools.train_scenes.text import write_text_encoder
from fastvar_trt.tools.train_scenes.text_stage import QUESTIONS, TextReader, captions_tokenizer, train_text
from fastvar_trt.tools.train_scenes.transformer import Transformer
from fastvar_trt.tools.train_scenes.transformer_stage import train_transformer
from fastvar_trt.tools.train_scenes.vae_stages import train_bits, train_decoder
from fastvar_trt.tools.training import (
    Stage,
    check_absent,
    half,
    make_work_dir,
    new_checkpoint,
    open_device,
    training_record,
    write_card,
)

CHECKPOINT, VAE, TEXT_ENCODER = "infinity.safetensors", "vae.safetensors", "t5"


@click.command(
    cls=ErrorCommand,
    epilog=examples(
        "python -m fastvar_trt.tools.train_scenes --work-dir out/scenes --out out/scene_model",
        "python -m fastvar_trt.tools.train_scenes --work-dir out/scenes --out out/scene_model --device cuda",
    ),
)
@click.option(
    "--work-dir", type=click.Path(path_type=Path), required=True, help="Training state; continues from there."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint; must not exist.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--size", type=click.Choice(SIZES), default="small", show_default=True, help="Of the models.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="That render.")
def main(work_dir: Path, out: Path, device: str, size: str, processes: int) -> None:
    """Train the text-to-image demo model; Ctrl-C stops, the same command goes on."""
    check_absent(out)
    config, place = SIZES[size], open_device(device)
    make_work_dir(work_dir)
    with progress_bars() as progress:
        stages = train(config, work_dir, place, progress, processes)
    write_checkpoint(out, config, stages, device)
    click.echo(f"{out}: the trained checkpoint")


def train(config: SceneTraining, folder: Path, device: torch.device, progress: Progress, processes: int) -> Stages:
    """All stages, each from where its state in the folder says."""
    bits = train_bits(config.transformer.bits, folder, device, progress, processes)
    text = train_text(config.transformer, folder, device, progress)
    encoder = bits.model.encoder
    transformer = train_transformer(config.transformer, encoder, text.model, folder, device, progress)
    decoder = train_decoder(config.decoder, encoder, folder, device, progress, processes)
    return Stages(bits, text, transformer, decoder)


class Stages(NamedTuple):
    """In the order in which they are trained."""

    bits: Stage[BitAutoEncoder]
    text: Stage[TextReader]
    transformer: Stage[Transformer]
    decoder: Stage[Decoder]


def write_checkpoint(out: Path, config: SceneTraining, stages: Stages, device: str) -> None:
    """Transformer, VAE and text encoder in the official formats and fp16, and what is known of them: a new folder."""
    bits, text, transformer, decoder = stages
    state = half(transformer.extra)
    # Larger sizes have further scales, which were never trained: nearest is the last one that was.
    levels = state["lvl_embed.weight"]
    levels[len(SCHEDULE) :] = levels[len(SCHEDULE) - 1]
    vae_state = {
        f"{part}.{name}": value
        for part, module in (("encoder", bits.model.encoder), ("decoder", decoder.model))
        for name, value in half(module.state_dict()).items()
    }
    InfinitySource.from_state(state, vae_state, SCHEDULE, ROPE_SPAN)  # the exporter's own check of keys and shapes
    card = {
        "config": dataclasses.asdict(config),
        "device": device,
        "steps": {stage.name: stage.step for stage in stages},
        **training_record(stages, 100),
    }
    with new_checkpoint(out) as folder:
        save_file(state, folder / CHECKPOINT)
        save_file(vae_state, folder / VAE)
        write_text_encoder(folder / TEXT_ENCODER, text.model.text, captions_tokenizer(config.transformer.text))
        write_card(folder, card, card_text)


def card_text(card: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """The card for people, as Markdown.

    Args:
        card: the content of card.json.
        sizes: bytes by file name.
    """
    transformer, decoder = card["config"]["transformer"], card["config"]["decoder"]
    bits, text, losses = transformer["bits"], transformer["text"], card["final_losses"]

    def loss(stage: str) -> str:
        own = {name.removeprefix(f"{stage}."): value for name, value in losses.items() if name.startswith(f"{stage}.")}
        return ", ".join(f"{name} {value}" for name, value in own.items())

    lines = [
        "# The scene model",
        "",
        f"A text-to-image Infinity ({transformer['depth']} layers x {transformer['width']}), its VAE "
        f"({bits['code_bits']} bits; decoder {' '.join(map(str, decoder['level_channels']))}) and a T5 encoder "
        f"({text['depth']} layers x {text['width']}, whole words), in the formats of the official checkpoints, fp16, "
        "for 1024x1024 pixels in 13 scales.",
        "It draws one to three simple solids on a ground under a sky (`fastvar_trt.tools.scenes`) and knows nothing "
        "else: it is there to show and to measure what pruning does to pictures that mean something.",
        "",
        f"Made by `python -m fastvar_trt.tools.train_scenes` from {bits['num_pictures']} rendered scenes; some "
        "combinations of shape, colour and ground are never among them.",
        "",
        f"| | steps | seconds on {card['device']} | losses at the end |",
        "|---|---|---|---|",
        *(
            f"| {stage} | {steps} | {card['training_s'][stage]} | {loss(stage)} |"
            for stage, steps in card["steps"].items()
        ),
        "",
        "Seconds include whatever else the machine did meanwhile. Losses of the transformer are nats per bit, those of "
        f"the text encoder nats over {len(QUESTIONS)} questions about the scene. "
        + ", ".join(f"`{name}` {size / 1e6:.1f} MB" for name, size in sizes.items())
        + ". `card.json` has every setting.",
        "",
    ]
    return "\n".join(lines)
