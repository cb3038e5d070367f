"""Prompts to features: the tokenizer and the text encoder of a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.backends import Backend, BoundGraph
from fastvar_trt.runtime.errors import BundleError, RequestError, UnavailableError
from fastvar_trt.runtime.manifest import Manifest, TensorSpec, read_manifest


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """A prompt for the text encoder.

    Attributes:
        ids: the end mark included, where the model has one.
        warning: what of the prompt was left out; empty where nothing was.
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

        Models that read padding were trained on prompts that were cut off, so theirs are, too, with a warning.

        Raises:
            RequestError: it is too long.
        """
        self.load()
        ids = list(self._tokenizer.encode(prompt).ids)
        longest = self._manifest.model.text_length
        if len(ids) > longest and self._manifest.model.context_tokens:
            return PromptTokens(ids[:longest], f"{name}: has {len(ids)} tokens; the model reads the first {longest}")
        if len(ids) > longest:
            raise RequestError(
                f"{name}: got {len(ids)} tokens, this bundle takes up to {longest}; shorten it, or export "
                "with a larger --text-length"
            )
        return PromptTokens(ids)


class TextEncoder:
    """The text encoder of a bundle on an open backend, one prompt at a time."""

    def __init__(self, backend: Backend, bundle: Path, manifest: Manifest) -> None:
        graph = manifest.text_encoder
        assert graph is not None
        self._backend, self._graph = backend, graph
        self._text_length = manifest.model.text_length
        self._gives_padding = manifest.model.context_tokens > 0
        check_unreplaced(bundle, manifest)
        self._buffers = {
            spec.name: backend.allocate(spec.shape, spec.dtype) for spec in (*graph.inputs, *graph.outputs)
        }
        self._bound: BoundGraph | None = None

    @property
    def num_buffer_bytes(self) -> int:
        """Memory of tokens and features."""
        return sum(TensorSpec("", b.shape, b.dtype).num_bytes for b in self._buffers.values())

    def _load(self) -> BoundGraph:
        graph = self._graph
        try:
            self._backend.load(graph)
            return self._backend.bind(
                graph,
                {spec.name: self._buffers[spec.name].view() for spec in graph.inputs},
                {spec.name: self._buffers[spec.name].view() for spec in graph.outputs},
            )
        except BaseException:
            if self._backend.is_on_demand(graph):
                self._backend.unload(graph)
            raise

    def release(self) -> None:
        """Unload it, where it is on demand; it is loaded again for the next prompt."""
        if self._bound is not None and self._backend.is_on_demand(self._graph):
            self._backend.activate()
            self._backend.synchronize()
            self._bound = None
            self._backend.unload(self._graph)

    def encode(self, ids: Sequence[int]) -> NDArray[Any]:
        """The features of one prompt: fp32 [tokens, C_text], or [T, C_text] where padding is read."""
        padded = np.zeros((1, self._text_length), dtype=np.int64)
        padded[0, : len(ids)] = ids
        backend = self._backend
        backend.activate()
        backend.upload(self._buffers[names.TOKEN_IDS], padded)
        backend.upload(self._buffers[names.TOKEN_COUNT], np.array([len(ids)], dtype=np.int64))
        if self._bound is None:
            self._bound = self._load()
        self._bound.enqueue()
        return backend.download(self._buffers[names.ENCODED])[0, : None if self._gives_padding else len(ids)].copy()


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
