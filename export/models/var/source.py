"""A VAR to export, from its official files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvar_trt.export.models.checkpoint import load_state_dict
from fastvar_trt.export.models.source import Source, to_meta
from fastvar_trt.export.models.var.checkpoint import NESTED, check_checkpoints, deployment_tensors
from fastvar_trt.export.models.var.config import VARConfig
from fastvar_trt.export.models.var.model import VAR
from fastvar_trt.export.models.vqvae import VQVAEConfig
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.precision import Precision

NESTED_VAE = ("trainer", "vae_local")  # where VAR's trainer keeps it in a training checkpoint


def check_overrides(overrides: Mapping[str, Any] | None) -> None:
    """That --config names what state dicts do not tell.

    Raises:
        CheckpointError: another key.
    """
    known = {"num_heads", "patch_nums", "quant_resi"}
    unknown = sorted(set(overrides or {}) - known)
    if unknown:
        raise CheckpointError(
            f"--config: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}, everything else is "
            "read from the state dict"
        )


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
        return cls.from_state(load_state_dict(checkpoint, NESTED), load_state_dict(vae, NESTED_VAE), overrides)

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
        check_overrides(overrides)
        config = VARConfig.from_state_dict(state, overrides)
        vae_config = VQVAEConfig.from_state_dict(vae_state, (overrides or {}).get("quant_resi", 0.5))
        check_checkpoints(config, vae_config, state, vae_state)
        return cls(config, vae_config, state, vae_state)

    def new_model(self, precision: Precision) -> VAR:
        """The model, without weights."""
        return VAR(self.config, self.vae_config, precision)

    def tensors(self, precision: Precision, max_top_k: int) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time."""
        return deployment_tensors(self.config, self.vae_config, self.state, self.vae_state, precision, max_top_k)

    def on_meta(self) -> VARSource:
        """The same without data."""
        return dataclasses.replace(self, state=to_meta(self.state), vae_state=to_meta(self.vae_state))
