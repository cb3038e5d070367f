"""Noise and sampling: the draw against an oracle of its own, and against the reference's distribution."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fastvar_trt.export.models.base import Request
from fastvar_trt.export.models.codebook import sample
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.noise import uniform_noise


def filtered_probabilities(logits: Any, top_k: int, top_p: float, temperature: float) -> Any:
    """What `sample_with_top_k_top_p_` of VAR draws from: fp64 [V].

    The k likeliest stay; of these, counted from the least likely, those go whose cumulative probability is at most
    1 - top_p.
    """
    logits = np.asarray(logits, dtype=np.float64) / temperature
    if top_k:
        logits = np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if 0 < top_p < 1:
        ascending = np.argsort(probabilities, kind="stable")
        removed = np.cumsum(probabilities[ascending]) <= 1 - top_p
        removed[-1] = False
        probabilities[ascending[removed]] = 0
    return probabilities / probabilities.sum()


def inverse_cdf(logits: Any, uniform: float, top_k: int, top_p: float, temperature: float) -> tuple[int, float]:
    """The token that one uniform number draws, likeliest first, and how far the number is from another choice."""
    probabilities = filtered_probabilities(logits, top_k, top_p, temperature)
    order = np.argsort(-np.asarray(logits), kind="stable")
    edges = np.cumsum(probabilities[order])
    index = int(np.searchsorted(edges, uniform, side="right"))
    return int(order[index]), float(np.abs(edges - uniform).min())


def draw(logits: Any, uniform: Any, *, top_k: int, top_p: float, temperature: float = 1.0, greedy: bool = False) -> Any:
    """`sample` on one image: [L, V], [L] -> [L]."""
    request = Request(
        cfg=torch.ones(1),
        temperature=torch.tensor([temperature]),
        top_k=torch.tensor([top_k or logits.shape[-1]]),
        top_p=torch.tensor([top_p]),
        greedy=torch.tensor([greedy]),
    )
    rank = torch.arange(logits.shape[-1])
    return sample(torch.from_numpy(logits)[None], torch.from_numpy(uniform)[None], request, rank)[0].numpy()


SETTINGS: list[Mapping[str, Any]] = [
    {"top_k": 0, "top_p": 2.0},
    {"top_k": 7, "top_p": 2.0},
    {"top_k": 0, "top_p": 0.6},
    {"top_k": 12, "top_p": 0.8, "temperature": 1.7},
    {"top_k": 1, "top_p": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_distribution_is_the_references(settings: Mapping[str, Any], rng: np.random.Generator) -> None:
    count = 40_000
    logits = (2 * rng.standard_normal(24)).astype(np.float32)
    uniform = np.concatenate([uniform_noise(seed, 3, 400) for seed in range(count // 400)])
    drawn = draw(np.broadcast_to(logits, (count, 24)).copy(), uniform, **settings)
    expected = filtered_probabilities(logits, **({"temperature": 1.0} | settings))
    frequencies = np.bincount(drawn, minlength=24)
    assert (frequencies[expected == 0] == 0).all()
    possible = expected > 0
    if possible.sum() > 1:
        assert stats.chisquare(frequencies[possible], expected[possible] * count).pvalue > 1e-4


@pytest.mark.parametrize("uniform", [0.0, np.float32(1 - 2**-24)])
def test_the_ends_of_the_uniform_range(uniform: float, rng: np.random.Generator) -> None:
    logits = rng.standard_normal((50, 33)).astype(np.float32)
    drawn = draw(logits, np.full(50, uniform, dtype=np.float32), top_k=10, top_p=2.0)
    order = np.argsort(-logits, axis=-1)
    np.testing.assert_array_equal(drawn, order[:, 0 if uniform == 0 else 9])


def test_greedy_takes_the_likeliest_and_ties_go_to_the_lower_index(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((20, 16)).astype(np.float32)
    logits[:, 11] = logits[:, 4] = 9.0
    drawn = draw(logits, np.full(20, 0.999, dtype=np.float32), top_k=0, top_p=2.0, greedy=True)
    np.testing.assert_array_equal(drawn, np.full(20, 4))


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[3], {"top_k": 96, "top_p": 0.9, "temperature": 0.3}])
def test_the_graph_draws_what_its_logits_say(tiny_bundle: Path, settings: Mapping[str, Any]) -> None:
    arguments = {"temperature": 1.0} | settings
    with Pipeline.load(tiny_bundle) as pipe:
        result = pipe.generate([2, 5], seeds=[11, 12], cfg=3.0, return_logits=True, **_for_users(arguments))
    assert result.logits is not None
    compared = 0
    for k, (tokens, logits) in enumerate(zip(result.tokens, result.logits, strict=True)):
        for image in range(2):
            noise = uniform_noise(11 + image, k, tokens.shape[1])
            for position, uniform in enumerate(noise):
                expected, margin = inverse_cdf(logits[image, position], float(uniform), **arguments)
                if margin > 1e-4:  # not on the edge between two tokens
                    assert tokens[image, position] == expected, (k, image, position)
                    compared += 1
    assert compared > 180  # of 2 x 99


def _for_users(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`generate` writes "all of them" as 1, the graph as anything above it."""
    return {**arguments, "top_p": min(arguments["top_p"], 1.0)}


def test_noise_is_what_it_always_was() -> None:
    # Images are reproducible only as long as these numbers never change.
    assert uniform_noise(0, 0, 4).tolist() == [
        0.011546730995178223,
        0.24154919385910034,
        0.11142581701278687,
        0.5644146203994751,
    ]
    assert uniform_noise(2**64 - 1, 9, 2).tolist() == [0.42358362674713135, 0.04786485433578491]


def test_noise_is_uniform_and_keyed() -> None:
    noise = uniform_noise(1, 2, 100_000)
    assert noise.dtype == np.float32
    assert noise.min() >= 0
    assert noise.max() < 1
    assert stats.kstest(noise, "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(uniform_noise(1, 2, 10), noise[:10])  # a draw does not depend on how many follow
    for other in (uniform_noise(2, 2, 1000), uniform_noise(1, 3, 1000), uniform_noise(2, 1, 1000)):
        assert abs(np.corrcoef(noise[:1000], other)[0, 1]) < 0.1
