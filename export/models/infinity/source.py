"""An Infinity to export, from its official files, at one size and aspect ratio."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fastvar_trt.export.models.checkpoint import load_state_dict
from fastvar_trt.export.models.infinity import checkpoint as checkpoints
from fastvar_trt.export.models.infinity.config import BSQVAEConfig, InfinityConfig
from fastvar_trt.export.models.infinity.model import Infinity
from fastvar_trt.export.models.infinity.schedules import schedule
from fastvar_trt.export.models.source import Source, to_meta
from fastvar_trt.export.models.t5 import T5Source
from fastvar_trt.runtime.manifest import TOKENIZER_FILE
from fastvar_trt.runtime.precision import Precision

_NESTED_VAE = ("vae",)  # official ones are


@dataclasses.dataclass(frozen=True)
class InfinitySource(Source):
    """An Infinity to export, at one size and aspect ratio."""

    config: InfinityConfig
    vae_config: BSQVAEConfig
    state: Mapping[str, Tensor]
    vae_state: Mapping[str, Tensor]
    text: T5Source | None = None
    examples: tuple[str, ...] = ()

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
        state = load_state_dict(checkpoint, checkpoints.NESTED)
        source = cls.from_state(state, load_state_dict(vae, _NESTED_VAE), maps, span, text_length)
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
        checkpoints.check_checkpoints(config, vae_config, state, vae_state)
        return cls(config, vae_config, state, vae_state)

    def with_encoder(self) -> InfinitySource:
        """The same with its image encoder, whose keys are checked."""
        source = super().with_encoder()
        checkpoints.check_checkpoints(source.config, source.vae_config, source.state, source.vae_state)
        return source

    def new_model(self, precision: Precision) -> Infinity:
        """The model, without weights."""
        return Infinity(self.config, self.vae_config, None if self.text is None else self.text.config, precision)

    def tensors(self, precision: Precision, max_top_k: int) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time; bits need no bound of top-k."""
        del max_top_k
        yield from checkpoints.deployment_tensors(self.config, self.vae_config, self.state, self.vae_state, precision)
        if self.text is not None:
            yield from self.text.tensors(precision)

    def copy_files(self, folder: Path) -> None:
        """Copy the tokenizer."""
        if self.text is not None:
            shutil.copyfile(self.text.tokenizer, folder / TOKENIZER_FILE)

    def on_meta(self) -> InfinitySource:
        """The same without data."""
        text = None if self.text is None else dataclasses.replace(self.text, state=to_meta(self.text.state))
        return dataclasses.replace(self, state=to_meta(self.state), vae_state=to_meta(self.vae_state), text=text)
