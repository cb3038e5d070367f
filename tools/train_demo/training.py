"""The two stages of training, each resumable: first the VQVAE, then the transformer on its tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastvar_trt.export.models.var.config import VARConfig, VQVAEConfig
from fastvar_trt.tools.train_demo.photographs import ALIKE, PHOTOGRAPHS, random_crops
from fastvar_trt.tools.train_demo.transformer import Transformer, teacher_maps
from fastvar_trt.tools.train_demo.vqvae import VQVAE
from fastvar_trt.tools.training import Stage, autocast, differences

LEVEL_MULTIPLIERS = (1, 1, 2, 2, 4)  # `ch_mult` of the official VQVAE
_TRANSFORMER_FIELDS = {
    "depth",
    "width",
    "var_steps",
    "var_batch",
    "var_lr",
    "crops_per_class",
    "mix_tokens",
    "drop_class",
}
_REVIVE_EVERY = 25  # steps between two replacements of codes that nothing chose


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Everything that the result depends on; a state of another configuration is not resumed."""

    seed: int = 0
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    # VQVAE
    vae_channels: int = 32
    vae_blocks: int = 1  # `num_res_blocks`
    code_channels: int = 32
    vocab_size: int = 1024
    vae_steps: int = 1600
    vae_batch: int = 4
    vae_lr: float = 8e-4
    # transformer
    depth: int = 8
    width: int = 256
    var_steps: int = 450
    var_batch: int = 8
    var_lr: float = 1e-3
    crops_per_class: int = 8  # whose tokens the transformer learns: few, so that it knows them well in minutes
    mix_tokens: float = 0.2  # share of the inputs that come from another crop of the class: drawn tokens err, too
    drop_class: float = 0.1  # share of samples without a class, for guidance

    def of_stage(self, stage: str) -> dict[str, Any]:
        """What the result of a stage depends on: the VQVAE's not on the transformer, but the other way round."""
        return {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if stage == "transformer" or key not in _TRANSFORMER_FIELDS
        }

    @property
    def image_side(self) -> int:
        """Pixels."""
        return int(self.patch_nums[-1] * 2 ** (len(LEVEL_MULTIPLIERS) - 1))

    @property
    def vqvae(self) -> VQVAEConfig:
        """Sizes of the VQVAE."""
        return VQVAEConfig(
            vocab_size=self.vocab_size,
            code_channels=self.code_channels,
            level_channels=tuple(self.vae_channels * m for m in LEVEL_MULTIPLIERS),
            num_blocks=self.vae_blocks + 1,
            phi="partially_shared",
            num_phi=4,
        )

    @property
    def transformer(self) -> VARConfig:
        """Sizes of the transformer."""
        return VARConfig(
            depth=self.depth,
            width=self.width,
            num_heads=self.width // 64,
            mlp_width=4 * self.width,
            num_classes=len(PHOTOGRAPHS),
            vocab_size=self.vocab_size,
            code_channels=self.code_channels,
            patch_nums=self.patch_nums,
            shared_aln=True,
            attn_l2_norm=True,
        )


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Errors of the pixels and of their differences; the latter keep edges, as a perceptual loss would."""
    pairs = zip(differences(decoded), differences(images), strict=True)
    edges = torch.stack([F.l1_loss(ours, theirs) for ours, theirs in pairs]).sum()
    return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + edges


def train_vqvae(
    config: TrainingConfig,
    photographs: list[Image.Image],
    folder: Path,
    device: torch.device,
    progress: Callable[[str, str, float], None],
) -> Stage[VQVAE]:
    """Stage 1: reconstruct random crops through the quantizer."""
    torch.manual_seed(config.seed)
    model = VQVAE(config.vqvae, config.patch_nums).to(device)
    nn.init.normal_(model.quantize.embedding.weight, std=0.05)
    stage = Stage("vqvae", model, config.vae_lr, config.vae_steps, config.of_stage("vqvae"), folder)
    hits = stage.extra.setdefault("hits", torch.zeros(config.vocab_size))
    for step in stage.steps(progress):
        labels = stage.rng.integers(len(photographs), size=config.vae_batch)
        images = torch.from_numpy(random_crops(photographs, labels, config.image_side, stage.rng)).to(device)
        with autocast(device):
            features = model.encode(images)
        f_hat, quantization, tokens, residuals = model.quantize(features)
        with autocast(device):
            decoded = model.decode(f_hat)
        reconstruction = reconstruction_loss(decoded, images)
        (reconstruction + quantization).backward()
        stage.record(reconstruction=reconstruction, quantization=quantization)
        hits += torch.cat([t.flatten() for t in tokens]).bincount(minlength=config.vocab_size).cpu()
        if step % _REVIVE_EVERY == _REVIVE_EVERY - 1:
            if step < 0.7 * config.vae_steps:
                _revive(model, hits, residuals, stage.rng)
            hits.zero_()
    return stage


@torch.no_grad()
def _revive(model: VQVAE, hits: Tensor, residuals: list[Tensor], rng: np.random.Generator) -> None:
    """Give codes that nothing chose a vector that wants one; the scales contribute alike, so that none starves."""
    dead = (hits == 0).nonzero().flatten()
    if len(dead) == 0:
        return
    per_scale = [rows[torch.from_numpy(rng.integers(len(rows), size=len(dead)))] for rows in residuals]
    choice = torch.from_numpy(rng.integers(len(per_scale), size=len(dead)))
    rows = torch.stack(per_scale)[choice, torch.arange(len(dead))]
    model.quantize.embedding.weight[dead] = rows.to(model.quantize.embedding.weight.dtype)


@torch.no_grad()
def tokenize(
    config: TrainingConfig, photographs: list[Image.Image], vqvae: VQVAE, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Fixed crops of every class, as tokens.

    Returns:
        labels int64 [N], tokens per scale int64 [N, L].
    """
    rng = np.random.default_rng([config.seed, 99])
    all_labels = np.repeat(np.arange(len(photographs)), config.crops_per_class)
    tokens: list[list[Tensor]] = []
    vqvae.eval()
    for start in range(0, len(all_labels), 16):
        crops = random_crops(photographs, all_labels[start : start + 16], config.image_side, rng, ALIKE)
        tokens.append(vqvae.quantize(vqvae.encode(torch.from_numpy(crops).to(device)))[2])
    per_scale = [torch.cat(parts) for parts in zip(*tokens, strict=True)]
    return torch.from_numpy(all_labels).to(device), per_scale


def train_transformer(
    config: TrainingConfig,
    photographs: list[Image.Image],
    vqvae: VQVAE,
    folder: Path,
    device: torch.device,
    progress: Callable[[str, str, float], None],
) -> Stage[Transformer]:
    """Stage 2: predict the tokens of every scale from the scales before."""
    labels, tokens = tokenize(config, photographs, vqvae, device)
    targets = torch.cat(tokens, dim=1)  # [N, L]
    torch.manual_seed(config.seed + 1)
    model = Transformer(config.transformer).to(device)
    # Bound to the tokens that it learns, so to the VQVAE and the photographs behind them.
    learnt = hashlib.sha256(targets.cpu().numpy().tobytes()).hexdigest()
    of_stage = {**config.of_stage("transformer"), "tokens_sha256": learnt}
    stage = Stage("transformer", model, config.var_lr, config.var_steps, of_stage, folder)
    last = config.patch_nums[-1] ** 2
    for _ in stage.steps(progress):
        chosen = stage.rng.integers(len(labels), size=config.var_batch)
        others = chosen // config.crops_per_class * config.crops_per_class  # of the same class
        others += stage.rng.integers(config.crops_per_class, size=config.var_batch)
        rows, mates = (torch.from_numpy(index).to(device) for index in (chosen, others))
        mixed = [
            torch.where(torch.from_numpy(stage.rng.random(scale[rows].shape) < config.mix_tokens).to(device), mate, own)
            for scale in tokens
            for own, mate in [(scale[rows], scale[mates])]
        ]
        dropped = torch.from_numpy(stage.rng.random(config.var_batch) < config.drop_class).to(device)
        condition = torch.where(dropped, config.transformer.num_classes, labels[rows])
        with autocast(device):
            logits = model(condition, teacher_maps(vqvae.quantize, mixed))
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets[rows].flatten(), reduction="none")
        loss = losses.mean()
        loss.backward()
        stage.record(loss=loss, last_scale=losses.view(config.var_batch, -1)[:, -last:].mean())
    return stage
