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
from fastvar_trt.runtime.manifest import Condition, Tokens, graph_name, logits_name
from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.runtime.precision import Tolerance
from fastvar_trt.runtime.request import Request

_GREY_LEVEL = 1 / 255  # in pictures that are nearly constant the decoder's normalisation magnifies rounding
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
    """Draw the greedy images that the exporter left of the first variant, in every batch size, and compare.

    A token that differs changes everything after it, so an image is compared up to its first difference.

    Raises:
        BundleError: the reference cannot be read.
    """
    path = pipeline.bundle / names.REFERENCE_FILE
    if path.name not in pipeline.manifest.files:
        raise BundleError(
            f"bundle {pipeline.bundle}: was exported with --no-compare, so there is nothing to compare with; export it "
            "without"
        )
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


def _verify_text(pipeline: Pipeline, reference: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    """The text encoder on the reference's tokens."""
    precision = pipeline.manifest.own_precision
    count = int(reference[names.TOKEN_COUNT][0])
    encoded = pipeline.encode_tokens(reference[names.TOKEN_IDS][0, :count].tolist())
    expected = reference[names.ENCODED][0, : len(encoded)]  # with padding, where that is read
    error = float(np.abs(encoded - expected).max())
    relative = error / float(np.abs(expected).max())
    limit = precision.tolerance.error
    if relative <= limit:
        return ()
    return (f"text encoder: differs by {relative:.3g} of the largest value; {precision.name} allows {limit:g}",)


def _verify_batch(pipeline: Pipeline, batch: int, images: Mapping[str, NDArray[Any]]) -> Verification:
    manifest = pipeline.manifest
    precision = manifest.own_precision
    tolerance = precision.tolerance
    # The images of the reference, again and again until the batch is full.
    rows = np.arange(batch) % len(images[names.F_HAT])
    reference = _of_rows(pipeline, images, rows)
    plan = manifest.resolved_plan
    are_bits = manifest.model.tokens is Tokens.BITS
    result = pipeline.draw(
        [_request(pipeline, images, reference, i, row) for i, row in enumerate(rows.tolist())],
        return_logits=True,
        return_float_images=True,
    )
    assert result.logits is not None and result.float_images is not None
    failures: list[str] = []
    steps: list[StepCheck] = []
    same = np.ones(batch, dtype=bool)  # images whose tokens agree so far
    for k, tokens, logits in zip(plan.steps, result.tokens, result.logits, strict=True):
        step = _check_step(batch, k, tokens, logits, reference, same, tolerance, are_bits=are_bits)
        steps.append(step)
        if step.token_agreement is None or step.relative_error is None or step.positions_off is None:
            continue
        may_be_off = tolerance.positions_swapped if plan.is_pruned(k) else 0.0
        if step.positions_off > may_be_off:
            failures.append(
                f"batch {batch}, step {k}: logits differ by {step.logits_error:.3g}, {step.relative_error:.2g} of the "
                f"largest; at {step.positions_off:.1%} of the positions by more than the {tolerance.error:g} of "
                f"{precision.name}, expected at most {may_be_off:.1%}"
            )
        if 1 - step.token_agreement > tolerance.may_change(tokens[same].size, are_bits=are_bits):
            failures.append(f"batch {batch}, step {k}: only {step.token_agreement:.1%} of the tokens agree")
        same &= (tokens == reference[graph_name(names.STEP, k)]).reshape(batch, -1).all(axis=1)
    f_hat_error = image_error = None
    if same.any():
        is_diffused = any(graph.kind == names.RESIDUAL for graph in manifest.default.chain(batch))
        share = tolerance.elements_off if is_diffused else 0.0
        f_hat = reference[names.F_HAT][same]
        f_hat_error = largest_error(result.f_hat[same] - f_hat, share) / float(np.abs(f_hat).max())
        image_error = largest_error((result.float_images - reference[names.IMAGE])[same], share)
        allowed = max(tolerance.error, _GREY_LEVEL)
        for what, error, limit in (("f_hat", f_hat_error, tolerance.error), ("image", image_error, allowed)):
            if not error <= limit:
                failures.append(f"batch {batch}, {what}: differs by {error:.3g}; {precision.name} allows {limit:.3g}")
    return Verification(tuple(steps), f_hat_error, image_error, batch, int(same.sum()), tuple(failures))


def largest_error(difference: NDArray[Any], share_off: float) -> float:
    """The largest magnitude, of all elements but the largest ones, of which a share may be off; NaN where one is."""
    errors = np.abs(difference).ravel()
    if np.isnan(errors).any():
        return float("nan")
    last = errors.size - 1 - int(share_off * errors.size)
    return float(np.partition(errors, last)[last])


def _of_rows(pipeline: Pipeline, images: Mapping[str, NDArray[Any]], rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What the reference has per image: tokens and logits of every step, f_hat and the picture."""
    steps = pipeline.manifest.resolved_plan.steps
    per_image = [names.F_HAT, names.IMAGE, *(graph_name(names.STEP, k) for k in steps), *map(logits_name, steps)]
    return {name: images[name][rows] for name in per_image}


def _request(
    pipeline: Pipeline,
    images: Mapping[str, NDArray[Any]],
    reference: Mapping[str, NDArray[Any]],
    image: int,
    row: int,
) -> Request:
    """What draws the reference's picture `row` as number `image` of a batch."""
    model = pipeline.manifest.model
    drawn: dict[str, Any] = {"greedy": True}
    if model.tokens is Tokens.BITS:
        # One of ten thousand bits that falls otherwise would leave nothing to compare: the noise makes them the
        # reference's, and the logits tell what they would have been.
        forced = {
            k: (reference[graph_name(names.STEP, k)][image] == 1) * np.float32(1 - 2**-24)
            for k in pipeline.manifest.resolved_plan.steps
        }
        drawn = {"noise": forced, "temperature": _FORCING, "top_p": 1.0}
    if model.condition is Condition.CLASS:
        return Request(label=int(images[names.LABELS][row]), **drawn)
    features, lengths, negative = (images[name] for name in (names.TEXT_FEATURES, names.TEXT_LENGTHS, names.NEGATIVE))
    other = len(negative) + row
    drawn["text_features"] = features[row] if model.context_tokens else features[row, : lengths[row]]
    if negative[row]:
        drawn["negative_text_features"] = features[other] if model.context_tokens else features[other, : lengths[other]]
    if model.context_tokens:
        drawn["text_tokens"] = int(lengths[row])
        drawn["negative_text_tokens"] = int(lengths[other]) if negative[row] else None
    return Request(**drawn)


def _check_step(
    batch: int,
    scale: int,
    tokens: NDArray[Any],
    logits: NDArray[Any],
    reference: Mapping[str, NDArray[Any]],
    same: NDArray[Any],
    tolerance: Tolerance,
    *,
    are_bits: bool,
) -> StepCheck:
    if not same.any():
        return StepCheck(batch, scale, 0, None, None, None, None)
    expected, probe = reference[graph_name(names.STEP, scale)], reference[logits_name(scale)]
    errors = np.abs(logits[:, : probe.shape[1]] - probe)[same]
    errors = errors.reshape(*errors.shape[:2], -1).max(axis=-1)  # per position
    error, largest = float(errors.max()), max(float(np.abs(probe[same]).max()), 1e-6)
    agree = tokens == expected
    if are_bits:  # which were forced
        agree = logits[:, : probe.shape[1]].argmax(-1) == expected[:, : probe.shape[1]]
    return StepCheck(
        batch=batch,
        scale=scale,
        num_images=int(same.sum()),
        token_agreement=float(agree[same].mean()),
        logits_error=error,
        relative_error=error / largest,
        positions_off=1.0 - float((errors <= tolerance.error * largest).mean()),  # NaN is off
    )
