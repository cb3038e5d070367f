"""The command line of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from safetensors.torch import save_file

from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.tools.cli.command import ErrorCommand, examples, integers, progress_bars
from fastvar_trt.tools.train_demo.photographs import PHOTOGRAPHS, load_photographs
from fastvar_trt.tools.train_demo.training import (
    LEVEL_MULTIPLIERS,
    TrainingConfig,
    train_transformer,
    train_vqvae,
)
from fastvar_trt.tools.train_demo.transformer import Transformer
from fastvar_trt.tools.train_demo.vqvae import VQVAE
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

_DEFAULTS = TrainingConfig()


@click.command(
    cls=ErrorCommand,
    epilog=examples(
        "python -m fastvar_trt.tools.train_demo --work-dir out/train --out out/demo_model",
        "python -m fastvar_trt.tools.train_demo --work-dir out/512 --out out/512_model --device cuda \\\n"
        "    --patch-nums 1,2,3,4,6,9,13,18,24,32",
    ),
)
@click.option(
    "--work-dir", type=click.Path(path_type=Path), required=True, help="Training state; continues from there."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint; must not exist.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--seed", default=_DEFAULTS.seed, show_default=True)
@click.option("--patch-nums", type=integers(), default=",".join(map(str, _DEFAULTS.patch_nums)), show_default=True)
@click.option("--vae-steps", type=click.IntRange(1), default=_DEFAULTS.vae_steps, show_default=True)
@click.option("--var-steps", type=click.IntRange(1), default=_DEFAULTS.var_steps, show_default=True)
@click.option("--depth", type=click.IntRange(1), default=_DEFAULTS.depth, show_default=True)
@click.option("--width", type=click.IntRange(64), default=_DEFAULTS.width, show_default=True)
@click.option("--photographs", type=click.Path(path_type=Path), help="Their folder; default: inside scikit-image.")
def main(
    work_dir: Path,
    out: Path,
    device: str,
    seed: int,
    patch_nums: tuple[int, ...],
    vae_steps: int,
    var_steps: int,
    depth: int,
    width: int,
    photographs: Path | None,
) -> None:
    """Train the demo model; Ctrl-C stops, the same command goes on."""
    check_absent(out)
    config = TrainingConfig(
        seed=seed, patch_nums=patch_nums, vae_steps=vae_steps, var_steps=var_steps, depth=depth, width=width
    )
    images = load_photographs(photographs)
    place = open_device(device)
    make_work_dir(work_dir)
    with progress_bars() as progress:
        vqvae = train_vqvae(config, images, work_dir, place, progress)
        transformer = train_transformer(config, images, vqvae.model, work_dir, place, progress)
    write_checkpoint(out, config, vqvae, transformer, device)
    click.echo(f"{out}: the trained checkpoint")


def write_checkpoint(
    out: Path, config: TrainingConfig, vqvae: Stage[VQVAE], transformer: Stage[Transformer], device: str
) -> None:
    """The two official-format files in fp16, and what is known of them, into a new folder."""
    state, vae_state = half(transformer.model.state_dict()), half(vqvae.model.state_dict())
    VARSource.from_state(state, vae_state)  # the exporter's own check of keys and shapes
    card = {
        "classes": [dataclasses.asdict(p) for p in PHOTOGRAPHS],
        "config": dataclasses.asdict(config),
        "device": device,
        **training_record((vqvae, transformer), 50),
    }
    with new_checkpoint(out) as folder:
        save_file(state, folder / "var.safetensors")
        save_file(vae_state, folder / "vae.safetensors")
        write_card(folder, card, card_text)


def card_text(card: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """The card for people, as Markdown.

    Args:
        card: the content of card.json.
        sizes: bytes by file name.
    """
    config = card["config"]
    side = config["patch_nums"][-1] * 2 ** (len(LEVEL_MULTIPLIERS) - 1)
    classes = [f"| {i} | {c['name']} | `{c['file']}` | {c['licence']} |" for i, c in enumerate(card["classes"])]
    lines = [
        "# The demo model",
        "",
        f"A class-conditional VAR ({config['depth']} layers x {config['width']}) and its multi-scale VQVAE "
        f"({config['vae_channels']} channels, vocabulary {config['vocab_size']}) at {side}x{side} pixels, in the key "
        "names of the official checkpoints, fp16. It knows eight photographs by heart and nothing else: it is there to "
        "make what pruning does visible, not to be used.",
        "",
        "Made by `python -m fastvar_trt.tools.train_demo` from the photographs inside scikit-image's wheel, "
        f"{config['crops_per_class']} random crops of each for the transformer.",
        "",
        "| class | shows | file in `skimage/data` | rights |",
        "|---|---|---|---|",
        *classes,
        "",
        "| | steps x batch | seconds on " + card["device"] + " | loss at the end |",
        "|---|---|---|---|",
        f"| VQVAE | {config['vae_steps']} x {config['vae_batch']} | {card['training_s']['vqvae']} | reconstruction "
        f"{card['final_losses']['vqvae.reconstruction']}, quantization {card['final_losses']['vqvae.quantization']} |",
        f"| transformer | {config['var_steps']} x {config['var_batch']} | {card['training_s']['transformer']} | "
        f"cross-entropy {card['final_losses']['transformer.loss']}, of the last scale "
        f"{card['final_losses']['transformer.last_scale']} |",
        "",
        "Seconds include whatever else the machine did meanwhile. "
        + ", ".join(f"`{name}` {size / 1e6:.1f} MB" for name, size in sizes.items())
        + ". `card.json` has every setting; the seed is "
        + str(config["seed"])
        + ".",
        "",
    ]
    return "\n".join(lines)
