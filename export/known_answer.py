"""What PyTorch draws of a model's example: inputs for the comparison of graphs, and a bundle's known answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastvar_trt.export.models.base import NextScaleModel
from fastvar_trt.export.models.reference import ChainState, default_request
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.manifest import GraphSpec, logits_name
from fastvar_trt.runtime.plan import ResolvedPlan

_REFERENCE_POSITIONS = 64  # of the logits that the reference keeps per step


class GreedyChain:
    """PyTorch's run of a chain on the model's example, graph by graph: what each graph gets, and what is drawn.

    Attributes:
        condition: inputs of the condition graph.
        plan: the pruning plan.
        state: what passes between steps; None before the condition graph.
        drawn: arrays of the reference file.
    """

    def __init__(
        self, model: NextScaleModel, plan: ResolvedPlan, batch: int, device: torch.device | None = None
    ) -> None:
        self.plan = plan
        self._model, self._batch = model, batch
        self._device = device or torch.device("cpu")
        self.condition = model.example_condition(batch)
        self.state: ChainState | None = None
        self.drawn = arrays(self.condition)
        self._greedy = default_request(model, batch, greedy=True, device=self._device)

    def advance(self, spec: GraphSpec) -> None:
        """Run what a graph computes."""
        model = self._model
        if spec.kind == names.CONDITION_GRAPH:
            self.state = ChainState.begin(model, self._there(self.condition), [0] * self._batch)
        elif spec.kind == names.STEP and spec.scale is not None:
            assert self.state is not None
            uniform = torch.zeros(self._batch, *model.token_spec(spec.scale)[0], device=self._device)
            outputs = self.state.step(model, self.plan, spec.scale, uniform, self._greedy)
            logits = outputs.logits[:, :_REFERENCE_POSITIONS]
            self.drawn |= arrays({spec.name: outputs.tokens, logits_name(spec.scale): logits})
        elif spec.kind == names.RESIDUAL:
            assert self.state is not None
            self.state.finish(model, self.plan, self._greedy)
        elif spec.kind == names.DECODER:
            assert self.state is not None and self.state.f_hat is not None
            image = model.decode(self.state.f_hat)[0]
            self.drawn |= arrays({names.F_HAT: self.state.f_hat, names.IMAGE: image})

    def _there(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """On the host, as numpy knows them."""
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def text_reference(model: NextScaleModel) -> dict[str, Any]:
    """What the reference file has of the text encoder."""
    inputs = model.example_text()
    return arrays({**inputs, **model.encode_text(inputs)})
