"""Pruning and the rarer variants against what the public code of VAR and FastVAR computed (`tests/data`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import thorough
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.runtime import Pipeline, PruningPlan
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.tools.random_checkpoints import random_checkpoint

DATA = Path(__file__).parent / "data"
FASTVAR_PLAN = PruningPlan("fastvar", ((3, 0.4), (4, 0.5)), cache_scale=2, first_layer=1)


def load_case(name: str) -> tuple[VARSource, dict[str, Tensor]]:
    """The checkpoint of a case, and what was computed from it."""
    data = load_file(DATA / f"{name}.safetensors")

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}

    state, vae_state = part("var."), part("vae.")
    vocab_size, code_channels = vae_state["quantize.embedding.weight"].shape
    # The decoder is not part of the comparison, but of every bundle.
    _, any_vae = random_checkpoint(depth=1, width=64, vocab_size=vocab_size, code_channels=code_channels)
    vae_state |= {key: value for key, value in any_vae.items() if not key.startswith("quantize.")}
    overrides = {} if any("scale_mul" in key for key in state) else {"num_heads": 2}
    return VARSource.from_state(state, vae_state, overrides), data


@pytest.mark.parametrize(
    ("name", "plan"),
    [("var_fastvar", FASTVAR_PLAN), thorough("var_no_l2_norm", PruningPlan())],
)
def test_the_public_code_is_reproduced(
    name: str, plan: PruningPlan, export_once: Callable[..., tuple[Path, ExportReport]]
) -> None:
    source, expected = load_case(name)
    bundle, _ = export_once(name, source, ExportOptions(plan=plan, batches=(2,)))
    with Pipeline.load(bundle) as pipe:
        result = pipe.generate([1, 3], cfg=2.5, greedy=True, return_logits=True)
    assert result.logits is not None
    for k in range(5):
        np.testing.assert_allclose(result.logits[k], expected[f"logits_{k}"].numpy(), atol=2e-4, err_msg=f"scale {k}")
        np.testing.assert_array_equal(result.tokens[k], expected[f"tokens_{k}"].numpy())
    np.testing.assert_allclose(result.f_hat, expected["f_hat"].numpy(), atol=1e-4)


def test_pruning_matters_in_that_case() -> None:
    """The dense model gives other logits, so that the comparison above could not pass without pruning."""
    from fastvar_trt.export.models.base import Request
    from fastvar_trt.export.models.reference import generate
    from fastvar_trt.export.models.var.checkpoint import deployment_tensors
    from fastvar_trt.export.models.var.model import VAR

    source, expected = load_case("var_fastvar")
    fp32 = PRECISIONS["fp32"]
    tensors = deployment_tensors(
        source.config, source.vae_config, source.state, source.vae_state, fp32, source.config.vocab_size
    )
    model = VAR(source.config, source.vae_config, fp32).load_tensors(dict(tensors))
    ones = torch.ones(2)
    request = Request(2.5 * ones, ones, (48 * ones).long(), 2 * ones, ones.bool())
    for plan, is_equal in ((FASTVAR_PLAN, True), (PruningPlan(), False)):
        resolved = plan.resolve(source.config.schedule, source.config.depth)
        noise = {k: torch.zeros(2, resolved.num_tokens(k)) for k in resolved.steps}
        logits = generate(model, resolved, {"labels": torch.tensor([1, 3])}, noise, request).logits
        assert torch.allclose(logits[4], expected["logits_4"], atol=2e-4) == is_equal
