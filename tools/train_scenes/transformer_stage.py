"""Stage 3: the transformer on the bits of the autoencoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from fastvar_trt.export.models.infinity.vae import LightEncoder
from fastvar_trt.export.progress import Progress
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.tools.files import replacing
from fastvar_trt.tools.scenes.renderer import silhouette
from fastvar_trt.tools.scenes.world import caption
from fastvar_trt.tools.train_scenes.autoencoder import quantize
from fastvar_trt.tools.train_scenes.config import (
    SCHEDULE,
    BitsConfig,
    TransformerConfig,
    fingerprint,
)
from fastvar_trt.tools.train_scenes.pictures import to_tensor
from fastvar_trt.tools.train_scenes.text import token_batch
from fastvar_trt.tools.train_scenes.text_stage import TextReader, captions_tokenizer
from fastvar_trt.tools.train_scenes.transformer import Tokens, Transformer, window
from fastvar_trt.tools.train_scenes.vae_stages import half_pool
from fastvar_trt.tools.training import Stage, autocast


@torch.no_grad()
def encoded(
    config: BitsConfig, encoder: LightEncoder, folder: Path, device: torch.device, progress: Progress
) -> Tensor:
    """Features of all pictures: fp16 [N, d, h_K, w_K], kept on disk."""
    pool = half_pool(config, folder)
    shape = (pool.count, config.code_bits, *SCHEDULE[-1])
    path = folder / f"features_{fingerprint(config, encoder)['learnt_sha256'][:16]}.npy"
    if path.exists():
        try:
            features = np.load(path)
            if features.shape != shape or features.dtype != np.float16:
                raise ValueError(f"{features.dtype} {features.shape}")
            return torch.from_numpy(features)
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); remove it, and it is computed again") from error
    features = np.empty(shape, np.float16)
    for index in range(pool.count):
        features[index] = encoder(to_tensor(pool.load(index)[None], device))[0].cpu().numpy()
        progress("transformer", "encoding", (index + 1) / pool.count)
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, features)
    return torch.from_numpy(features)


def train_transformer(
    config: TransformerConfig,
    encoder: LightEncoder,
    reader: TextReader,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> Stage[Transformer]:
    """Predict the bits of every scale from the scales before."""
    features = encoded(config.bits, encoder, folder, device, progress)
    pool = half_pool(config.bits, folder)
    scenes = [pool.scene(i) for i in range(pool.count)]
    solids = torch.from_numpy(np.stack([silhouette(scene, SCHEDULE[-1]) for scene in scenes]))
    shares = np.array([1.0 if scene.near is None else config.in_front for scene in scenes])
    shares /= shares.sum()
    tokenizer = captions_tokenizer(config.text)
    torch.manual_seed(config.seed + 1)
    model = Transformer(config.sizes).to(device)
    # It starts from the head that read the text.
    model.text_norm.load_state_dict(reader.text_norm.state_dict())
    model.text_proj_for_sos.load_state_dict(reader.text_proj_for_sos.state_dict())
    of_stage = fingerprint(config, features, reader)
    stage = Stage("transformer", model, config.lr, config.num_steps, of_stage, folder)
    if not stage.extra:
        stage.extra = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    for step in stage.steps(progress):
        average(stage, model, config.ema, step)
        view = config.view(step, stage.rng)
        rows = np.sort(stage.rng.choice(len(scenes), size=view.batch, p=shares))
        captions = [caption(scenes[i], stage.rng) for i in rows]
        text, counts, dropped = text_batch(config, tokenizer, reader, captions, stage.rng, device)
        flips = torch.from_numpy(stage.rng.random((view.batch, 1, 1, 1), np.float32) * config.flips).to(device)
        pyramid = quantize(features[rows].to(device).float(), SCHEDULE, flips, view.num_scales)
        place = (stage.rng.random(), stage.rng.random())
        tokens = window(SCHEDULE[: view.num_scales], view.num_whole, view.share, place)
        with autocast(device):
            logits = model(text, counts, dropped, pyramid.inputs, tokens)
        losses = scale_losses(
            [own.float() for own in logits], pyramid.bits, tokens, config.solids, solids[rows].to(device)
        )
        weights = torch.tensor([float(h) ** config.scale_weight for h, _ in SCHEDULE[: view.num_scales]])
        loss = (losses * (weights / weights.sum()).to(device)).sum()
        loss.backward()
        name = f"scales_{view.num_scales}"
        stage.record(**{name: loss, f"{name}_last": losses[-1], f"{name}_small": losses[:5].mean()})
    return stage


@torch.no_grad()
def average(stage: Stage[Transformer], model: Transformer, decay: float, step: int) -> None:
    """Move the averaged weights, which are those that are shipped, towards the trained ones: before every step."""
    share = 1 - min(decay, (step + 1) / (step + 10))
    for name, parameter in model.named_parameters():
        stage.extra[name].lerp_(parameter.detach().cpu(), share)


@torch.no_grad()
def text_batch(
    config: TransformerConfig,
    tokenizer: Tokenizer,
    reader: TextReader,
    captions: list[str],
    rng: np.random.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, T, C_text], counts [B], and which are dropped [B]."""
    ids, counts = token_batch(tokenizer, captions, config.text.text_length)
    ids = ids[:, : int(counts.max())].to(device)
    dropped = torch.from_numpy(rng.random(len(captions)) < config.drop_text)
    return reader.text(ids, counts.to(device)), counts.to(device), dropped.to(device)


def scale_losses(logits: list[Tensor], bits: list[Tensor], tokens: Tokens, more: float, solids: Tensor) -> Tensor:
    """Mean cross-entropy of a bit per scale, in nats: [K].

    Args:
        logits: [B, L, d] per scale.
        bits: the right ones, bool [B, d, h, w] per scale.
        tokens: which were computed.
        more: weight of tokens that show a solid or its edge, besides the 1 of all: most others show texture, which
            nothing foretells.
        solids: where they are, bool [B, h_K, w_K].
    """
    losses = []
    for scale, (own, right) in enumerate(zip(logits, bits, strict=True)):
        target = tokens.of(scale, right.flatten(2).transpose(1, 2)).float()
        shown = F.adaptive_max_pool2d(solids[:, None].float(), right.shape[-2:])
        shown = F.max_pool2d(shown, 3, stride=1, padding=1)
        weights = 1 + more * tokens.of(scale, shown.flatten(2).transpose(1, 2))
        error = F.binary_cross_entropy_with_logits(own, target, reduction="none").mean(-1, keepdim=True)
        losses.append((weights * error).sum() / weights.sum())
    return torch.stack(losses)
