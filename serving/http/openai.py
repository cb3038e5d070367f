"""OpenAI's images API, as far as its clients need it to draw and edit here.

`POST /v1/images/generations` (JSON), `POST /v1/images/edits` (a form with files), `GET /v1/models`. Pictures come as
base64 (`b64_json`). What has no meaning here (`quality`, `style`, `background`, `moderation`, `user`, ...) is accepted
and ignored; `seed`, `cfg`, `temperature`, `top_k`, `top_p`, `negative_prompt` and `keep_scales` are ours
(`extra_body` of the Python client).
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import UploadFile

from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.manifest import Condition, Manifest, Variant
from fastvar_trt.runtime.request import parameters
from fastvar_trt.runtime.service import ImageRequest
from fastvar_trt.serving.http.bodies import MAX_CFG, MAX_PROMPT, pictures_of
from fastvar_trt.serving.http.errors import openai_content
from fastvar_trt.serving.http.images import MEDIA_TYPES, encode_image, picture_text
from fastvar_trt.serving.http.requests import CLIENT_CLOSED_REQUEST, json_body

if TYPE_CHECKING:
    from fastvar_trt.serving.http.app import Drawing

GENERATIONS, EDITS, MODELS = "/v1/images/generations", "/v1/images/edits", "/v1/models"
OPENAI_PATHS = frozenset({GENERATIONS, EDITS, MODELS})
_OWN = ("seed", "cfg", "temperature", "top_k", "top_p", "negative_prompt", "keep_scales")
_QUALITY = 90  # of JPEG and WebP
_MAX_FILES = 16  # of a form
_SHOWN = 100  # characters of a value, in an error


class _ModelError(RequestError):
    """A model that is not there."""


class _ParamError(RequestError):
    """A value that is wrong."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


def openai_error(error: Exception, status: int, content: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and body of an error as OpenAI's API has them, of those of our own."""
    if isinstance(error, _ModelError):
        status = 404
    elif status == 422:
        status = 400
    return status, openai_content(status, content["error"]["message"], getattr(error, "param", None))


def add_openai(app: FastAPI, drawing: Drawing) -> None:
    """The paths."""

    @app.get(MODELS, include_in_schema=False)
    async def models() -> dict[str, Any]:
        """The names that requests may give as `model`."""
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "fastvar-trt"} for name in drawing.models.names
        ]
        return {"object": "list", "data": data}

    @app.post(GENERATIONS, include_in_schema=False)
    async def generations(request: Request) -> Response:
        """Pictures of a prompt."""
        await drawing.admit(request)
        values = await asyncio.to_thread(_object, await json_body(request))
        return await _answer(request, drawing, values, {})

    @app.post(EDITS, include_in_schema=False)
    async def edits(request: Request) -> Response:
        """Pictures made of one, where its mask is transparent."""
        await drawing.admit(request)
        kind = request.headers.get("content-type", "")
        if not kind.lower().startswith("multipart/form-data"):
            raise RequestError(f"content-type: got {kind!r}, expected multipart/form-data")
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):  # a browser says so
            raise RequestError("origin: a page of another site cannot edit here")
        values: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        async with request.form(max_files=_MAX_FILES) as form:
            for name, value in form.multi_items():
                key = name.removesuffix("[]")
                if not isinstance(value, UploadFile):
                    values[key] = value
                elif key in files:
                    raise _ParamError(key, "got several, expected one")
                else:
                    files[key] = await value.read()
        if "image" not in files:
            raise _ParamError("image", "is missing; send a file")
        return await _answer(request, drawing, values, files)


def _object(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"body: is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"body: got a JSON {type(values).__name__}, expected an object")
    return values


async def _answer(
    request: Request, drawing: Drawing, values: Mapping[str, Any], files: Mapping[str, bytes]
) -> Response:
    name = values.get("model")
    if name is not None and (not isinstance(name, str) or name not in drawing.models.names):
        raise _ModelError(f"the model {name!r} does not exist; this server has {', '.join(drawing.models.names)}")
    kind = _format(values)
    manifest = await asyncio.to_thread(drawing.models.manifest, name)  # what is refused makes no model load
    wanted = await asyncio.to_thread(_requests, drawing, manifest, values, files)
    async with drawing.using(name) as service:
        results = await drawing.drawn(request, service, wanted)
        if results is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

        def encoded(image: Any, own: ImageRequest) -> str:
            return base64.b64encode(encode_image(image, kind, _QUALITY, picture_text(manifest, own))).decode()

        pictures = [
            await asyncio.to_thread(encoded, result.image, own) for result, own in zip(results, wanted, strict=True)
        ]
    data = [{"b64_json": picture, "seed": own.seed} for picture, own in zip(pictures, wanted, strict=True)]
    return JSONResponse({"created": int(time.time()), "data": data, "output_format": kind})


def _format(values: Mapping[str, Any]) -> str:
    kind = values.get("output_format") or "png"
    if not isinstance(kind, str) or kind not in MEDIA_TYPES:
        raise _ParamError("output_format", f"got {kind!r}, expected one of {', '.join(MEDIA_TYPES)}")
    return kind


def _requests(
    drawing: Drawing, manifest: Manifest, values: Mapping[str, Any], files: Mapping[str, bytes]
) -> list[ImageRequest]:
    """What is drawn: `n` pictures, seeds counted on."""
    if values.get("response_format") not in (None, "b64_json"):
        raise _ParamError("response_format", f"got {values['response_format']!r}, expected b64_json")
    if str(values.get("stream") or "false").lower() != "false":
        raise _ParamError("stream", "pictures in the making are at /v1/images/stream")
    count = _integer("n", values.get("n"), 1)
    if not 1 <= count <= drawing.options.max_images:
        raise _ParamError("n", f"got {count}, expected 1 to {drawing.options.max_images}")
    variant = _size(manifest, values.get("size"))
    known = parameters(manifest)
    own: dict[str, Any] = {}
    for name in _OWN:
        value = values.get(name)
        if value is not None and value != "":
            if name not in known:
                raise _ParamError(name, "this bundle does not take it")
            own[name] = _value(name, known[name].kind, value)
    seed = own.pop("seed", secrets.randbits(32))
    own |= _subject(manifest, values.get("prompt"))
    if files:
        keeps = own.get("keep_scales") is not None
        own |= pictures_of(variant, files["image"], files.get("mask"), keeps_scales=keeps)
    deadline = drawing.options.max_deadline_s
    first = ImageRequest(**own, seed=seed, variant=variant.name, deadline_s=deadline)
    return [dataclasses.replace(first, seed=seed + i) for i in range(count)]


def _value(name: str, kind: str, value: Any) -> Any:
    """One of ours; forms have texts only."""
    if kind == "integer":
        return _integer(name, value, 0)
    if kind == "number":
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise _ParamError(name, f"got {value!r}, expected a number") from error
        if name == "cfg" and not abs(number) <= MAX_CFG:
            raise _ParamError(name, f"got {number:g}, expected {-MAX_CFG:g} to {MAX_CFG:g}")
        return number
    return _text(name, value) if isinstance(value, str) else value


def _text(name: str, text: str) -> str:
    if len(text) > MAX_PROMPT:
        raise _ParamError(name, f"got {len(text)} characters, expected at most {MAX_PROMPT}")
    return text


def _integer(name: str, value: Any, default: int) -> int:
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not re.fullmatch(r"-?[0-9]{1,20}", str(value)):
        raise _ParamError(name, f"got {str(value)[:_SHOWN]!r}, expected a whole number")
    return int(value)


def _size(manifest: Manifest, size: Any) -> Variant:
    if size in (None, "", "auto"):
        return manifest.default
    if not isinstance(size, str) or size not in manifest.sizes:
        raise _ParamError("size", f"got {size!r}, this model draws {', '.join(manifest.sizes)}")
    return manifest.sizes[size]


def _subject(manifest: Manifest, prompt: Any) -> dict[str, Any]:
    """Of a model of classes the prompt is a class index."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise _ParamError("prompt", f"got {prompt!r}, expected some text")
    _text("prompt", prompt)
    if manifest.model.condition is not Condition.CLASS:
        return {"prompt": prompt}
    if not re.fullmatch(r"[0-9]{1,9}", prompt.strip()):
        raise _ParamError("prompt", f"got {prompt[:_SHOWN]!r}; this model draws classes: give an index")
    return {"label": int(prompt)}
