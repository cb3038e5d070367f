"""What a picture is drawn of and with: one table of values, what a bundle takes of them, and their validation.

The fields of `Request` are the table. The command line, the HTTP body and its schema, Triton's configuration and the
page derive from `parameters`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import BundleError, RequestError
from fastvar_trt.runtime.manifest import Condition, Manifest, TensorSpec, Tokens, Variant
from fastvar_trt.runtime.noise import MAX_SEED, gumbel_noise, normal_noise, uniform_noise

# A character that can be seen: spelt out, as the languages of regular expressions differ in what is a space.
VISIBLE = r"[^\s\x1c-\x1f\x85]"
MIN_TEMPERATURE = 1e-3  # below, logits divided by it overflow
Kind = Literal["integer", "number", "boolean", "text", "features", "image", "mask"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One value that a request may carry.

    Attributes:
        name: the field of `Request`.
        kind: of one value; `features`: an array [tokens, width]; `image`: uint8 [H, W, 3]; `mask`: bool [H, W].
        description: for people.
        dtype: of the graphs' input of that name; empty where there is none.
        per_scale: whether it may have one value per scale.
        minimum, maximum: of a number; of features, how many tokens.
        width: of features.
        default: what the bundle takes where the request has none; None where there is none.
        condition: whether it says what the picture is of, and not how it is drawn.
        needs: the parameter without which this one means nothing.
    """

    name: str
    kind: Kind
    description: str
    dtype: str = ""
    per_scale: bool = False
    minimum: float | None = None
    maximum: float | None = None
    width: int = 0
    default: Any = None
    condition: bool = False
    needs: str = ""

    @property
    def range_text(self) -> str:
        """The range in words."""
        if self.maximum is None:
            return f"{self.minimum:g} or more"
        if self.minimum is None:
            return f"up to {self.maximum}"
        return f"{self.minimum:g} to {self.maximum}"


def _parameter(kind: Kind, description: str, *, value: Any = None, **rest: Any) -> Any:
    metadata = {"parameter": {"kind": kind, "description": description, **rest}}
    return dataclasses.field(default=value, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture. None is the bundle's default; what a bundle does not take must be left out.

    cfg and temperature may be one value per scale. `noise`, `normal_noise` and `gumbel_noise`, for tests and
    comparisons, are in place of what the seed gives: scale -> U[0, 1) float32 [tokens] or [tokens, bits]; scale ->
    N(0, 1) or Gumbel(0, 1) float32, of the shape that the graph takes. `given` is in place of image, mask and
    keep_scales, and what these become: inputs of the role `GIVEN` by name, as `runtime.given.given_tensors` makes them.
    """

    label: int | None = _parameter("integer", "Class index.", condition=True)
    prompt: str | None = _parameter("text", "What the picture shows, in words.", condition=True)
    negative_prompt: str | None = _parameter("text", "Text to keep away from.", condition=True, needs="prompt")
    text_features: NDArray[Any] | None = _parameter(
        "features", "In place of a prompt: the text encoder's last hidden state, [tokens, width].", condition=True
    )
    negative_text_features: NDArray[Any] | None = _parameter(
        "features", "The same of a negative prompt.", condition=True, needs="text_features"
    )
    text_tokens: int | None = _parameter(
        "integer",
        "How many of the text features are tokens; the others are padding.",
        condition=True,
        needs="text_features",
        minimum=1,
    )
    negative_text_tokens: int | None = _parameter(
        "integer", "The same of a negative prompt.", condition=True, needs="text_features", minimum=1
    )
    image: NDArray[Any] | None = _parameter(
        "image", "Picture to edit, as large as those that are drawn: its parts outside of the mask are kept."
    )
    mask: NDArray[Any] | None = _parameter("mask", "Where the image is drawn anew.", needs="image")
    keep_scales: int | None = _parameter(
        "integer", "How many of the first scales are the image's, everywhere.", needs="image", minimum=1
    )
    paste: bool = _parameter("boolean", "Outside of the mask, take the image's own pixels.", value=True, needs="image")
    seed: int = _parameter("integer", "Of the noise.", value=0, minimum=0, maximum=MAX_SEED)
    cfg: Any = _parameter("number", "Guidance scale, of the scales that have any.", dtype="float32", per_scale=True)
    temperature: Any = _parameter(
        "number", "Divides the logits (Infinity's tau).", dtype="float32", per_scale=True, minimum=MIN_TEMPERATURE
    )
    top_k: int | None = _parameter("integer", "Draw from the K likeliest tokens; 0: from all.", dtype="int64")
    top_p: float | None = _parameter(
        "number", "Draw from the likeliest tokens of this total probability.", dtype="float32", minimum=0, maximum=1
    )
    greedy: bool = _parameter("boolean", "Take the likeliest token instead of drawing.", value=False, dtype="bool")
    noise: Mapping[int, NDArray[Any]] | None = None
    normal_noise: Mapping[int, NDArray[Any]] | None = None
    gumbel_noise: Mapping[int, NDArray[Any]] | None = None
    given: Mapping[str, NDArray[Any]] | None = None


TABLE: Mapping[str, Parameter] = {
    field.name: Parameter(field.name, **field.metadata["parameter"])
    for field in dataclasses.fields(Request)
    if "parameter" in field.metadata
}
_CONDITION_INPUTS: Mapping[Condition, tuple[str, ...]] = {
    Condition.CLASS: (names.LABELS,),
    Condition.TEXT: (names.TEXT_FEATURES, names.TEXT_LENGTHS, names.NEGATIVE),
}
# The field of `Request` that is in place of the seed's, and what the seed gives.
_NOISES: Mapping[names.Role, tuple[str, Callable[..., NDArray[Any]]]] = {
    names.Role.NOISE: ("noise", uniform_noise),
    names.Role.NORMAL: ("normal_noise", normal_noise),
    names.Role.GUMBEL: ("gumbel_noise", gumbel_noise),
}
_EDITED = ("image", "mask", "keep_scales")
_OF_PICTURES = frozenset({*_EDITED, "paste"})
GRAPH_INPUTS: Mapping[str, Parameter] = {name: p for name, p in TABLE.items() if p.dtype}


def parameters(manifest: Manifest) -> dict[str, Parameter]:
    """What a bundle takes, with its own ranges and defaults."""
    model, sampling = manifest.model, manifest.sampling
    least_top_k = 0 if sampling.max_top_k == model.vocab_size else 1
    own: dict[str, dict[str, Any]] = {
        "label": {"minimum": 0, "maximum": model.num_classes - 1},
        "text_features": {"minimum": 1, "maximum": model.text_length, "width": model.text_width},
        "negative_text_features": {"minimum": 1, "maximum": model.text_length, "width": model.text_width},
        "text_tokens": {"maximum": model.text_length},
        "negative_text_tokens": {"maximum": model.text_length},
        "top_k": {"minimum": least_top_k, "maximum": sampling.max_top_k},
        "keep_scales": {"maximum": max(len(variant.schedule) for variant in manifest.variants) - 1},
    }
    absent: set[str] = set()
    if not manifest.default.takes_pictures:
        absent |= _OF_PICTURES
    if model.condition is not Condition.CLASS:
        absent.add("label")
    if model.condition is not Condition.TEXT:
        absent |= {"text_features", "negative_text_features"}
    if not model.context_tokens:  # padding is not read
        absent |= {"text_tokens", "negative_text_tokens"}
    if manifest.text_encoder is None:
        absent |= {"prompt", "negative_prompt"}
    if model.tokens is not Tokens.INDEX:
        absent.add("top_k")
    return {
        name: dataclasses.replace(p, **{"default": getattr(sampling, name, p.default), **own.get(name, {})})
        for name, p in TABLE.items()
        if name not in absent
    }


def check_inputs(manifest: Manifest) -> None:
    """That requests can fill the inputs of all graphs.

    Raises:
        BundleError: an input that no request has, or one of the condition that is missing.
    """
    for graph in manifest.graphs:
        for spec in graph.inputs:
            if spec.role is names.Role.REQUEST:
                parameter = GRAPH_INPUTS.get(spec.name)
                if parameter is None or parameter.per_scale != (spec.scale is not None):
                    raise BundleError(f"{graph.file}: {spec.name}: no such value of a request; export the bundle again")
    expected = _CONDITION_INPUTS[manifest.model.condition]
    for variant in manifest.variants:
        for batch in manifest.batches:
            inputs = [spec for graph in variant.chain(batch) for spec in graph.inputs]
            found = {spec.name for spec in inputs if spec.role is names.Role.CONDITION}
            if found != set(expected):
                raise BundleError(
                    f"graphs of batch {batch}: got condition inputs {', '.join(sorted(found)) or 'none'}, "
                    f"expected {', '.join(expected)}; export the bundle again"
                )


def check_request(manifest: Manifest, variant: Variant, request: Request) -> None:
    """That the bundle can draw it; prompts are not tokenised here.

    Raises:
        RequestError: naming the value, and what the bundle takes.
    """
    known = parameters(manifest)
    given = [name for name, parameter in TABLE.items() if parameter.condition and _is_given(request, parameter)]
    subjects = [name for name in given if not TABLE[name].needs]
    if len(subjects) > 1:
        raise RequestError(f"got {' and '.join(subjects)}: give one of them")
    for name in given:
        if TABLE[name].needs and TABLE[name].needs not in given:
            article = "needs" if TABLE[name].needs == "text_features" else "needs a"
            raise RequestError(f"{name}: {article} {TABLE[name].needs}")
    foreign = [name for name in given if name not in known]
    if foreign or not subjects:
        raise RequestError(f"{foreign[0] if foreign else 'request'}: this bundle {_takes(manifest)}")
    if request.top_k is not None and "top_k" not in known:
        raise RequestError("top_k: this model draws bits, which have two values; use top_p or greedy")
    for name, parameter in known.items():
        if _is_given(request, parameter):
            _check_value(parameter, getattr(request, name), len(variant.schedule), manifest, greedy=request.greedy)
    if request.given is not None:
        _check_given(variant, request.given)
    if any(getattr(request, name) is not None for name in _EDITED):
        check_picture(variant, request)
    _check_guidance(manifest, variant, request)
    for name in ("text", "negative_text"):
        tokens, features = (getattr(request, f"{name}_{of}") for of in ("tokens", "features"))
        if tokens is not None and features is None:
            raise RequestError(f"{name}_tokens: needs {name}_features")
        if tokens is not None and tokens > len(features):
            raise RequestError(f"{name}_tokens: got {tokens}, {name}_features has {len(features)}")
    if any(getattr(request, name) is not None for name, _ in _NOISES.values()):
        _noise(variant, manifest.batches[0], [request])


def _check_given(variant: Variant, given: Mapping[str, NDArray[Any]]) -> None:
    """That given tokens are what the chain takes: buffers are as large as its tensors.

    Raises:
        RequestError: naming the first that is not.
    """
    graphs = variant.chain(min(graph.batch for graph in variant.graphs))
    taken = {spec.name: spec for graph in graphs for spec in graph.inputs if spec.role is names.Role.GIVEN}
    for name, array in given.items():
        if name not in taken:
            raise RequestError(f"given: got {name!r}, this size takes {', '.join(taken) or 'nothing given'}")
        shape, dtype = taken[name].shape[1:], np.dtype(taken[name].dtype)
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
            got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise RequestError(f"given: {name}: got {got}, expected {dtype} {list(shape)}")


def check_picture(variant: Variant, request: Request) -> None:
    """That a picture is as large as those that are drawn, and comes with what is to be done with it.

    Raises:
        RequestError: it is not; or the variant has no image encoder.
    """
    if not variant.takes_pictures:
        raise RequestError("image: this bundle has no image encoder; export it with --with-encoder")
    if request.image is None:
        raise RequestError(f"{'mask' if request.mask is not None else 'keep_scales'}: needs an image")
    if request.given is not None:
        raise RequestError("image: got given tokens, too; give one of them")
    if request.mask is None and request.keep_scales is None:
        raise RequestError("image: give a mask (what is drawn anew), keep_scales (how much of it is kept), or both")
    most = len(variant.schedule) - 1
    if request.keep_scales is not None and request.keep_scales > most:
        raise RequestError(
            f"keep_scales: got {request.keep_scales}, expected 1 to {most} of the {most + 1} of this size"
        )
    size = variant.image_height, variant.image_width
    for name, shape, kinds in (("image", (*size, 3), "u"), ("mask", size, "bu")):
        array = getattr(request, name)
        if array is None:
            continue
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind not in kinds:
            got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            expected = f"{'uint8' if name == 'image' else 'bool'} {list(shape)}"
            raise RequestError(f"{name}: got {got}, expected {expected}; `runtime.pictures.fitted` makes it so")
    if request.image.dtype != np.uint8:
        raise RequestError(f"image: got {request.image.dtype}, expected uint8")


def _check_guidance(manifest: Manifest, variant: Variant, request: Request) -> None:
    """That no guidance is asked for at a scale that has none; one value is for those that have."""
    if np.ndim(request.cfg) == 0:
        return
    first, neutral = variant.resolve(manifest.model).unguided_from, manifest.sampling.neutral_cfg
    for scale, value in enumerate(request.cfg):
        if first is not None and scale >= first and value != neutral:
            raise RequestError(
                f"cfg: got {value:g} at scale {scale}, expected {neutral:g}: this bundle's plan has no guidance from "
                f"scale {first} on; give one value, which is for the scales before"
            )


def _is_given(request: Request, parameter: Parameter) -> bool:
    value = getattr(request, parameter.name)
    # An empty negative prompt is none: forms send it so.
    return value is not None and not (parameter.needs and isinstance(value, str) and not value)


def _takes(manifest: Manifest) -> str:
    model = manifest.model
    if model.condition is Condition.CLASS:
        return f"draws classes: give labels, 0 to {model.num_classes - 1}, and no text"
    if manifest.text_encoder is None:
        return "draws from text: give text_features; it has no text encoder (export with --text-encoder for prompts)"
    return "draws from text: give prompts or text_features, and no labels"


def _check_value(parameter: Parameter, value: Any, num_scales: int, manifest: Manifest, *, greedy: bool) -> None:
    name = parameter.name
    if parameter.kind == "text":
        _check_text(name, value)
    elif parameter.kind == "features":
        _check_features(parameter, value)
    elif parameter.kind in ("image", "mask"):
        pass  # see `check_picture`
    elif parameter.kind == "boolean":
        if not isinstance(value, bool | np.bool_):
            raise RequestError(f"{name}: got {value!r}, expected true or false")
    elif parameter.kind == "integer":
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise RequestError(f"{name}: got {value!r}, expected a whole number")
        if not _in_range(parameter, int(value)) and not (name == "top_k" and greedy):  # without effect there
            raise RequestError(_out_of_range(parameter, value, manifest))
    else:
        array = _numbers(name, value)
        if array.shape not in ((), (num_scales,)) or (array.ndim and not parameter.per_scale):
            expected = f"one value, or one per scale ({num_scales})" if parameter.per_scale else "one value"
            raise RequestError(f"{name}: got {list(array.shape)}, expected {expected}")
        if not np.isfinite(array).all():
            raise RequestError(f"{name}: got {value}, expected finite numbers")
        if not all(_in_range(parameter, number) for number in array.ravel().tolist()):
            raise RequestError(_out_of_range(parameter, value, manifest))


def _in_range(parameter: Parameter, value: float) -> bool:
    at_least = parameter.minimum is None or value >= parameter.minimum
    return at_least and (parameter.maximum is None or value <= parameter.maximum)


def _out_of_range(parameter: Parameter, value: Any, manifest: Manifest) -> str:
    if parameter.name == "label":
        return f"class {value}: this model has {manifest.model.num_classes} classes, {parameter.range_text}"
    if parameter.name == "seed":
        return f"seed: got {value}, expected 0 to 2**64 - 1"
    text = f"{parameter.name}: got {value}, expected {parameter.range_text}"
    if parameter.name == "top_k":
        return (
            f"top_k: got {value}, this bundle takes {parameter.range_text}; export with --max-top-k (0 for all "
            f"{manifest.model.vocab_size}) for more"
        )
    if parameter.name == "temperature":
        return f"{text} (for the likeliest token, use greedy)"
    return text


def _numbers(name: str, value: Any) -> NDArray[Any]:
    """The value as float32.

    Raises:
        RequestError: not numbers.
    """
    try:
        array = np.asarray(value)
        with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite: refused by who asks
            result = array.astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{name}: got {value!r}, expected numbers") from error
    if array.dtype.kind not in "iuf" and array.size:
        raise RequestError(f"{name}: got {value!r}, expected numbers")
    return result


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not re.search(VISIBLE, value):
        raise RequestError(f"{name}: got {value!r}, expected some text")
    try:
        value.encode()
    except UnicodeError as error:  # half of a surrogate pair, which JSON can say
        raise RequestError(f"{name}: is no text that can be encoded ({error})") from error


def _check_features(parameter: Parameter, value: Any) -> None:
    name, array = parameter.name, _numbers(parameter.name, value)
    if array.ndim != 2 or array.shape[1] != parameter.width:
        raise RequestError(
            f"{name}: got shape {list(array.shape)}, expected [tokens, {parameter.width}]: the features of the text "
            "encoder that this model was trained with"
        )
    if not _in_range(parameter, len(array)):
        raise RequestError(
            f"{name}: got {len(array)} tokens, this bundle takes {parameter.range_text}; shorten the prompt, or export "
            "with a larger --text-length"
        )
    if not np.isfinite(array).all():
        raise RequestError(f"{name}: expected finite numbers")


def requests_of(
    num_scales: int,
    conditions: Mapping[str, Any],
    seeds: int | Sequence[int] = 0,
    values: Mapping[str, Any] = MappingProxyType({}),
    noise: Mapping[int, NDArray[Any]] | None = None,
) -> list[Request]:
    """The requests of a call that names a list per parameter.

    Args:
        num_scales: of the schedule.
        conditions: parameter -> one per image, or None.
        seeds: one per image, or one for all: then image i gets seed + i.
        values: parameter -> one for all, one per image (None for the default), or an array [1 or N, scales].
        noise: scale -> [N, ...].

    Raises:
        RequestError: lists that do not fit together.
    """
    lists = {name: _listed(name, value) for name, value in conditions.items() if value is not None}
    if not lists:
        return [Request()]  # refused with what the bundle takes
    count = len(next(iter(lists.values())))
    for name, listed in lists.items():
        if len(listed) != count:
            raise RequestError(f"{_plural(name)}: got {len(listed)}, expected one per image ({count})")
    lists["seed"] = _seeds(seeds, count)
    for name, value in values.items():
        if value is not None:
            lists[name] = _per_image(name, value, count, num_scales)
    if noise is not None:
        for scale, rows in noise.items():
            if len(rows) != count:
                raise RequestError(f"noise[{scale}]: got {len(rows)} rows, expected one per image ({count})")
        lists["noise"] = [{scale: rows[i] for scale, rows in noise.items()} for i in range(count)]
    return [Request(**{name: listed[i] for name, listed in lists.items()}) for i in range(count)]


def _plural(name: str) -> str:
    return name if name.endswith("s") else f"{name}s"


_ONE_OF = {"integer": "whole number", "text": "text", "features": "array [tokens, width]"}


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray) or len(value) == 0:
        what = _ONE_OF[TABLE[name].kind]
        raise RequestError(f"{_plural(name)}: got {value!r}, expected a list of at least one {what}")
    return list(value)


def _seeds(seeds: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seeds, int | np.integer):
        return [int(seeds) + i for i in range(count)]
    if not isinstance(seeds, Sequence | np.ndarray) or not all(isinstance(seed, int | np.integer) for seed in seeds):
        raise RequestError(f"seeds: got {seeds!r}, expected whole numbers: one, or one per image")
    if len(seeds) != count:
        raise RequestError(f"seeds: got {len(seeds)}, expected one, or one per image ({count})")
    return [int(seed) for seed in seeds]


def _per_image(name: str, value: Any, count: int, num_scales: int) -> list[Any]:
    if TABLE[name].kind in ("image", "mask"):
        listed = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(listed) != count:
            raise RequestError(f"{name}: got {len(listed)}, expected one, or one per image ({count})")
        return listed
    if isinstance(value, list | tuple) and any(isinstance(row, list | tuple) for row in value):
        value = _numbers(name, value)  # rows of values per scale
    if isinstance(value, list | tuple):
        if len(value) == count:
            return list(value)
    elif not isinstance(value, np.ndarray) or value.ndim == 0:
        return [value] * count
    elif value.shape == (count,):
        return value.tolist()
    elif TABLE[name].per_scale and value.shape in ((1, num_scales), (count, num_scales)):
        return list(np.broadcast_to(value, (count, num_scales)))
    per_scale = f", or per image and scale ({count}, {num_scales})" if TABLE[name].per_scale else ""
    raise RequestError(f"{name}: got {np.shape(value)}, expected one value, one per image ({count}){per_scale}")


@dataclasses.dataclass(frozen=True)
class BatchInputs:
    """What a chain is given for one batch.

    Attributes:
        condition: inputs of the condition graph, each [B or B2, ...].
        request: the inputs of `GRAPH_INPUTS`: those per scale [B, scales], the others [B].
        noise: the role, of `NOISES`, and scale -> fp32 [B, ...].
        given: what is given in place of being drawn, by the names of the inputs, each [B, ...].
    """

    condition: dict[str, NDArray[Any]]
    request: dict[str, NDArray[Any]]
    noise: dict[tuple[names.Role, int], NDArray[Any]]
    given: dict[str, NDArray[Any]]


def batch_inputs(manifest: Manifest, variant: Variant, requests: Sequence[Request]) -> BatchInputs:
    """The inputs of as many requests as the chain takes; all checked, and prompts encoded.

    Args:
        manifest: of the bundle.
        variant: which chain.
        requests: of one batch; their number is its size.

    Raises:
        RequestError: given noise that does not fit.
    """
    num_scales = len(variant.schedule)
    known = parameters(manifest)

    def rows(parameter: Parameter) -> NDArray[Any]:
        own = known.get(parameter.name)
        default = 0 if own is None else own.default
        values = [getattr(request, parameter.name) for request in requests]
        filled = [default if value is None else value for value in values]
        if parameter.per_scale:
            filled = [np.broadcast_to(np.asarray(value, dtype=parameter.dtype), (num_scales,)) for value in filled]
        return np.array(filled, dtype=parameter.dtype)

    values = {name: rows(parameter) for name, parameter in GRAPH_INPUTS.items()}
    limit = manifest.sampling.max_top_k
    values["top_k"] = np.where((values["top_k"] < 1) | (values["top_k"] > limit), limit, values["top_k"])
    # At 1 the rounding of the cumulative sum would still cut the tail: 2 cuts nothing.
    values["top_p"] = np.where((values["top_p"] == 0) | (values["top_p"] == 1), np.float32(2), values["top_p"])
    conditions = {Condition.CLASS: _of_classes, Condition.TEXT: _of_text}
    return BatchInputs(
        conditions[manifest.model.condition](manifest, requests),
        values,
        _noise(variant, len(requests), requests),
        _given(variant, len(requests), requests),
    )


def _given(variant: Variant, batch: int, requests: Sequence[Request]) -> dict[str, NDArray[Any]]:
    """Zeros where nothing is given."""
    found = {}
    for graph in variant.chain(batch):
        for spec in graph.inputs:
            if spec.role is names.Role.GIVEN:
                dtype = np.dtype(spec.dtype)
                rows = [(request.given or {}).get(spec.name) for request in requests]
                blank = np.zeros(spec.shape[1:], dtype)
                found[spec.name] = np.stack([blank if row is None else row for row in rows])
    return found


def _of_classes(manifest: Manifest, requests: Sequence[Request]) -> dict[str, NDArray[Any]]:
    return {names.LABELS: np.array([request.label for request in requests], dtype=np.int64)}


def _of_text(manifest: Manifest, requests: Sequence[Request]) -> dict[str, NDArray[Any]]:
    """Features padded to the bundle's text length T, conditional rows first."""
    model, count = manifest.model, len(requests)
    features = np.zeros((2 * count, model.text_length, model.text_width), dtype=np.float32)
    lengths = np.zeros(2 * count, dtype=np.int64)
    negative = np.array([request.negative_text_features is not None for request in requests], dtype=np.bool_)
    for i, request in enumerate(requests):
        rows = {i: request.text_features, count + i: request.negative_text_features}
        for row, array in rows.items():
            if array is not None:
                features[row, : len(array)], lengths[row] = array, len(array)
        if model.context_tokens:
            for row, tokens in ((i, request.text_tokens), (count + i, request.negative_text_tokens)):
                lengths[row] = lengths[row] if tokens is None else tokens
        if not negative[i]:
            lengths[count + i] = lengths[i]  # the model's own text is as long as the prompt
    return {names.TEXT_FEATURES: features, names.TEXT_LENGTHS: lengths, names.NEGATIVE: negative}


def _noise(variant: Variant, batch: int, requests: Sequence[Request]) -> dict[tuple[names.Role, int], NDArray[Any]]:
    noise: dict[tuple[names.Role, int], NDArray[Any]] = {}
    for graph in variant.chain(batch):
        for spec in graph.inputs:
            if spec.role in _NOISES and spec.scale is not None:
                rows = [_noise_of(request, spec) for request in requests]
                noise[spec.role, spec.scale] = np.stack(rows)
    return noise


def _noise_of(request: Request, spec: TensorSpec) -> NDArray[Any]:
    scale, shape = spec.scale, spec.shape[1:]
    assert scale is not None
    name, draw = _NOISES[spec.role]
    given = getattr(request, name)
    if given is None:
        return draw(TABLE["seed"].minimum if request.seed is None else request.seed, scale, shape)
    if not isinstance(given, Mapping):
        raise RequestError(f"{name}: got {type(given).__name__}, expected arrays by scale")
    if scale not in given:
        raise RequestError(f"{name}: scale {scale} is missing")
    array = _numbers(f"{name}[{scale}]", given[scale])
    if array.shape != shape:
        raise RequestError(f"{name}[{scale}]: got shape {list(array.shape)}, expected {list(shape)}")
    if spec.role is names.Role.NOISE and not ((array >= 0) & (array < 1)).all():
        raise RequestError(f"{name}[{scale}]: got {array.min():g} to {array.max():g}, expected 0 to below 1")
    if not np.isfinite(array).all():
        raise RequestError(f"{name}[{scale}]: expected finite numbers")
    return array


def example_requests(manifest: Manifest, count: int, *, text_tokens: int = 1) -> list[Request]:
    """Requests that the bundle takes: of its first classes, or of random text features.

    Args:
        manifest: of the bundle.
        count: how many.
        text_tokens: of each text; as many as the bundle takes, where it takes fewer.
    """
    model = manifest.model
    if model.condition is Condition.CLASS:
        return [Request(label=i % model.num_classes, seed=i) for i in range(count)]
    shape = (min(text_tokens, model.text_length), model.text_width)
    rng = np.random.default_rng(0)
    features = [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]
    return [Request(text_features=array, seed=i) for i, array in enumerate(features)]
