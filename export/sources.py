"""What is exported: official checkpoints with the sizes read from them."""

from __future__ import annotations

import abc
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvar_trt.export.models import infinity_checkpoint
from fastvar_trt.export.models.base import NextScaleModel
from fastvar_trt.export.models.checkpoint import check_checkpoints, deployment_tensors, load_state_dict
from fastvar_trt.export.models.config import VARConfig, VQVAEConfig
from fastvar_trt.export.models.infinity import Infinity
from fastvar_trt.export.models.infinity_config import BSQVAEConfig, InfinityConfig
from fastvar_trt.export.models.schedules import schedule
from fastvar_trt.export.models.t5 import T5Source
from fastvar_trt.export.models.var import VAR
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.manifest import TOKENIZER_FILE

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

    def copy_files(self, folder: Path) -> None:  # noqa: B027  # most have none
        """Copy what belongs into a bundle as it is."""

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


@dataclasses.dataclass(frozen=True)
class InfinitySource(Source):
    """An Infinity to export, at one size and aspect ratio."""

    config: InfinityConfig
    vae_config: BSQVAEConfig
    state: Mapping[str, Tensor]
    vae_state: Mapping[str, Tensor]
    text: T5Source | None = None

    @classmethod
    def from_files(
        cls,
        checkpoint: Path,
        vae: Path,
        size: str,
        h_div_w: float = 1.0,
        text_length: int | None = None,
        text_encoder: Path | None = None,
    ) -> InfinitySource:
        """The official files, memory-mapped and checked.

        Args:
            checkpoint: `infinity_2b_reg.pth`, the folder `infinity_8b_weights`, ...
            vae: `infinity_vae_d32reg.pth`, ...
            size: Infinity's `pn`, or `2K` or `4M`.
            h_div_w: height over width.
            text_length: longest prompt of the bundle in tokens; default: the model's.
            text_encoder: Hugging Face folder of the T5 that the model was trained with; without it, the bundle takes
                text features.

        Raises:
            CheckpointError: a file that is missing, damaged, or not of this model.
            ExportError: a size or aspect ratio that does not exist.
        """
        maps, span = schedule(size, h_div_w)
        state = load_state_dict(checkpoint, "infinity")
        source = cls.from_state(state, load_state_dict(vae, "infinity_vae"), maps, span, text_length)
        if text_encoder is None:
            return source
        text = T5Source.from_folder(text_encoder, source.config.text_length, source.config.text_width)
        return dataclasses.replace(source, text=text)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        vae_state: Mapping[str, Tensor],
        maps: tuple[tuple[int, int], ...],
        rope_span: tuple[int, int],
        text_length: int | None = None,
    ) -> InfinitySource:
        """State dicts in the official keys, checked; `maps` and `rope_span` as `schedules.schedule` gives them.

        Raises:
            CheckpointError: keys, shapes or sizes that do not belong together.
        """
        vae_config = BSQVAEConfig.from_state_dict(vae_state)
        config = InfinityConfig.from_state_dict(state, vae_config, maps, rope_span, text_length)
        infinity_checkpoint.check_checkpoints(config, vae_config, state, vae_state)
        return cls(config, vae_config, state, vae_state)

    def new_model(self, dtype: torch.dtype) -> Infinity:
        """The model, without weights."""
        return Infinity(self.config, self.vae_config, None if self.text is None else self.text.config, dtype)

    def tensors(self, dtype: torch.dtype, max_top_k: int) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time; bits need no bound of top-k."""
        del max_top_k
        yield from infinity_checkpoint.deployment_tensors(
            self.config, self.vae_config, self.state, self.vae_state, dtype
        )
        if self.text is not None:
            yield from self.text.tensors(dtype)

    def copy_files(self, folder: Path) -> None:
        """Copy the tokenizer."""
        if self.text is not None:
            shutil.copyfile(self.text.tokenizer, folder / TOKENIZER_FILE)

    def on_meta(self) -> InfinitySource:
        """The same without data."""
        text = None if self.text is None else dataclasses.replace(self.text, state=to_meta(self.text.state))
        return dataclasses.replace(self, state=to_meta(self.state), vae_state=to_meta(self.vae_state), text=text)
