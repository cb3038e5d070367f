"""What is exported: official checkpoints with the sizes read from them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvar_trt.export.models.base import NextScaleModel
from fastvar_trt.export.models.checkpoint import check_checkpoints, deployment_tensors, load_state_dict
from fastvar_trt.export.models.config import VARConfig, VQVAEConfig
from fastvar_trt.export.models.var import VAR
from fastvar_trt.runtime.errors import CheckpointError

TensorShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Source(abc.ABC):
    """A model to export: its configurations and official state dicts."""

    @abc.abstractmethod
    def new_model(self, dtype: torch.dtype) -> NextScaleModel:
        """The model that computes in `dtype`, without weights."""

    @abc.abstractmethod
    def tensors(self, dtype: torch.dtype, max_top_k: int) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time.

        Args:
            dtype: of the large matrices.
            max_top_k: bound of top-k, 0 for the whole vocabulary; for models that draw from one.
        """

    @abc.abstractmethod
    def on_meta(self) -> Source:
        """The same without data: shapes and dtypes only."""

    def shapes(self, dtype: torch.dtype, max_top_k: int) -> TensorShapes:
        """Shape and dtype of every deployment tensor."""
        with torch.device("meta"):
            tensors = self.on_meta().tensors(dtype, max_top_k)
            return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}


def to_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without data."""
    return {key: value.to("meta") for key, value in state.items()}


@dataclasses.dataclass(frozen=True)
class VARSource(Source):
    """A VAR to export."""

    config: VARConfig
    vae_config: VQVAEConfig
    state: Mapping[str, Tensor]
    vae_state: Mapping[str, Tensor]

    @classmethod
    def from_files(cls, checkpoint: Path, vae: Path, overrides: Mapping[str, Any] | None = None) -> VARSource:
        """The official files, memory-mapped and checked.

        Raises:
            CheckpointError: a file that is missing, damaged, or not of this model.
        """
        return cls.from_state(load_state_dict(checkpoint, "var"), load_state_dict(vae, "vae"), overrides)

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], vae_state: Mapping[str, Tensor], overrides: Mapping[str, Any] | None = None
    ) -> VARSource:
        """State dicts in the official keys, checked.

        Args:
            state: the transformer's.
            vae_state: the VQVAE's.
            overrides: what state dicts do not tell: `num_heads`, `patch_nums`, `quant_resi`.

        Raises:
            CheckpointError: keys, shapes or sizes that do not belong together.
        """
        known = {"num_heads", "patch_nums", "quant_resi"}
        unknown = sorted(set(overrides or {}) - known)
        if unknown:
            raise CheckpointError(
                f"--config: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}, everything else is "
                "read from the state dict"
            )
        config = VARConfig.from_state_dict(state, overrides)
        vae_config = VQVAEConfig.from_state_dict(vae_state, (overrides or {}).get("quant_resi", 0.5))
        check_checkpoints(config, vae_config, state, vae_state)
        return cls(config, vae_config, state, vae_state)

    def new_model(self, dtype: torch.dtype) -> VAR:
        """The model, without weights."""
        return VAR(self.config, self.vae_config, dtype)

    def tensors(self, dtype: torch.dtype, max_top_k: int) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time."""
        bound = min(max_top_k or self.config.vocab_size, self.config.vocab_size)
        return deployment_tensors(self.config, self.vae_config, self.state, self.vae_state, dtype, bound)

    def on_meta(self) -> VARSource:
        """The same without data."""
        return dataclasses.replace(self, state=to_meta(self.state), vae_state=to_meta(self.vae_state))
