"""The chain in eager PyTorch: what exported graphs are compared with, and what benchmarks measure against."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from fastvar_trt.export.models.var import VAR, Request, StepOutputs
from fastvar_trt.runtime.plan import ResolvedPlan


@dataclasses.dataclass
class ChainState:
    """What passes from step to step."""

    start: Tensor  # [B2, C]
    modulations: list[Tensor]  # per layer [B2, 6, C]
    head_modulation: Tensor  # [B2, 2, C]
    f_hat: Tensor | None  # fp32 [B, C_vae, h_K, w_K]
    past: list[tuple[Tensor, Tensor]]  # per layer [S, B2, H, D]
    caches: dict[int, tuple[Tensor, Tensor]]  # per layer [B2, T, C]

    @classmethod
    def begin(cls, model: VAR, labels: Tensor) -> ChainState:
        """The state before the first step, for class indices int64 [B]."""
        start, modulations, head_modulation = model.condition(labels)
        return cls(start, modulations, head_modulation, None, [], {})

    def step(self, model: VAR, plan: ResolvedPlan, scale: int, uniform: Tensor, request: Request) -> StepOutputs:
        """Run one step and advance the state."""
        first = scale == plan.steps[0]
        outputs = model.step(
            plan,
            scale,
            start=self.start if first else None,
            f_hat=self.f_hat,
            modulations=self.modulations,
            head_modulation=self.head_modulation,
            past=self.past,
            caches=self.caches,
            uniform=uniform,
            request=request,
        )
        self.f_hat = outputs.f_hat
        if outputs.new_kv:
            self.past = [
                new if first else (torch.cat([self.past[i][0], new[0]]), torch.cat([self.past[i][1], new[1]]))
                for i, new in enumerate(outputs.new_kv)
            ]
        self.caches.update(outputs.caches)
        return outputs


@dataclasses.dataclass(frozen=True)
class ReferenceResult:
    """One batch of images by eager PyTorch."""

    tokens: dict[int, Tensor]  # scale -> int32 [B, L]
    logits: dict[int, Tensor]  # scale -> fp32 [B, L, V]
    f_hat: Tensor  # fp32 [B, C_vae, h_K, w_K]
    step_ms: dict[int, float]  # scale -> ms


@torch.inference_mode()
def generate(
    model: VAR, plan: ResolvedPlan, labels: Tensor, noise: Mapping[int, Tensor], request: Request
) -> ReferenceResult:
    """One batch with KV cache and SDPA, without the decoder.

    Args:
        labels: int64 [B].
        noise: scale -> fp32 [B, L], U[0, 1).
    """
    state = ChainState.begin(model, labels)
    tokens, logits, step_ms = {}, {}, {}
    for scale in plan.steps:
        begin = time.perf_counter()
        outputs = state.step(model, plan, scale, noise[scale], request)
        step_ms[scale] = (time.perf_counter() - begin) * 1e3
        tokens[scale], logits[scale] = outputs.tokens, outputs.logits
    assert state.f_hat is not None
    return ReferenceResult(tokens, logits, state.f_hat, step_ms)
