"""The chain in eager PyTorch: what exported graphs are compared with, and what benchmarks measure against."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastvar_trt.export.models.base import NextScaleModel, Request, StepOutputs
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.manifest import Role
from fastvar_trt.runtime.noise import gumbel_noise, normal_noise
from fastvar_trt.runtime.plan import ResolvedPlan
from fastvar_trt.runtime.request import GRAPH_INPUTS, TABLE


def default_request(
    model: NextScaleModel, batch: int, *, greedy: bool, cfg: float | None = None, device: torch.device | None = None
) -> Request:
    """The model's own sampling for a batch.

    Args:
        model: whose defaults are taken.
        batch: images.
        greedy: take the likeliest token.
        cfg: guidance scale, in place of the model's.
        device: of the tensors; default: the CPU.
    """
    defaults = model.sampling_spec()
    values = {name: getattr(defaults, name, TABLE[name].default) for name in GRAPH_INPUTS}
    values |= {"greedy": greedy} | ({} if cfg is None else {"cfg": cfg})
    return Request(**{name: torch.full((batch,), value, device=device) for name, value in values.items()})


@dataclasses.dataclass
class ChainState:
    """What passes from step to step."""

    condition: dict[str, Tensor]  # the outputs of the condition graph
    f_hat: Tensor | None  # fp32 [B, C_vae, h_K, w_K]
    past: dict[int, list[tuple[Tensor, Tensor]]]  # per layer the pieces [S, B2, H, D]
    caches: dict[int, tuple[Tensor, ...]]  # per layer and sublayer [B2, T, C]
    handed_on: dict[str, Tensor]  # for later graphs, besides f_hat
    seeds: Sequence[int]  # one per image, of noise that is not uniform

    @classmethod
    def begin(cls, model: NextScaleModel, inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> ChainState:
        """The state before the first step, for inputs of the condition graph."""
        return cls(model.condition(inputs), None, {}, {}, {}, seeds)

    def step(
        self, model: NextScaleModel, plan: ResolvedPlan, scale: int, uniform: Tensor, request: Request
    ) -> StepOutputs:
        """Run one step and advance the state."""
        rows = plan.rows(scale, len(uniform))
        outputs = model.step(
            plan,
            scale,
            condition={name: tensor[:rows] for name, tensor in {**self.condition, **self.handed_on}.items()},
            f_hat=self.f_hat,
            past=self.past,
            caches={layer: tuple(y[:rows] for y in own) for layer, own in self.caches.items()},
            uniform=uniform,
            request=request,
            gumbel=gumbel_of(model, scale, self.seeds, uniform.device),
        )
        self.f_hat = outputs.f_hat
        self.past.update({i: _extended(self.past.get(i, []), new) for i, new in outputs.new_kv.items()})
        self.caches.update(outputs.caches)
        self.handed_on.update(outputs.handed_on)
        return outputs

    def finish(self, model: NextScaleModel, plan: ResolvedPlan, request: Request) -> None:
        """Run what comes after the last step, of models that have it; of the request it takes guidance."""
        if model.residual_specs(plan, len(self.seeds)) is not None:
            assert self.f_hat is not None
            inputs = residual_inputs(model, plan, request, self.seeds)
            self.f_hat = model.residual({**self.handed_on, **inputs, names.F_HAT: self.f_hat})


def _extended(pieces: list[tuple[Tensor, Tensor]], new: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pieces of keys and values with new ones added: to the last piece, or as one of its own where rows are fewer."""
    if not pieces or pieces[-1][0].shape[1] != new[0].shape[1]:
        return [*pieces, new]
    (k, v), (new_k, new_v) = pieces[-1], new
    return [*pieces[:-1], (torch.cat([k, new_k]), torch.cat([v, new_v]))]


def gumbel_of(model: NextScaleModel, scale: int, seeds: Sequence[int], device: torch.device) -> Tensor | None:
    """The noise `GUMBEL` of a step for these images, where it takes any."""
    shape = model.gumbel_shape(scale)
    if shape is None:
        return None
    return torch.from_numpy(np.stack([gumbel_noise(seed, scale, shape) for seed in seeds])).to(device)


def residual_inputs(
    model: NextScaleModel, plan: ResolvedPlan, request: Request, seeds: Sequence[int]
) -> dict[str, Tensor]:
    """Guidance and noise of the graph after the last step for these images."""
    inputs = {}
    for spec in model.residual_specs(plan, len(seeds)) or ():
        if spec.role is Role.REQUEST:
            inputs[spec.name] = getattr(request, spec.name)
        elif spec.role is Role.NORMAL and spec.scale is not None:
            noise = np.stack([normal_noise(seed, spec.scale, spec.shape[1:]) for seed in seeds])
            inputs[spec.name] = torch.from_numpy(noise).to(request.cfg.device)
    return inputs


@dataclasses.dataclass(frozen=True)
class ReferenceResult:
    """One batch of images by eager PyTorch."""

    tokens: dict[int, Tensor]  # scale -> int32 [B, L] or uint8 [B, L, bits]
    logits: dict[int, Tensor]  # scale -> fp32 [B, L, V] or [B, L, bits, 2]
    f_hat: Tensor  # fp32 [B, C_vae, h_K, w_K]
    step_ms: dict[int, float]  # scale -> ms


@torch.inference_mode()
def generate(
    model: NextScaleModel,
    plan: ResolvedPlan,
    inputs: Mapping[str, Tensor],
    noise: Mapping[int, Tensor],
    request: Request,
    seeds: Sequence[int] | None = None,
) -> ReferenceResult:
    """One batch with KV cache and SDPA, without the decoder.

    Args:
        model: the model.
        plan: its pruning plan.
        inputs: of the condition graph.
        noise: scale -> fp32, `UNIFORM` of each step.
        request: guidance and sampling.
        seeds: one per image, of noise that is not uniform; default: 0.
    """
    state = ChainState.begin(model, inputs, seeds or [0] * len(request.cfg))
    tokens, logits, step_ms = {}, {}, {}
    for scale in plan.steps:
        begin = time.perf_counter()
        outputs = state.step(model, plan, scale, noise[scale], request)
        step_ms[scale] = (time.perf_counter() - begin) * 1e3
        tokens[scale], logits[scale] = outputs.tokens, outputs.logits
    assert state.f_hat is not None
    state.finish(model, plan, request)
    return ReferenceResult(tokens, logits, state.f_hat, step_ms)
