"""What images are drawn of: classes, or text features with their unconditional counterpart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.manifest import ModelSpec


def numbers(name: str, value: Any, dtype: str) -> NDArray[Any]:
    """The value as an array of that dtype.

    Raises:
        RequestError: not numbers, or not whole where whole ones are asked for.
    """
    try:
        array = np.asarray(value)
        with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite, or no whole number: refused below
            exact = array.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{name}: got {value!r}, expected numbers") from error
    if array.dtype.kind not in "iuf" and array.size:
        raise RequestError(f"{name}: got {value!r}, expected numbers")
    if dtype == "int64" and not (exact == array).all():
        raise RequestError(f"{name}: got {value!r}, expected whole numbers")
    return exact


def pad_rows(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """The array with its last row repeated up to `rows` rows."""
    missing = rows - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


@dataclasses.dataclass(frozen=True)
class ClassCondition:
    """Class indices int64 [N]."""

    labels: NDArray[Any]

    @classmethod
    def of(cls, model: ModelSpec, labels: Sequence[int]) -> ClassCondition:
        """The labels, checked.

        Raises:
            RequestError: no list of class indices of this model.
        """
        array = numbers("labels", labels, "int64")
        if array.ndim != 1 or len(array) == 0:
            raise RequestError(f"labels: got {labels!r}, expected a list of at least one class index")
        for label in array.tolist():
            if not 0 <= label < model.num_classes:
                raise RequestError(
                    f"class {label}: this model has {model.num_classes} classes, 0 to {model.num_classes - 1}"
                )
        return cls(array)

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, part: slice, batch: int) -> dict[str, NDArray[Any]]:
        """Inputs of the condition graph for some of the images, filled up to the batch size."""
        return {names.LABELS: pad_rows(self.labels[part], batch)}


@dataclasses.dataclass(frozen=True)
class TextCondition:
    """Features of a text encoder, padded to the bundle's text length T.

    Attributes:
        features: fp32 [N, T, C_text].
        lengths: int64 [N], tokens of each.
        negative_features: fp32 [N, T, C_text], of the negative prompts; zeros where there is none.
        negative_lengths: int64 [N]; those of `lengths` where there is none.
        negative: bool [N], whether an image has a negative prompt.
    """

    features: NDArray[Any]
    lengths: NDArray[Any]
    negative_features: NDArray[Any]
    negative_lengths: NDArray[Any]
    negative: NDArray[Any]

    @classmethod
    def of(
        cls,
        model: ModelSpec,
        features: Sequence[NDArray[Any]],
        negatives: Sequence[NDArray[Any] | None] | None = None,
    ) -> TextCondition:
        """Features [tokens, C_text] per image, checked and padded.

        Args:
            model: of the bundle.
            features: one array per image.
            negatives: the features of one negative prompt per image; None, for all or for one: the model's own.

        Raises:
            RequestError: no features, more tokens than the bundle takes, another width, numbers that are not finite.
        """
        if isinstance(features, str) or not isinstance(features, Sequence) or len(features) == 0:
            raise RequestError("text_features: expected a list with one array [tokens, width] per image")
        listed = [None] * len(features) if negatives is None else list(negatives)
        if len(listed) != len(features):
            raise RequestError(f"negative prompts: got {len(listed)}, expected one per image ({len(features)})")
        padded, lengths = _padded(model, features, "text_features")
        flags = np.array([item is not None for item in listed], dtype=np.bool_)
        negative, negative_lengths = np.zeros_like(padded), lengths.copy()
        if flags.any():
            given, given_lengths = _padded(model, [item for item in listed if item is not None], "negative features")
            negative[flags], negative_lengths[flags] = given, given_lengths
        return cls(padded, lengths, negative, negative_lengths, flags)

    def __len__(self) -> int:
        return len(self.lengths)

    def inputs(self, part: slice, batch: int) -> dict[str, NDArray[Any]]:
        """Inputs of the condition graph for some of the images, filled up to the batch size."""

        def both(positive: NDArray[Any], negative: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([pad_rows(positive[part], batch), pad_rows(negative[part], batch)])

        return {
            names.TEXT_FEATURES: both(self.features, self.negative_features),
            names.TEXT_LENGTHS: both(self.lengths, self.negative_lengths),
            names.NEGATIVE: pad_rows(self.negative[part], batch),
        }


Condition = ClassCondition | TextCondition


def _padded(model: ModelSpec, features: Sequence[NDArray[Any]], name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    rows = np.zeros((len(features), model.text_length, model.text_width), dtype=np.float32)
    lengths = np.zeros(len(features), dtype=np.int64)
    for i, item in enumerate(features):
        array = numbers(f"{name}[{i}]", item, "float32")
        if array.ndim != 2 or array.shape[1] != model.text_width:
            raise RequestError(
                f"{name}[{i}]: got shape {list(array.shape)}, expected [tokens, {model.text_width}]: the features of "
                "the text encoder that this model was trained with"
            )
        if not 1 <= len(array) <= model.text_length:
            raise RequestError(
                f"{name}[{i}]: got {len(array)} tokens, this bundle takes 1 to {model.text_length}; shorten the "
                "prompt, or export with a larger --text-length"
            )
        if not np.isfinite(array).all():
            raise RequestError(f"{name}[{i}]: expected finite numbers")
        rows[i, : len(array)], lengths[i] = array, len(array)
    return rows, lengths
