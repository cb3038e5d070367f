"""Stages 1 and 4: the bits of pictures, and the decoder that draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.decoder import Decoder, ResnetBlock, UpLevel, Upsample2x
from fastvar_trt.export.models.infinity.vae import LightEncoder
from fastvar_trt.export.progress import Progress
from fastvar_trt.tools.train_scenes.autoencoder import BitAutoEncoder, quantize
from fastvar_trt.tools.train_scenes.config import PATCH, SCHEDULE, SIDE, BitsConfig, DecoderConfig, fingerprint, part_at
from fastvar_trt.tools.train_scenes.pictures import PicturePool, to_tensor
from fastvar_trt.tools.training import Stage, autocast, differences

_SOLIDS = 3.0  # weight of their pixels, besides the 1 of all
_COMMITMENT = 0.03
_ENTROPY = 0.01


def half_pool(config: BitsConfig, folder: Path) -> PicturePool:
    """The pictures that bits and transformer learn: of half the size, as they are encoded."""
    return PicturePool(folder / "half", 1017 + config.seed, config.num_pictures, SIDE // 2, 1)


def full_pool(config: DecoderConfig, folder: Path) -> PicturePool:
    """The pictures that the decoder learns."""
    return PicturePool(folder / "large", 17 + config.seed, config.num_pictures, SIDE, 2)


def reconstruction_loss(decoded: Tensor, pictures: Tensor, solids: Tensor) -> Tensor:
    """Errors of pixels and of their differences, those of solids (bool [B, h, w]) weighted more."""
    weights = 1 + _SOLIDS * F.interpolate(solids[:, None].float(), size=pictures.shape[-2:])
    error = decoded - pictures
    parts = zip(differences(error), (weights[..., 1:, :], weights[..., 1:]), strict=True)
    edges = torch.stack([(difference.abs() * part).mean() for difference, part in parts]).sum()
    return (weights * (error.square() + 0.3 * error.abs())).mean() + edges


def straight_through(features: Tensor, skipped: int) -> tuple[Tensor, Tensor]:
    """Quantized features with the gradient of the features, and the loss of the quantization.

    Args:
        features: fp32 [B, d, h_K, w_K].
        skipped: how many of the last scales are left out.
    """
    f_hat = quantize(features.detach(), SCHEDULE, num_scales=len(SCHEDULE) - skipped).f_hat
    value = features.shape[1] ** -0.5
    # Features that a pyramid of signs reaches, and bits that differ from picture to picture.
    commitment = (features - f_hat).square().mean() / value**2
    probability = torch.sigmoid(features * (2 / value))
    entropy = _entropy(probability).mean() - _entropy(probability.mean((0, 2, 3))).mean()
    quantization = _COMMITMENT * (0.1 if skipped else 1.0) * commitment + _ENTROPY * entropy
    return features + (f_hat - features).detach(), quantization


def _entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-5, 1 - 1e-5)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def _num_skipped(rng: np.random.Generator, share: float) -> int:
    return int(rng.integers(1, 3)) if rng.random() < share else 0


def train_bits(
    config: BitsConfig, folder: Path, device: torch.device, progress: Progress, processes: int
) -> Stage[BitAutoEncoder]:
    """Reconstruct pictures through the pyramid of bits, with the light decoder."""
    pool = half_pool(config, folder)
    pool.render(lambda share: progress("bits", "rendering", share), processes)
    torch.manual_seed(config.seed)
    model = BitAutoEncoder(config.code_bits, config.channels).to(device)
    stage = Stage("bits", model, config.lr, config.steps, fingerprint(config), folder)
    for _ in stage.steps(progress):
        pixels, masks = pool.draw(stage.rng, config.batch)
        pictures, solids = to_tensor(pixels, device), torch.from_numpy(masks).to(device)
        with autocast(device):
            features = model.encoder(pictures)
        f_hat, quantization = straight_through(features.float(), _num_skipped(stage.rng, config.truncate))
        with autocast(device):
            decoded = model.decoder(f_hat)
        reconstruction = reconstruction_loss(decoded.float(), pictures, solids)
        (reconstruction + quantization).backward()
        stage.record(reconstruction=reconstruction, quantization=quantization)
    return stage


def train_decoder(
    config: DecoderConfig, encoder: LightEncoder, folder: Path, device: torch.device, progress: Progress, processes: int
) -> Stage[Decoder]:
    """Draw pictures from their bits, with Infinity's decoder."""
    half, full = half_pool(config.bits, folder), full_pool(config, folder)
    if any(needs_full(finest, side) for _, _, finest, side in config.phases):
        full.render(lambda share: progress("decoder", "rendering", share), processes)
    torch.manual_seed(config.seed)
    sizes = config.sizes
    model = Decoder(sizes.code_bits, sizes.level_channels, sizes.num_blocks, attention=False).to(device)
    begin_as_identity(model, config.phases[0][2])
    pair_channels(model, config.phases[0][2])
    num_steps = sum(steps for steps, *_ in config.phases)
    stage = Stage("decoder", model, config.lr, num_steps, fingerprint(config, encoder), folder)
    for step in stage.steps(progress):
        _, batch, finest, side = part_at(step, config.phases)
        pixels, masks = (full if needs_full(finest, side) else half).draw(stage.rng, batch)
        pictures, solids = to_tensor(pixels, device), torch.from_numpy(masks).to(device)
        scales = tuple(size for size in SCHEDULE if size[0] <= side // PATCH)
        skipped = _num_skipped(stage.rng, config.bits.truncate)
        with torch.no_grad():
            features = encoder(shrunk(pictures, side // 2))
            f_hat = quantize(features, scales, num_scales=len(scales) - skipped).f_hat
        pictures = shrunk(pictures, side // 2**finest)
        with autocast(device):
            decoded = partly_decoded(model, f_hat, finest)
        loss = reconstruction_loss(decoded.float(), pictures, solids)
        loss.backward()
        stage.record(**{f"level_{finest}": loss})
    return stage


def needs_full(finest: int, side: int) -> bool:
    """Whether drawing pictures of that side (pixels) down to that level takes those of full size."""
    return side // 2**finest > SIDE // 2


def shrunk(pictures: Tensor, side: int) -> Tensor:
    """[B, 3, S, S] -> [B, 3, side, side], a divisor of S."""
    return F.avg_pool2d(pictures, pictures.shape[-1] // side)


def partly_decoded(model: Decoder, f_hat: Tensor, finest: int) -> Tensor:
    """Pictures by the levels from `finest` on: [B, 3, S, S] with S = 16 h / 2**finest; 0 are all levels."""
    h = model.mid(model.conv_in(f_hat))
    for level in reversed(range(finest, len(model.up))):
        part = model.up[level]
        assert isinstance(part, UpLevel)
        for block in part.block:
            h = block(h)
        if level > finest:
            h = part.upsample(h)
    return model.conv_out(F.silu(model.norm_out(h)))


@torch.no_grad()
def begin_as_identity(model: Decoder, finest: int) -> None:
    """Let the levels before `finest` double the picture and no more, so that they can join one that has learnt."""
    for level in range(finest + 1):
        part = model.up[level]
        assert isinstance(part, UpLevel)
        if level < finest:
            for block in part.block:
                assert isinstance(block, ResnetBlock)
                for parameter in block.conv2.parameters():
                    parameter.zero_()
        if isinstance(part.upsample, Upsample2x):
            for parameter in part.upsample.conv.parameters():
                parameter.zero_()
            nn.init.dirac_(part.upsample.conv.weight)


@torch.no_grad()
def pair_channels(model: Decoder, finest: int) -> None:
    """Let neighbouring channels of the last map be each other's negative.

    They share a group of the last normalisation, which takes the group's mean over the picture away: with it, what
    colour the picture has. Of a pair the mean is 0.
    """
    part = model.up[finest]
    assert isinstance(part, UpLevel)
    for block in part.block:
        assert isinstance(block, ResnetBlock)
        for conv in (block.nin_shortcut, block.conv2):
            for parameter in conv.parameters():
                parameter[1::2] = -parameter[0::2]
