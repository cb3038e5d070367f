"""The bodies that the server takes: derived from what the served bundle takes, and so is their schema."""

from __future__ import annotations

import base64
import dataclasses
import functools
import secrets
import threading
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    create_model,
)

from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.manifest import Manifest, Variant
from fastvar_trt.runtime.pictures import check_same_size, fitted, fitted_mask, is_transparent, read_picture
from fastvar_trt.runtime.request import VISIBLE, Parameter, parameters
from fastvar_trt.runtime.service import ImageRequest

_DECODING = threading.Semaphore(2)  # pictures that are decoded at once: a small file may become half a gigabyte
MAX_PROMPT = 10_000  # characters; a bundle's limit in tokens is lower, and no schema can say it
MAX_CFG = 100.0  # far beyond what is of use; logits overflow much later, which would spoil a whole batch
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MAX_PREVIEWS = 64
_SUBJECT = "subject"  # what a picture is of: the type of that error
_MAX_PROBLEMS = 10  # that one answer tells
_MAX_NAME = 100  # characters of a field, in an answer
_SCHEMAS = "#/components/schemas/{model}"


class ImageBody(BaseModel):
    """A picture that is asked for; what is left out takes the bundle's default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = Field(90, ge=1, le=100, description="Of JPEG and WebP.")


@dataclasses.dataclass(frozen=True)
class Body:
    """What one path takes: a model per way to say what the picture is of."""

    models: Mapping[str, type[ImageBody]]  # by the parameter that says it

    @functools.cached_property
    def adapter(self) -> TypeAdapter[ImageBody]:
        """One model, or several told apart by the parameter that is there."""
        if len(self.models) == 1:
            return TypeAdapter(next(iter(self.models.values())))
        tagged = tuple(Annotated[model, Tag(name)] for name, model in self.models.items())
        choice = Discriminator(
            self._which,
            custom_error_type=_SUBJECT,
            custom_error_message=f"give one of {', '.join(self.models)}",
        )
        union: Any = Annotated[Union[tagged], choice]  # noqa: UP007  # of as many as there are
        return TypeAdapter(union)

    def _which(self, data: Any) -> str | None:
        given = [name for name in self.models if isinstance(data, Mapping) and data.get(name) is not None]
        return given[0] if len(given) == 1 else None

    def parse(self, content: bytes) -> ImageBody:
        """The body, validated.

        Raises:
            RequestError: it is no JSON, or not what the bundle takes.
        """
        try:
            return self.adapter.validate_json(content)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            told = [self._problem(problem) for problem in problems[:_MAX_PROBLEMS]]
            more = len(problems) - len(told)
            raise RequestError("; ".join([*told, *([f"and {more} more"] if more else [])])) from error

    def _problem(self, problem: Any) -> str:
        place = list(problem["loc"])
        if len(self.models) > 1 and place and place[0] in self.models:  # which of the models it is of
            place = place[1:]
        if problem["type"] == _SUBJECT and isinstance(problem["input"], Mapping):  # misspelt, maybe
            given = ", ".join(str(name)[:_MAX_NAME] for name in list(problem["input"])[:_MAX_PROBLEMS])
            return f"body: {problem['msg']}; got {given or 'nothing'}"
        where = ".".join(str(part)[:_MAX_NAME] for part in ("body", *place))
        return f"{where}: {problem['msg']}"


@dataclasses.dataclass(frozen=True)
class Bodies:
    """What can be asked of one bundle: a picture, or one with previews."""

    image: Body
    stream: Body
    manifest: Manifest

    def add_to_schema(self, schema: dict[str, Any], paths: Mapping[str, Body]) -> dict[str, Any]:
        """An OpenAPI schema with the bodies of its paths."""
        inputs: Any = [(path, "validation", body.adapter) for path, body in paths.items()]
        found, definitions = TypeAdapter.json_schemas(inputs, ref_template=_SCHEMAS)
        schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions.get("$defs", {}))
        for path in paths:
            content = {"application/json": {"schema": found[path, "validation"]}}
            schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        return schema


@functools.lru_cache(maxsize=8)
def _models(
    known: tuple[Parameter, ...],
    sizes: tuple[str, ...],
    preview_scales: tuple[int, ...],
    names: tuple[str, ...],
    max_deadline_s: float,
) -> tuple[Body, Body]:
    fields: dict[str, Any] = {p.name: _field(p) for p in known if not p.condition}
    size: Any = Literal[sizes]
    fields["size"] = (size | None, Field(sizes[0], description="Width x height in pixels."))
    name: Any = Literal[names]
    fields["model"] = (name | None, Field(names[0], description="Of the server's."))
    deadline = Field(max_deadline_s, gt=0, description="Seconds after which the picture is not wanted any more.")
    fields["deadline_s"] = (float | None, deadline)
    scale: Any = Literal[preview_scales] if preview_scales else int
    previews = Field(
        None,
        max_length=_MAX_PREVIEWS if preview_scales else 0,
        description="Scales after which a preview is decoded; default: three of them.",
    )
    with_previews = {"preview_scales": (list[scale] | None, previews)}
    subjects = [p for p in known if p.condition and not p.needs]

    def body(name: str, **more: Any) -> Body:
        models = {}
        for subject in subjects:
            own = {p.name: _field(p) for p in known if p.needs == subject.name}
            title = f"{name}Of{subject.name.title().replace('_', '')}" if len(subjects) > 1 else name
            every: Any = {subject.name: _field(subject, required=True), **own, **fields, **more}
            models[subject.name] = create_model(title, __base__=ImageBody, **every)
        return Body(models)

    return body("ImageBody"), body("StreamBody", **with_previews)


def bodies_of(manifest: Manifest, max_deadline_s: float, names: tuple[str, ...] = ("default",)) -> Bodies:
    """The bodies of a bundle: one way to say what a picture is of each, so that the schema tells them apart.

    Args:
        manifest: of the bundle.
        max_deadline_s: the default of deadlines; longer ones are cut.
        names: by which the server's models may be asked for.
    """
    sizes = tuple(manifest.sizes)
    known = tuple(parameters(manifest).values())
    scales = tuple(sorted(set().union(*(variant.preview_scales for variant in manifest.variants))))
    return Bodies(*_models(known, sizes, scales, names, max_deadline_s), manifest)


def _field(parameter: Parameter, *, required: bool = False) -> tuple[Any, Any]:
    kind = _KINDS[parameter.kind](parameter)
    if required:
        return kind, Field(..., description=parameter.description)
    return kind | None, Field(None, description=parameter.description)


def _number(parameter: Parameter) -> Any:
    low, high = parameter.minimum, parameter.maximum
    if parameter.name == "cfg":
        low, high = -MAX_CFG, MAX_CFG
    high = _MAX_FLOAT32 if high is None else high
    return Annotated[float, Field(ge=low, le=high)]


def _integer(parameter: Parameter) -> Any:
    return Annotated[int, Field(ge=parameter.minimum, le=parameter.maximum)]


def _features(parameter: Parameter) -> Any:
    number: Any = Annotated[float, Field(ge=-_MAX_FLOAT32, le=_MAX_FLOAT32)]
    row: Any = Annotated[list[number], Field(min_length=parameter.width, max_length=parameter.width)]
    least, most = int(parameter.minimum or 0), int(parameter.maximum or 0)
    return Annotated[list[row], Field(min_length=least, max_length=most)]


_File: Any = Annotated[str, Field(min_length=1, description="A picture's file as base64: PNG, JPEG, WebP, ...")]


def _text(parameter: Parameter) -> Any:
    # Something that can be seen; of negative prompts, which forms send empty, nothing is one as well.
    pattern = f"^$|{VISIBLE}" if parameter.needs else VISIBLE
    return Annotated[str, Field(max_length=MAX_PROMPT, pattern=pattern)]


_KINDS: Mapping[str, Any] = {
    "integer": _integer,
    "number": _number,
    "boolean": lambda parameter: bool,
    "text": _text,
    "features": _features,
    "image": lambda parameter: _File,
    "mask": lambda parameter: _File,
}


def _decoded(name: str, text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        return base64.b64decode(text.rpartition("base64,")[2], validate=True)  # data URLs, too
    except ValueError as error:
        raise RequestError(f"body.{name}: is no base64: {error}") from error


def pictures_of(
    variant: Variant, image: bytes | None, mask: bytes | None, *, keeps_scales: bool = False
) -> dict[str, Any]:
    """A picture and its mask, as requests have them, of the content of files.

    A picture that is partly transparent, and comes with neither a mask nor scales to keep, is its own: where it is
    transparent it is drawn, as OpenAI's API has it.

    Raises:
        RequestError: a file that is no picture, or a mask of another size.
    """
    found: dict[str, Any] = {}
    if image is None:
        return found
    size = variant.image_width, variant.image_height
    with _DECODING:
        picture = read_picture(image)
        found["image"] = fitted(picture, *size)
        if mask is not None:
            own = read_picture(mask, "mask")
            check_same_size(picture, own)
            found["mask"] = fitted_mask(own, *size)
        elif not keeps_scales and is_transparent(picture):
            found["mask"] = fitted_mask(picture, *size)
    return found


def _default_scales(allowed: tuple[int, ...]) -> tuple[int, ...]:
    """Three of the scales that have previews, evenly spread, the last of them included."""
    return tuple(sorted({allowed[(i * len(allowed) - 1) // 3] for i in (1, 2, 3)} if len(allowed) > 2 else allowed))


def to_request(body: ImageBody, manifest: Manifest) -> ImageRequest:
    """What the service draws; a seed that was left out is drawn.

    Raises:
        RequestError: a picture that is none.
    """
    fields = {field.name for field in dataclasses.fields(ImageRequest)}
    defaults = {name: field.default for name, field in type(body).model_fields.items()}
    filled = {name: defaults[name] if value is None else value for name, value in body}
    given = {name: value for name, value in filled.items() if name in fields and value is not None}
    for name in ("text_features", "negative_text_features"):
        if name in given:
            given[name] = np.array(given[name], dtype=np.float32)
    variant = manifest.sizes[filled["size"]]
    given["variant"] = variant.name
    if isinstance(given.get("image"), str):
        files = [_decoded(name, given.get(name)) for name in ("image", "mask")]
        given |= pictures_of(variant, *files, keeps_scales=given.get("keep_scales") is not None)
    given.setdefault("seed", secrets.randbits(32))
    if "preview_scales" in type(body).model_fields:
        given["preview_scales"] = tuple(given.get("preview_scales", _default_scales(variant.preview_scales)))
    given["deadline_s"] = min(given["deadline_s"], defaults["deadline_s"])
    return ImageRequest(**given)
