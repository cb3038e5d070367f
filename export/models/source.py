"""What is exported: a model's configurations and official state dicts."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from fastvar_trt.export.models.base import NextScaleModel
from fastvar_trt.export.models.lora import MergedState, merged
from fastvar_trt.export.models.matrix import dtype_name
from fastvar_trt.runtime.precision import Precision


class VAEConfig(Protocol):
    """Sizes of a VAE."""

    def with_encoder(self, state: Mapping[str, Tensor]) -> Any:
        """The same with the image encoder of the VAE's state dict; raises CheckpointError where it has none."""


class Source(abc.ABC):
    """A model to export: its configurations and official state dicts. A frozen dataclass."""

    vae_config: VAEConfig
    state: Mapping[str, Tensor]  # the transformer's
    vae_state: Mapping[str, Tensor]
    examples: tuple[str, ...] = ()  # of prompts

    def with_encoder(self) -> Self:
        """The same with its image encoder.

        Raises:
            CheckpointError: the VAE's state dict has none.
        """
        changes: Any = {"vae_config": self.vae_config.with_encoder(self.vae_state)}
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]  # each of them is a dataclass

    def with_lora(self, lora: Path, scale: float) -> Self:
        """The same with a LoRA merged into its transformer: see `lora.merged`."""
        changes: Any = {"state": merged(self.state, lora, scale)}
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]  # likewise

    @abc.abstractmethod
    def new_model(self, precision: Precision) -> NextScaleModel:
        """The model, without weights."""

    @abc.abstractmethod
    def tensors(self, precision: Precision, max_top_k: int) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time.

        Args:
            precision: of the bundle.
            max_top_k: bound of top-k, 0 for the whole vocabulary; for models that draw from one.
        """

    @abc.abstractmethod
    def on_meta(self) -> Source:
        """The same without data: shapes and dtypes only."""

    def copy_files(self, folder: Path) -> None:  # noqa: B027  # most have none
        """Copy what belongs into a bundle as it is."""

    def shapes(self, precision: Precision, max_top_k: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every deployment tensor."""
        with torch.device("meta"):
            return shapes_of(self.on_meta().tensors(precision, max_top_k))


def shapes_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor."""
    return {name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors}


def to_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without data; merging changes neither shapes nor dtypes."""
    if isinstance(state, MergedState):
        return to_meta(state.before)
    return {key: value.to("meta") for key, value in state.items()}
