"""Training of the scene model, at sizes that take seconds."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from fastvar_trt.export.models.infinity.schedules import schedule
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.models.reference import default_request, generate
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.plan import DENSE
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.tools.random_checkpoints import random_infinity_checkpoint
from fastvar_trt.tools.train_scenes.autoencoder import resized
from fastvar_trt.tools.train_scenes.config import BitsConfig, TextConfig, TransformerConfig
from fastvar_trt.tools.train_scenes.transformer import Transformer, window


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
