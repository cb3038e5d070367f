"""The known-answer test of a bundle: what PyTorch computed at export against what this machine computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import BundleError
from fastvar_trt.runtime.pipeline import Pipeline

# Largest error that may be due to rounding, as a share of the tensor's largest magnitude: both sides compute in the
# bundle's precision, in another order of summation. About ten times what was measured on the test models.
TOLERANCE: Mapping[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
# Share of the tokens of one step that may differ: those whose choice falls on the edge between two candidates.
MAX_TOKENS_CHANGED: Mapping[str, float] = {"fp32": 0.01, "fp16": 0.2, "bf16": 0.5}
# The same for bits, half of which agree by chance.
MAX_BITS_CHANGED: Mapping[str, float] = {"fp32": 0.002, "fp16": 0.02, "bf16": 0.1}
_ALWAYS_ALLOWED = 2  # tokens or bits that may differ however few a step has: the first has one token of a few bits
# Share by which the scores of selected tokens may sum to less than those of the best ones: near-ties fall differently.
MAX_SELECTION_SHORTFALL: Mapping[str, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2}
# Share of the positions of a pruned step whose logits may be off: those that a selection has swapped at some layer.
MAX_POSITIONS_SWAPPED: Mapping[str, float] = {"fp32": 0.02, "fp16": 0.1, "bf16": 0.3}

_GREY_LEVEL = 1 / 255  # in pictures that are nearly constant the decoder's normalisation magnifies rounding
_NOT_PER_IMAGE = (
    *(names.LABELS, names.TEXT_FEATURES, names.TEXT_LENGTHS, names.NEGATIVE),
    *(names.TOKEN_IDS, names.TOKEN_COUNT, names.ENCODED),
)
_FORCING = 1e6  # a temperature at which both values of a bit are as likely, so that the noise alone decides


@dataclasses.dataclass(frozen=True)
class StepCheck:
    """One step against the reference, over the images whose tokens agreed up to it.

    Attributes:
        batch: the batch size that was run.
        scale: which step.
        num_images: how many images could be compared.
        token_agreement: share of equal tokens; None where there are no such images.
        logits_error: maximum absolute error.
        relative_error: the same as a share of the largest logit.
        positions_off: share of the compared positions whose logits are further off than rounding explains.
    """

    batch: int
    scale: int
    num_images: int
    token_agreement: float | None
    logits_error: float | None
    relative_error: float | None
    positions_off: float | None


@dataclasses.dataclass(frozen=True)
class Verification:
    """The outcome of `verify_bundle`; `failures` is empty where the bundle is sound here.

    Attributes:
        steps: every step of every batch size.
        f_hat_error: maximum relative error of the token features of images whose tokens all agree; None for none.
        image_error: maximum absolute error of those images, in [0, 1].
        num_images: how many were drawn, over all batch sizes.
        num_images_equal: how many of them have the reference's tokens.
        failures: what is wrong, in words.
    """

    steps: tuple[StepCheck, ...]
    f_hat_error: float | None
    image_error: float | None
    num_images: int
    num_images_equal: int
    failures: tuple[str, ...]


def verify_bundle(pipeline: Pipeline) -> Verification:
    """Draw the greedy images that the exporter left in the bundle, in every batch size, and compare.

    A token that differs changes everything after it, so an image is compared up to its first difference.

    Raises:
        BundleError: the reference cannot be read.
    """
    path = pipeline.bundle / names.REFERENCE_FILE
    try:
        with np.load(path, allow_pickle=False) as data:
            reference = dict(data)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise BundleError(f"{path}: cannot be read ({error}); export the bundle again") from error
    try:
        parts = [_verify_batch(pipeline, batch, reference) for batch in pipeline.manifest.batches]
    except KeyError as error:
        raise BundleError(f"{path}: {error} is missing; export the bundle again") from error

    text_failures = _verify_text(pipeline, reference) if pipeline.manifest.text_encoder is not None else ()

    def worst(values: list[float | None]) -> float | None:
        return max((v for v in values if v is not None), default=None)

    return Verification(
        steps=tuple(step for part in parts for step in part.steps),
        f_hat_error=worst([part.f_hat_error for part in parts]),
        image_error=worst([part.image_error for part in parts]),
        num_images=sum(part.num_images for part in parts),
        num_images_equal=sum(part.num_images_equal for part in parts),
        failures=(*text_failures, *(failure for part in parts for failure in part.failures)),
    )


def may_change(count: int, are_bits: bool, precision: str) -> float:
    """Share of a step's tokens, or bits, that may differ by rounding.

    Args:
        count: how many are compared.
        are_bits: of a model that draws bits.
        precision: of the bundle.
    """
    limits = MAX_BITS_CHANGED if are_bits else MAX_TOKENS_CHANGED
    if precision == "fp32":
        return limits[precision]
    return max(limits[precision], _ALWAYS_ALLOWED / max(count, 1))


def _verify_text(pipeline: Pipeline, reference: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    """The text encoder on the reference's tokens."""
    precision = pipeline.manifest.precision
    count = int(reference[names.TOKEN_COUNT][0])
    expected = reference[names.ENCODED][0, :count]
    error = float(np.abs(pipeline.encode_tokens(reference[names.TOKEN_IDS][0, :count].tolist()) - expected).max())
    relative = error / float(np.abs(expected).max())
    if relative <= TOLERANCE[precision]:
        return ()
    return (
        f"text encoder: differs by {relative:.3g} of the largest value; {precision} allows {TOLERANCE[precision]:g}",
    )


def _verify_batch(pipeline: Pipeline, batch: int, images: Mapping[str, NDArray[Any]]) -> Verification:
    precision = pipeline.manifest.precision
    tolerance = TOLERANCE[precision]
    # The images of the reference, again and again until the batch is full.
    rows = np.arange(batch) % len(images["f_hat"])
    reference = {name: value[rows] for name, value in images.items() if name not in _NOT_PER_IMAGE}
    plan = pipeline.manifest.resolved_plan
    forced: dict[str, Any] = {"greedy": True}
    if pipeline.manifest.model.family == "infinity":
        # One of ten thousand bits that falls otherwise would leave nothing to compare: the noise makes them the
        # reference's, and the logits tell what they would have been.
        noise = {k: (reference[f"step_{k:02d}"] == 1) * np.float32(1 - 2**-24) for k in plan.steps}
        forced = {"noise": noise, "temperature": _FORCING, "top_p": 1.0}
    result = pipeline.generate(
        **_condition(images, rows),
        **forced,
        return_logits=True,
        return_float_images=True,
    )
    assert result.logits is not None and result.float_images is not None
    failures: list[str] = []
    steps: list[StepCheck] = []
    same = np.ones(batch, dtype=bool)  # images whose tokens agree so far
    for k, tokens, logits in zip(plan.steps, result.tokens, result.logits, strict=True):
        step = _check_step(batch, k, tokens, logits, reference, same, tolerance)
        steps.append(step)
        if step.token_agreement is None or step.relative_error is None or step.positions_off is None:
            continue
        may_be_off = MAX_POSITIONS_SWAPPED[precision] if plan.is_pruned(k) else 0.0
        if step.positions_off > may_be_off:
            failures.append(
                f"batch {batch}, step {k}: logits differ by {step.logits_error:.3g}, {step.relative_error:.2g} of the "
                f"largest; at {step.positions_off:.1%} of the positions by more than the {tolerance:g} of {precision}, "
                f"expected at most {may_be_off:.1%}"
            )
        if 1 - step.token_agreement > may_change(tokens[same].size, tokens.dtype == np.uint8, precision):
            failures.append(f"batch {batch}, step {k}: only {step.token_agreement:.1%} of the tokens agree")
        same &= (tokens == reference[f"step_{k:02d}"]).reshape(batch, -1).all(axis=1)
    f_hat_error = image_error = None
    if same.any():
        f_hat = reference["f_hat"][same]
        f_hat_error = float(np.abs(result.f_hat[same] - f_hat).max() / np.abs(f_hat).max())
        image_error = float(np.abs(result.float_images - reference["image"])[same].max())
        allowed = max(tolerance, _GREY_LEVEL)
        for what, error, limit in (("f_hat", f_hat_error, tolerance), ("image", image_error, allowed)):
            if not error <= limit:
                failures.append(f"batch {batch}, {what}: differs by {error:.3g}; {precision} allows {limit:.3g}")
    return Verification(tuple(steps), f_hat_error, image_error, batch, int(same.sum()), tuple(failures))


def _condition(images: Mapping[str, NDArray[Any]], rows: NDArray[Any]) -> dict[str, Any]:
    """What the reference was drawn of, as arguments of `Pipeline.generate`."""
    if names.LABELS in images:
        return {"labels": images[names.LABELS][rows].tolist()}
    features, lengths, negative = (images[name] for name in (names.TEXT_FEATURES, names.TEXT_LENGTHS, names.NEGATIVE))
    count = len(negative)
    return {
        "text_features": [features[i, : lengths[i]] for i in rows],
        "negative_text_features": [features[count + i, : lengths[count + i]] if negative[i] else None for i in rows],
    }


def _check_step(
    batch: int,
    scale: int,
    tokens: NDArray[Any],
    logits: NDArray[Any],
    reference: Mapping[str, NDArray[Any]],
    same: NDArray[Any],
    tolerance: float,
) -> StepCheck:
    if not same.any():
        return StepCheck(batch, scale, 0, None, None, None, None)
    expected, probe = reference[f"step_{scale:02d}"], reference[f"logits_{scale:02d}"]
    errors = np.abs(logits[:, : probe.shape[1]] - probe)[same]
    errors = errors.reshape(*errors.shape[:2], -1).max(axis=-1)  # per position
    error, largest = float(errors.max()), max(float(np.abs(probe[same]).max()), 1e-6)
    agree = tokens == expected
    if tokens.dtype == np.uint8:  # which were forced
        agree = logits[:, : probe.shape[1]].argmax(-1) == expected[:, : probe.shape[1]]
    return StepCheck(
        batch=batch,
        scale=scale,
        num_images=int(same.sum()),
        token_agreement=float(agree[same].mean()),
        logits_error=error,
        relative_error=error / largest,
        positions_off=1.0 - float((errors <= tolerance * largest).mean()),  # NaN is off
    )
