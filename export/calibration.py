"""The scales of rounded activations: how large they get where the model itself draws.

One scale per linear layer and not per call, image or scale step, so that an image does not depend on its neighbours and
TensorRT has a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvar_trt.export.models.base import NextScaleModel
from fastvar_trt.export.models.matrix import INPUT_SCALE, largest_number, matrix_format, observing, rounds_activations
from fastvar_trt.export.models.reference import default_request, generate
from fastvar_trt.export.progress import Progress
from fastvar_trt.export.weights_file import overwrite_scalars
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import TOKENIZER_FILE, Condition
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.plan import ResolvedPlan
from fastvar_trt.runtime.precision import KV_INTEGER
from fastvar_trt.runtime.text import load_tokenizer
from fastvar_trt.runtime.weights import TensorPlace

Subject = int | str  # a class, or a prompt
NUM_SUBJECTS = 4  # where none are given


def check_subjects(model: NextScaleModel, subjects: Sequence[Subject], folder: Path) -> None:
    """That a model can draw them, and that there is something to find; `folder` has the tokenizer.

    Raises:
        ExportError: naming the one that it cannot.
    """
    spec = model.model_spec()
    if subjects and not rounds_activations(model.precision):
        raise ExportError(
            f"calibration: nothing has a scale in {model.precision.name}; leave it out, or take w8a8, fp8 or "
            "integer_kv (--integer-kv)"
        )
    for subject in subjects:
        if isinstance(subject, str) and spec.condition is Condition.TEXT and model.text_specs() is None:
            raise ExportError(f"calibration: got the prompt {subject!r}, and no text encoder; give --text-encoder")
        if isinstance(subject, str) and not subject.strip():
            raise ExportError("calibration: got an empty prompt")
        if isinstance(subject, str) and spec.condition is Condition.CLASS:
            raise ExportError(f"calibration: got the prompt {subject!r}, the model draws classes; give their numbers")
        if isinstance(subject, int) and spec.condition is Condition.TEXT:
            raise ExportError(f"calibration: got the class {subject}, the model draws from text; give prompts")
        if isinstance(subject, int) and not 0 <= subject < spec.num_classes:
            raise ExportError(f"calibration: class {subject}: the model has 0 to {spec.num_classes - 1}")
        if isinstance(subject, str):
            _tokens(model, folder, subject)


@torch.inference_mode()
def calibrate(
    chains: Sequence[tuple[NextScaleModel, ResolvedPlan]],
    folder: Path,
    places: Mapping[str, TensorPlace],
    subjects: Sequence[Subject],
    progress: Progress,
) -> bool:
    """Draw, and write the scales of activations into the weights file; nothing where no format has any.

    Args:
        chains: the model over the weights file, and the plan with which it draws, at every size.
        folder: of the weights file, and the tokenizer.
        places: of the file's tensors.
        subjects: classes or prompts, drawn at every size; without any, the first classes, prompts of random tokens, or
            what the model is compared on, where it has no text encoder.
        progress: called with `calibration`, `compare` and the share that is done.

    Returns:
        whether the file was changed.

    Raises:
        ExportError: what was multiplied is not finite.
    """
    scales = {
        id(parameter): name
        for model, _ in chains
        for name, parameter in model.named_parameters()
        if name.endswith(INPUT_SCALE)
    }
    if not scales:
        return False
    largest = dict.fromkeys(scales.values(), 0.0)

    def observe(linear: str, tensors: Mapping[str, Tensor], x: Tensor) -> None:
        name = scales.get(id(tensors.get(linear + INPUT_SCALE)))
        if name is not None:
            largest[name] = float(np.maximum(largest[name], float(x.abs().max())))  # not max(): NaN shall stay

    first = chains[0][0]
    with observing(observe):
        conditions = [_condition(first, folder, subject, i) for i, subject in enumerate(subjects or _defaults(first))]
        draws = [(chain, i) for chain in chains for i in range(len(conditions))]
        for done, ((model, plan), i) in enumerate(draws):
            progress("calibration", "compare", done / len(draws))
            noise = {
                scale: torch.from_numpy(uniform_noise(i, scale, model.token_spec(scale)[0]))[None]
                for scale in plan.steps
            }
            generate(model, plan, conditions[i], noise, default_request(model, 1, greedy=False), [i])
    progress("calibration", "done", 1.0)
    unusable = [name for name, size in largest.items() if not np.isfinite(size)]
    if unusable:
        raise ExportError(
            f"calibration: what {unusable[0].removesuffix(INPUT_SCALE)} takes is not finite; the weights are damaged, "
            f"or exceed {first.precision.computed}"
        )

    def dtype(name: str) -> str:
        """Of the numbers that a scale is for: those of a matrix, or keys and values."""
        linear = name.removesuffix(INPUT_SCALE)
        matrix = places.get(matrix_format(first.precision, linear).names(linear)[0])
        return KV_INTEGER if matrix is None else matrix.dtype

    # Of a layer that no step of any plan runs: any number will do.
    overwrite_scalars(
        folder, places, {name: (size or 1.0) / largest_number(dtype(name)) for name, size in largest.items()}
    )
    return True


def _defaults(model: NextScaleModel) -> Sequence[Subject | None]:
    spec = model.model_spec()
    if spec.condition is Condition.CLASS:
        return range(min(NUM_SUBJECTS, spec.num_classes))
    return [None] * (NUM_SUBJECTS if model.text_specs() is not None else 1)


def _condition(model: NextScaleModel, folder: Path, subject: Subject | None, seed: int) -> dict[str, Tensor]:
    """Inputs of the condition graph."""
    if isinstance(subject, int):
        return {names.LABELS: torch.tensor([subject])}
    if model.text_specs() is None:
        return model.example_condition(1)
    length = model.model_spec().text_length
    if subject is None:
        ids = torch.randint(model.text_vocabulary(), (length,), generator=torch.Generator().manual_seed(seed))
        count = max(length * (seed + 1) // (2 * NUM_SUBJECTS), 1)
    else:
        tokens = _tokens(model, folder, subject)
        ids, count = torch.zeros(length, dtype=torch.int64), len(tokens)
        ids[:count] = torch.tensor(tokens)
    return _encoded(model, {names.TOKEN_IDS: ids[None], names.TOKEN_COUNT: torch.tensor([count])})


def _tokens(model: NextScaleModel, folder: Path, prompt: str) -> list[int]:
    """Those of a prompt, cut off where the runtime cuts it off."""
    tokens, spec = list(load_tokenizer(folder / TOKENIZER_FILE).encode(prompt).ids), model.model_spec()
    if len(tokens) > spec.text_length and not spec.context_tokens:
        raise ExportError(
            f"calibration: {prompt!r} has {len(tokens)} tokens, the bundle takes {spec.text_length}; shorten it"
        )
    return tokens[: spec.text_length]


def _encoded(model: NextScaleModel, prompt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A prompt without a negative one, as inputs of the condition graph."""
    features = model.encode_text(prompt)[names.ENCODED]
    return {
        names.TEXT_FEATURES: features.repeat(2, 1, 1),
        names.TEXT_LENGTHS: prompt[names.TOKEN_COUNT].repeat(2),
        names.NEGATIVE: torch.tensor([False]),
    }
