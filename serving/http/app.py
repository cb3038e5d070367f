"""The HTTP server: one `Service` behind FastAPI.

| | |
|---|---|
| `POST /v1/images` | a picture: PNG, JPEG or WebP |
| `POST /v1/images/stream` | previews and the picture, as server-sent events |
| `GET /v1/model` | what the bundle holds |
| `GET /healthz`, `GET /metrics`, `GET /openapi.json` | for those who operate it |
| `GET /` | a page to try it |
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import metadata, resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from limits import RateLimitItem
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from prometheus_client import CollectorRegistry, Counter, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvar_trt.runtime.errors import CancelledError, FastVARError, OverloadedError, RequestError
from fastvar_trt.runtime.manifest import Manifest
from fastvar_trt.runtime.pipeline import Preview
from fastvar_trt.runtime.request import parameters
from fastvar_trt.runtime.service import ImageRequest, ImageResult, Service, Ticket
from fastvar_trt.serving.http.bodies import Bodies, Body, ImageBody, bodies_of, to_request
from fastvar_trt.serving.http.images import MEDIA_TYPES, encode_image
from fastvar_trt.serving.metrics import ServiceCollector

_LOG = logging.getLogger(__name__)
_CLIENT_CLOSED_REQUEST = 499  # as nginx calls it; nobody reads it but the metrics
_PREVIEW_QUALITY = 80  # of JPEG: previews are looked at for a moment
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (RequestError, 422),
    (OverloadedError, 503),
    (MemoryError, 503),
    (CancelledError, 504),
)
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src blob: data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Limits of the server.

    Attributes:
        max_body_bytes: of a request.
        max_deadline_s: longest deadline of a request, and the default.
        rate: requests for pictures per client address; None for no limit.
    """

    max_body_bytes: int = 4 << 20
    max_deadline_s: float = 120.0
    rate: RateLimitItem | None = None


def create_app(
    service: Service, options: ServerOptions | None = None, *, on_start: Callable[[], None] | None = None
) -> FastAPI:
    """The ASGI application. When it stops it closes the service and its pipeline.

    Args:
        service: what draws; the application takes it over.
        options: limits.
        on_start: called in the event loop's thread when the application starts.
    """
    options = options or ServerOptions()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if on_start is not None:
            on_start()
        yield
        await asyncio.to_thread(service.close)  # who serves the application has waited for the answers
        service.pipeline.close()

    version = metadata.version("fastvar-trt")
    # The pages /docs and /redoc load scripts from a CDN: the schema is enough.
    app = FastAPI(title="fastvar-trt", version=version, lifespan=lifespan, docs_url=None, redoc_url=None)
    registry = CollectorRegistry()
    registry.register(ServiceCollector(service))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    responses = Counter(
        "fastvar_http_responses", "Responses by path and status.", ["path", "status"], registry=registry
    )
    app.add_middleware(_Gatekeeper, max_body_bytes=options.max_body_bytes, responses=responses)
    _add_pictures(app, service, options)
    _add_status(app, service, registry)
    _add_errors(app)
    return app


def _add_pictures(app: FastAPI, service: Service, options: ServerOptions) -> None:
    """The paths that draw, and the schema of what they take."""
    limiter = MovingWindowRateLimiter(MemoryStorage())

    async def admit(request: Request) -> None:
        client = request.client.host if request.client else "unknown"
        if options.rate is not None and not await limiter.hit(options.rate, client):
            window = await limiter.get_window_stats(options.rate, client)
            raise _RateError(f"more than {options.rate} from {client}; try again later", window.reset_time)

    def bodies() -> Bodies:
        return bodies_of(service.pipeline.manifest, options.max_deadline_s)  # another bundle may have taken its place

    async def submit(
        body: ImageBody, on_preview: Callable[[Preview], None] | None = None
    ) -> tuple[Ticket, ImageRequest]:
        request = to_request(body)
        return await asyncio.to_thread(service.submit, request, on_preview), request  # prompts take a while to check

    @app.post(
        "/v1/images",
        response_class=Response,
        responses={
            200: {"description": "The picture.", "content": {kind: {} for kind in MEDIA_TYPES.values()}},
            **_ERROR_RESPONSES,
        },
    )
    async def images(request: Request) -> Response:
        """Draw one picture. Requests that arrive together share a batch, which does not change their pictures."""
        await admit(request)
        body = await _parsed(request, bodies().image)
        ticket, wanted = await submit(body)
        result = await _unless_gone(request, _result(ticket, wanted))
        if result is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        data = await asyncio.to_thread(encode_image, result.image, body.format, body.quality)
        return Response(data, media_type=MEDIA_TYPES[body.format], headers=_headers(result, wanted))

    @app.post(
        "/v1/images/stream",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Server-sent events: `preview` (scale, image), `image` (image, seed, total_ms, batch, "
                "warnings) or `error` (type, message); images are base64.",
                "content": {"text/event-stream": {}},
            },
            **_ERROR_RESPONSES,
        },
    )
    async def stream(request: Request) -> StreamingResponse:
        """Draw one picture, and show it in the making."""
        await admit(request)
        body = await _parsed(request, bodies().stream)
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Preview | None] = asyncio.Queue()

        def hand_over(preview: Preview) -> None:  # from the service's thread
            loop.call_soon_threadsafe(items.put_nowait, preview)

        ticket, wanted = await submit(body, hand_over)
        return StreamingResponse(_events(ticket, wanted, body, items), media_type="text/event-stream")

    def openapi() -> dict[str, Any]:
        """FastAPI's own schema, with the bodies that the bundle takes."""
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        known = bodies()
        return known.add_to_schema(schema, {"/v1/images": known.image, "/v1/images/stream": known.stream})

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _add_status(app: FastAPI, service: Service, registry: CollectorRegistry) -> None:
    """What is served and how it does, for people, load balancers and Prometheus."""

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """What is served: sizes, plan, defaults, the scales that have previews."""
        return _describe(service.pipeline.manifest)

    @app.get("/healthz", responses={503: {"description": "Draining, or broken."}})
    async def healthz() -> JSONResponse:
        """200 where pictures can be asked for."""
        found = service.metrics()
        healthy = service.healthy
        content = {"status": "ok" if healthy else "unavailable", "queued": found.queued, "running": found.running}
        return JSONResponse(content, 200 if healthy else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(registry), headers={"content-type": content_type})

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _CONTENT_SECURITY_POLICY})


def _add_errors(app: FastAPI) -> None:
    """Every error as JSON, with its status."""

    @app.exception_handler(Exception)
    @app.exception_handler(FastVARError)
    @app.exception_handler(MemoryError)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        status, content = _error(error)
        headers = {}
        if isinstance(error, _RateError):
            headers["retry-after"] = str(error.seconds)
        elif status == 503:
            headers["retry-after"] = "1"
        return JSONResponse(content, status, headers)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(_error_content("HTTPError", str(error.detail)), error.status_code, error.headers)


async def _parsed(request: Request, body: Body) -> ImageBody:
    """The body, validated; FastAPI takes one schema for good, and ours is that of the bundle which is served now.

    Raises:
        RequestError: it is no JSON, or not what the bundle takes.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site can send unasked is none
        raise RequestError(f"content-type: got {kind!r}, expected application/json")
    return await asyncio.to_thread(body.parse, await request.body())  # a large one takes a while


class _ErrorBody(BaseModel):
    """`type` is the name of the error's class in `fastvar_trt.runtime`."""

    type: str
    message: str


class ErrorResponse(BaseModel):
    """What every status of 400 and above carries."""

    error: _ErrorBody


_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        413: "The request is too large.",
        422: "A value is out of range.",
        429: "Too many requests from this client; see Retry-After.",
        500: "The backend failed.",
        503: "The queue is full, or the server stops; see Retry-After.",
        504: "The deadline has passed.",
    }.items()
}


class _RateError(OverloadedError):
    """More requests from one client than are allowed."""

    def __init__(self, message: str, reset_time: float) -> None:
        super().__init__(message)
        self.seconds = max(1, round(reset_time - time.time()))


class _Gatekeeper:
    """Reads bodies up to a limit, whatever length they declare, refuses larger ones, and counts responses."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, responses: Counter) -> None:
        self._app, self._max, self._responses = app, max_body_bytes, responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._responses.labels(_path(scope), message["status"]).inc()
            await send(message)

        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max:
                error = _error_content("RequestError", f"the body has more than {self._max} bytes")
                await JSONResponse(error, 413, {"connection": "close"})(scope, receive, counted)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await counted(message)

        try:
            await self._app(scope, replayed, noted)
        except Exception:
            if not started:  # answered further out, by Starlette
                self._responses.labels(_path(scope), 500).inc()
            raise


def _path(scope: Scope) -> str:
    """The path of the route, of which there are few; clients can think of many others."""
    return str(getattr(scope.get("route"), "path", "other"))


async def _unless_gone(request: Request, result: Coroutine[Any, Any, ImageResult]) -> ImageResult | None:
    """The result; where the client goes before, the request is given up, and None."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    drawing, leaving = asyncio.ensure_future(result), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return drawing.result() if drawing.done() else None
    finally:
        for task in (drawing, leaving):
            task.cancel()


async def _result(ticket: Ticket, wanted: ImageRequest) -> ImageResult:
    """The result of a request; to cancel this gives the request up.

    Raises:
        CancelledError: the deadline has passed, be it in the queue.
    """
    try:
        async with asyncio.timeout(wanted.deadline_s):
            return await ticket
    except TimeoutError as error:
        raise CancelledError(f"the deadline of {wanted.deadline_s:g} s has passed") from error


async def _events(
    ticket: Ticket, wanted: ImageRequest, body: ImageBody, items: asyncio.Queue[Preview | None]
) -> AsyncIterator[str]:
    """Server-sent events; the server closes this iterator when the client goes, which gives the request up."""
    drawing = asyncio.ensure_future(_result(ticket, wanted))
    drawing.add_done_callback(lambda _: items.put_nowait(None))
    try:
        while (preview := await items.get()) is not None:
            data = await _encoded(preview.images[0], "jpeg", _PREVIEW_QUALITY)
            yield _event("preview", {"scale": preview.scale, "image": data})
        try:
            result = drawing.result()
        except Exception as error:
            yield _event("error", _error(error)[1]["error"])
            return
        data = await _encoded(result.image, body.format, body.quality)
        details = {
            "image": data,
            "seed": wanted.seed,
            "total_ms": round(result.total_ms, 1),
            "batch": result.batch,
            "warnings": list(result.warnings),
        }
        yield _event("image", details)
    finally:
        drawing.cancel()


async def _encoded(image: Any, kind: str, quality: int) -> dict[str, str]:
    data = await asyncio.to_thread(encode_image, image, kind, quality)
    return {"media_type": MEDIA_TYPES[kind], "base64": base64.b64encode(data).decode()}


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _headers(result: ImageResult, wanted: ImageRequest) -> dict[str, str]:
    return {
        "x-fastvar-seed": str(wanted.seed),
        "x-fastvar-queued-ms": f"{result.queued_ms:.1f}",
        "x-fastvar-total-ms": f"{result.total_ms:.1f}",
        "x-fastvar-batch": str(result.batch),
        **({"x-fastvar-warning": "; ".join(result.warnings)} if result.warnings else {}),
    }


def _error_content(kind: str, message: str) -> dict[str, dict[str, str]]:
    return {"error": {"type": kind, "message": message}}


def _error(error: Exception) -> tuple[int, dict[str, dict[str, str]]]:
    """Status and body; what we did not foresee is logged, and says nothing of our insides."""
    if isinstance(error, _RateError):
        return 429, _error_content("OverloadedError", str(error))
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    if status >= 500 and not isinstance(error, OverloadedError | CancelledError):
        _LOG.error("a request failed", exc_info=error)
    if isinstance(error, MemoryError):
        return status, _error_content("MemoryError", "out of memory; try again later")
    if isinstance(error, FastVARError):
        return status, _error_content(type(error).__name__, str(error))
    return status, _error_content("InternalError", "the server failed; see its log")


def _describe(manifest: Manifest) -> dict[str, Any]:
    model, variant = manifest.model, manifest.default
    known = parameters(manifest)
    return {
        "family": model.family,
        "takes": [name for name, parameter in known.items() if parameter.condition and not parameter.needs],
        "parameters": [dataclasses.asdict(parameter) for parameter in known.values()],
        "num_classes": model.num_classes,
        "text_length": model.text_length,
        "width": variant.image_width,
        "height": variant.image_height,
        "precision": manifest.precision,
        "plan": variant.plan.name,
        "batches": list(manifest.batches),
        "scales": [list(size) for size in variant.schedule],
        "preview_scales": list(manifest.preview_scales),
        "sampling": dataclasses.asdict(manifest.sampling),
    }
