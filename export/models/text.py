"""What models of text share: their condition's inputs, and a text encoder that may come with them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fastvar_trt.export.models.base import NextScaleModel
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.manifest import Role, TensorSpec
from fastvar_trt.runtime.precision import Precision

TEXT_PREFIX = "text_encoder."  # of the encoder's deployment tensors


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(abc.ABC):
    """Sizes of a text encoder, and what it computes."""

    vocab_size: int

    @abc.abstractmethod
    def encode(self, weights: Mapping[str, Tensor], ids: Tensor, length: Tensor, precision: Precision) -> Tensor:
        """The features of one prompt.

        Args:
            weights: deployment tensors, without `TEXT_PREFIX`.
            ids: int64 [1, T], the prompt's tokens first.
            length: int64 [1], how many are tokens.
            precision: of the bundle.

        Returns:
            fp32 [1, T, C_text].
        """


class TextModel(NextScaleModel):
    """A model of text: its part of `NextScaleModel` that follows from `model_spec` and `text_config`."""

    text_config: TextEncoderConfig | None  # None where bundles take features only

    def text_specs(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] | None:
        """Inputs and outputs of the text encoder, where there is one."""
        if self.text_config is None:
            return None
        spec = self.model_spec()
        return (
            (TensorSpec(names.TOKEN_IDS, (1, spec.text_length), "int64"), TensorSpec(names.TOKEN_COUNT, (1,), "int64")),
            (TensorSpec(names.ENCODED, (1, spec.text_length, spec.text_width), "float32"),),
        )

    def example_text(self) -> dict[str, Tensor]:
        """Some tokens and padding."""
        assert self.text_config is not None
        length = self.model_spec().text_length
        ids = torch.arange(length)[None] * 31 % self.text_config.vocab_size
        return {names.TOKEN_IDS: ids, names.TOKEN_COUNT: torch.tensor([max(length // 2, 1)])}

    def text_vocabulary(self) -> int:
        """Tokens that the text encoder knows."""
        assert self.text_config is not None
        return self.text_config.vocab_size

    def encode_text(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tokens to features."""
        assert self.text_config is not None
        weights = {
            name.removeprefix(TEXT_PREFIX): parameter
            for name, parameter in self.named_parameters()
            if name.startswith(TEXT_PREFIX)
        }
        ids, count = inputs[names.TOKEN_IDS], inputs[names.TOKEN_COUNT]
        return {names.ENCODED: self.text_config.encode(weights, ids, count, self.precision)}

    def condition_inputs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Features of the text encoder, how many of them are tokens, and whether negative ones are given."""
        spec, rows = self.model_spec(), 2 * batch
        return (
            TensorSpec(names.TEXT_FEATURES, (rows, spec.text_length, spec.text_width), "float32", Role.CONDITION),
            TensorSpec(names.TEXT_LENGTHS, (rows,), "int64", Role.CONDITION),
            TensorSpec(names.NEGATIVE, (batch,), "bool", Role.CONDITION),
        )
