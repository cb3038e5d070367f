"""Prompts to features: the tokenizer and the text encoder of a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.auxiliary import AuxiliaryGraph
from fastvar_trt.runtime.backends import Backend
from fastvar_trt.runtime.errors import BundleError, RequestError, UnavailableError
from fastvar_trt.runtime.manifest import Manifest, read_manifest

_UNKNOWN = "<unk>", "[UNK]"  # as tokenizers of words and of pieces call what they do not know
_SHOWN, _SHOWN_WORDS = 30, 8  # characters of a word that is not known, and how many of these


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """A prompt for the text encoder.

    Attributes:
        ids: the end mark included, where the model has one.
        warning: what of the prompt was left out or is not known; empty where nothing is.
    """

    ids: list[int]
    warning: str = ""


class PromptTokenizer:
    """The tokenizer of a bundle; its file is read at the first prompt, since features can be had without prompts."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._bundle, self._manifest = bundle, manifest
        self._tokenizer: Any = None

    def load(self) -> None:
        """Read the file, unless that has been done.

        Raises:
            UnavailableError: the package tokenizers is not installed.
            BundleError: the file is damaged, or belongs to another bundle.
        """
        if self._tokenizer is None:
            check_unreplaced(self._bundle, self._manifest)
            self._tokenizer = load_tokenizer(self._bundle / names.TOKENIZER_FILE)

    def tokens(self, prompt: str, name: str = "prompt") -> PromptTokens:
        """The tokens of a prompt that is some text.

        Models that read padding were trained on prompts that were cut off, so theirs are, too, with a warning; another
        warning names what the tokenizer does not know.

        Raises:
            RequestError: it is too long.
        """
        self.load()
        encoding = self._tokenizer.encode(prompt)
        ids = list(encoding.ids)
        longest = self._manifest.model.text_length
        cut_off = len(ids) > longest
        if cut_off and not self._manifest.model.context_tokens:
            raise RequestError(
                f"{name}: got {len(ids)} tokens, this bundle takes up to {longest}; shorten it, or export "
                "with a larger --text-length, where the model has one"
            )
        warnings = [f"{name}: has {len(ids)} tokens; the model reads the first {longest}"] if cut_off else []
        unknown = {self._tokenizer.token_to_id(token) for token in _UNKNOWN}
        spans = [span for own, span in zip(ids, encoding.offsets, strict=True) if own in unknown]
        if spans:
            words = dict.fromkeys(ascii(prompt[start:end][:_SHOWN]) for start, end in spans)
            told = ", ".join(list(words)[:_SHOWN_WORDS])
            warnings.append(f"{name}: the text encoder of this bundle does not know {told}")
        return PromptTokens(ids[:longest], "; ".join(warnings))


class TextEncoder(AuxiliaryGraph):
    """The text encoder of a bundle on an open backend, one prompt at a time."""

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        graph = manifest.text_encoder
        assert graph is not None
        super().__init__(backend, graph)
        self._text_length = manifest.model.text_length
        self._gives_padding = manifest.model.context_tokens > 0

    def encode(self, ids: Sequence[int]) -> NDArray[Any]:
        """The features of one prompt: fp32 [tokens, C_text], or [T, C_text] where padding is read."""
        padded = np.zeros((1, self._text_length), dtype=np.int64)
        padded[0, : len(ids)] = ids
        count = np.array([len(ids)], dtype=np.int64)
        features = self.run({names.TOKEN_IDS: padded, names.TOKEN_COUNT: count})[names.ENCODED]
        return features[0, : None if self._gives_padding else len(ids)]


def check_unreplaced(bundle: Path, manifest: Manifest) -> None:
    """That the folder still holds the bundle that was loaded from it: what is read late must belong to it.

    Raises:
        BundleError: it holds another, or none.
    """
    if read_manifest(bundle) != manifest:
        raise BundleError(f"bundle {bundle}: was replaced by another since it was loaded; load it again")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a file, without padding or truncation.

    Raises:
        UnavailableError: the package tokenizers is not installed.
        BundleError: the file is damaged.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UnavailableError("prompts need the package tokenizers; pip install 'fastvar-trt[text]'") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise BundleError(f"{path}: not a readable tokenizer ({error}); export the bundle again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
