"""A HART to export, from its official folders."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fastvar_trt.export.models.checkpoint import load_folder, read_config
from fastvar_trt.export.models.hart.checkpoint import check_checkpoints, deployment_tensors, load_transformer
from fastvar_trt.export.models.hart.config import HARTConfig
from fastvar_trt.export.models.hart.model import HART
from fastvar_trt.export.models.qwen2 import Qwen2Source
from fastvar_trt.export.models.source import Source, to_meta
from fastvar_trt.export.models.vqvae import VQVAEConfig
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.manifest import TOKENIZER_FILE
from fastvar_trt.runtime.precision import Precision

_VAE_PREFIX = "vae."


@dataclasses.dataclass(frozen=True)
class HARTSource(Source):
    """A HART to export."""

    config: HARTConfig
    vae_config: VQVAEConfig
    state: Mapping[str, Tensor]
    vae_state: Mapping[str, Tensor]
    text: Qwen2Source | None = None

    @classmethod
    def from_folders(
        cls,
        llm: Path,
        vae: Path | None = None,
        text_encoder: Path | None = None,
        system_prompt: str = "",
        text_padding: str = "right",
        more_smooth: bool = True,
    ) -> HARTSource:
        """The official folders, memory-mapped and checked.

        Args:
            llm: with `config.json` and `ema_model.bin`, whose weights make the published pictures; without the latter
                the safetensors files there are taken.
            vae: with `config.json` and the image tokenizer's weights; default: the folder `tokenizer` beside `llm`.
            text_encoder: Hugging Face folder of the Qwen2 that the model was trained with; without it, the bundle takes
                text features.
            system_prompt: what the text encoder sees before every prompt.
            more_smooth: as published: f_hat takes a blend of codes in place of the drawn ones.
            text_padding: `left` or `right`, the side of padding in text features; that of a text encoder is its own.

        Raises:
            CheckpointError: a file that is missing, damaged, or not of this model.
        """
        data = read_config(llm, "--checkpoint")
        state = load_transformer(llm)
        folder = llm.parent / "tokenizer" if vae is None else vae
        vae_data = read_config(folder, "--vae")
        with_disc = load_folder(folder)
        vae_state = {
            key.removeprefix(_VAE_PREFIX): value for key, value in with_disc.items() if key.startswith(_VAE_PREFIX)
        }
        if not vae_state:
            raise CheckpointError(f"--vae {folder}: no key begins with {_VAE_PREFIX}: no image tokenizer of HART")
        config = dataclasses.replace(HARTConfig.from_files(data, state), more_smooth=more_smooth)
        vae_config = VQVAEConfig.from_state_dict(vae_state, vae_data.get("quant_resi", 0.5))
        check_checkpoints(config, vae_config, state, vae_state)
        if text_encoder is None:
            return cls(dataclasses.replace(config, pads_left=text_padding == "left"), vae_config, state, vae_state)
        text = Qwen2Source.from_folder(text_encoder, config.context_tokens, config.text_width, system_prompt)
        config = dataclasses.replace(config, pads_left=text.config.pads_left)
        return cls(config, vae_config, state, vae_state, text)

    def new_model(self, precision: Precision) -> HART:
        """The model, without weights."""
        return HART(self.config, self.vae_config, None if self.text is None else self.text.config, precision)

    def tensors(self, precision: Precision, max_top_k: int) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time."""
        bound = min(max_top_k or self.config.vocab_size, self.config.vocab_size)
        yield from deployment_tensors(self.config, self.vae_config, self.state, self.vae_state, precision, bound)
        if self.text is not None:
            yield from self.text.tensors(precision)

    def copy_files(self, folder: Path) -> None:
        """Copy the tokenizer."""
        if self.text is not None:
            shutil.copyfile(self.text.tokenizer, folder / TOKENIZER_FILE)

    def on_meta(self) -> HARTSource:
        """The same without data."""
        text = None if self.text is None else dataclasses.replace(self.text, state=to_meta(self.text.state))
        return dataclasses.replace(self, state=to_meta(self.state), vae_state=to_meta(self.vae_state), text=text)
