"""The HTTP server: one or several `Service`s behind FastAPI.

| | |
|---|---|
| `POST /v1/images` | a picture: PNG, JPEG or WebP |
| `POST /v1/images/stream` | previews and the picture, as server-sent events |
| `POST /v1/images/generations`, `/v1/images/edits`, `GET /v1/models` | OpenAI's API: see `openai` |
| `GET /v1/model` | what a bundle holds |
| `GET /healthz`, `GET /metrics`, `GET /openapi.json` | for those who operate it |
| `GET /` | a page to try it |
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvar_trt.runtime.errors import CancelledError, FastVARError
from fastvar_trt.runtime.manifest import Manifest
from fastvar_trt.runtime.models import Models
from fastvar_trt.runtime.pipeline import Preview
from fastvar_trt.runtime.request import parameters
from fastvar_trt.runtime.service import ImageRequest, ImageResult, Service, Ticket
from fastvar_trt.serving.http.bodies import Bodies, Body, ImageBody, bodies_of, to_request
from fastvar_trt.serving.http.errors import (
    ERROR_RESPONSES,
    RateError,
    error_answer,
    error_content,
    openai_content,
    retry_after,
)
from fastvar_trt.serving.http.images import MEDIA_TYPES, encode_image, picture_text
from fastvar_trt.serving.http.keys import ApiKeys
from fastvar_trt.serving.http.openai import OPENAI_PATHS, add_openai, openai_error
from fastvar_trt.serving.http.requests import CLIENT_CLOSED_REQUEST, json_body, path_of
from fastvar_trt.serving.metrics import ServiceCollector

_NO_KEY = "no valid API key; send one as `Authorization: Bearer KEY`"
_PREVIEW_QUALITY = 80  # of JPEG: previews are looked at for a moment
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
        keys: one of which requests of `/v1` must bring; None: nobody is asked.
        max_images: of one request of OpenAI's API.
    """

    max_body_bytes: int = 16 << 20
    max_deadline_s: float = 120.0
    rate: RateLimitItem | None = None
    keys: ApiKeys | None = None
    max_images: int = 10


def create_app(
    served: Service | Models, options: ServerOptions | None = None, *, on_start: Callable[[], None] | None = None
) -> FastAPI:
    """The ASGI application. When it stops it closes the services and their pipelines.

    Args:
        served: what draws; the application takes it over.
        options: limits.
        on_start: called in the event loop's thread when the application starts.
    """
    options = options or ServerOptions()
    models = Models.of(served) if isinstance(served, Service) else served

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if on_start is not None:
            on_start()
        yield
        await asyncio.to_thread(models.close)  # who serves the application has waited for the answers

    version = metadata.version("fastvar-trt")
    # The pages /docs and /redoc load scripts from a CDN: the schema is enough.
    app = FastAPI(title="fastvar-trt", version=version, lifespan=lifespan, docs_url=None, redoc_url=None)
    registry = CollectorRegistry()
    registry.register(ServiceCollector(models))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    responses = Counter(
        "fastvar_http_responses", "Responses by path and status.", ["path", "status"], registry=registry
    )
    app.add_middleware(_Gatekeeper, max_body_bytes=options.max_body_bytes, responses=responses, keys=options.keys)
    drawing = Drawing(models, options)
    _add_pictures(app, drawing)
    add_openai(app, drawing)
    _add_status(app, models, registry)
    _add_errors(app)
    return app


class Drawing:
    """What all paths that draw share: who may ask, which model draws, and who waits for it.

    Attributes:
        models: what draws.
        options: limits.
    """

    def __init__(self, models: Models, options: ServerOptions) -> None:
        self.models, self.options = models, options
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="fastvar-load")

    async def admit(self, request: Request) -> None:
        """That a client has not asked too often.

        Raises:
            RateError: it has.
        """
        client, rate = request.client.host if request.client else "unknown", self.options.rate
        if rate is not None and not await self._limiter.hit(rate, client):
            window = await self._limiter.get_window_stats(rate, client)
            raise RateError(f"more than {rate} from {client}; try again later", window.reset_time)

    @asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Service]:
        """The service of a model, loaded."""
        service = await self.acquire(name)
        try:
            yield service
        finally:
            self.models.release(name)

    async def acquire(self, name: str | None) -> Service:
        """`Models.acquire`; those that have to be loaded wait in a thread of their own, which holds nothing else up."""
        service = self.models.acquire_loaded(name)
        if service is not None:
            return service
        return await asyncio.get_running_loop().run_in_executor(self._loader, self.models.acquire, name)

    async def drawn(self, request: Request, service: Service, wanted: list[ImageRequest]) -> list[ImageResult] | None:
        """The pictures, in order; where the client goes before, or one fails, all are given up; for the first: None."""
        tickets: list[Ticket] = []
        try:
            for each in wanted:
                tickets.append(await asyncio.to_thread(service.submit, each))  # prompts take a while to check
            results = (result_of(ticket, each) for ticket, each in zip(tickets, wanted, strict=True))
            return await unless_gone(request, _all(*results))
        finally:
            for ticket in tickets:
                ticket.cancel()  # which does nothing to those that are done

    def bodies(self, name: str | None) -> Bodies:
        """Of the bundle that is served now: another one may have taken its place."""
        return bodies_of(self.models.manifest(name), self.options.max_deadline_s, self.models.names)


class _EventStream(StreamingResponse):
    """Server-sent events; `finish` is called when the answer has ended, be it before the first event."""

    def __init__(self, events: AsyncIterator[str], finish: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._finish()


async def _all(*results: Awaitable[ImageResult]) -> list[ImageResult]:
    return await asyncio.gather(*results)


def _add_pictures(app: FastAPI, drawing: Drawing) -> None:
    """The paths that draw, and the schema of what they take."""

    @app.post(
        "/v1/images",
        response_class=Response,
        responses={
            200: {"description": "The picture.", "content": {kind: {} for kind in MEDIA_TYPES.values()}},
            **ERROR_RESPONSES,
        },
    )
    async def images(request: Request) -> Response:
        """Draw one picture. Requests that arrive together share a batch, which does not change their pictures."""
        await drawing.admit(request)
        name, content = await _named(request)
        bodies = await asyncio.to_thread(drawing.bodies, name)  # what is refused makes no model load
        body, wanted = await asyncio.to_thread(_parsed, content, bodies.image, bodies.manifest)
        async with drawing.using(name) as service:
            results = await drawing.drawn(request, service, [wanted])
            if results is None:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            text = picture_text(bodies.manifest, wanted)
            data = await asyncio.to_thread(encode_image, results[0].image, body.format, body.quality, text)
            return Response(data, media_type=MEDIA_TYPES[body.format], headers=_headers(results[0], wanted))

    @app.post(
        "/v1/images/stream",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Server-sent events: `preview` (scale, image), `image` (image, seed, total_ms, batch, "
                "warnings) or `error` (type, message); images are base64.",
                "content": {"text/event-stream": {}},
            },
            **ERROR_RESPONSES,
        },
    )
    async def stream(request: Request) -> StreamingResponse:
        """Draw one picture, and show it in the making."""
        await drawing.admit(request)
        name, content = await _named(request)
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Preview | None] = asyncio.Queue()

        def hand_over(preview: Preview) -> None:  # from the service's thread
            loop.call_soon_threadsafe(items.put_nowait, preview)

        bodies = await asyncio.to_thread(drawing.bodies, name)
        body, wanted = await asyncio.to_thread(_parsed, content, bodies.stream, bodies.manifest)
        service = await drawing.acquire(name)
        try:
            ticket = await asyncio.to_thread(service.submit, wanted, hand_over)
        except BaseException:
            drawing.models.release(name)
            raise

        def finish() -> None:
            ticket.cancel()
            drawing.models.release(name)

        return _EventStream(_events(ticket, wanted, body, items, bodies.manifest), finish)

    def openapi() -> dict[str, Any]:
        """FastAPI's own schema, with the bodies that the bundle takes."""
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        known = drawing.bodies(None)
        return known.add_to_schema(schema, {"/v1/images": known.image, "/v1/images/stream": known.stream})

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _add_status(app: FastAPI, models: Models, registry: CollectorRegistry) -> None:
    """What is served and how it does, for people, load balancers and Prometheus."""

    @app.get("/v1/model")
    async def model(name: str | None = None) -> dict[str, Any]:
        """What a model of the server, by default the first, holds: sizes, plan, defaults, scales that have previews."""

        return _describe(await asyncio.to_thread(models.manifest, name), models.names)

    @app.get("/healthz", responses={503: {"description": "Draining, or broken."}})
    async def healthz() -> JSONResponse:
        """200 where pictures can be asked for."""
        services = list(models.loaded.values())
        found = [service.metrics() for service in services]
        healthy = all(service.healthy for service in services)
        content = {
            "status": "ok" if healthy else "unavailable",
            "queued": sum(own.queued for own in found),
            "running": sum(own.running for own in found),
        }
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
        status, content = error_answer(error)
        headers = retry_after(error, status)
        if path_of(request.scope) in OPENAI_PATHS:
            status, content = openai_error(error, status, content)
        return JSONResponse(content, status, headers)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        status, content = error.status_code, error_content("HTTPError", str(error.detail))
        if path_of(request.scope) in OPENAI_PATHS:
            content = openai_content(status, str(error.detail))
        return JSONResponse(content, status, error.headers)


async def _named(request: Request) -> tuple[str | None, bytes]:
    """The model that a body of JSON asks for, and the body.

    Raises:
        RequestError: it is of another type.
    """
    content = await json_body(request)
    return await asyncio.to_thread(_model_of, content), content  # a large one takes a while


def _model_of(content: bytes) -> str | None:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):  # refused with what the bundle takes
        return None
    name = data.get("model") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def _parsed(content: bytes, body: Body, manifest: Manifest) -> tuple[ImageBody, ImageRequest]:
    """The body, validated, and what is drawn; FastAPI takes one schema for good, and ours is that of the bundle that is
    served now.

    Raises:
        RequestError: it is no JSON, or not what the bundle takes.
    """
    parsed = body.parse(content)
    return parsed, to_request(parsed, manifest)


class _Gatekeeper:
    """Asks for keys, reads bodies up to a limit, whatever length they declare, refuses larger ones, and counts
    responses."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, responses: Counter, keys: ApiKeys | None) -> None:
        self._app, self._max, self._responses, self._keys = app, max_body_bytes, responses, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._responses.labels(_path(scope), message["status"]).inc()
            await send(message)

        if self._keys is not None and not self._keys.admit(scope):  # before anything of the body is read
            headers = {"www-authenticate": "Bearer", "connection": "close"}
            await JSONResponse(_refusal(scope, 401, _NO_KEY), 401, headers)(scope, receive, counted)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max:
                error = _refusal(scope, 413, f"the body has more than {self._max} bytes")
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


def _refusal(scope: Scope, status: int, message: str) -> dict[str, Any]:
    """An error that no path of ours has raised."""
    kind = "AuthenticationError" if status == 401 else "RequestError"
    return openai_content(status, message) if path_of(scope) in OPENAI_PATHS else error_content(kind, message)


def _path(scope: Scope) -> str:
    """The path of the route, of which there are few; clients can think of many others."""
    return str(getattr(scope.get("route"), "path", "other"))


async def unless_gone(request: Request, result: Coroutine[Any, Any, list[ImageResult]]) -> list[ImageResult] | None:
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


async def result_of(ticket: Ticket, wanted: ImageRequest) -> ImageResult:
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
    ticket: Ticket, wanted: ImageRequest, body: ImageBody, items: asyncio.Queue[Preview | None], manifest: Manifest
) -> AsyncIterator[str]:
    """Server-sent events; the server closes this iterator when the client goes, which gives the request up."""
    drawing = asyncio.ensure_future(result_of(ticket, wanted))
    drawing.add_done_callback(lambda _: items.put_nowait(None))
    try:
        while (preview := await items.get()) is not None:
            data = await _encoded(preview.images[0], "jpeg", _PREVIEW_QUALITY)
            yield _event("preview", {"scale": preview.scale, "image": data})
        try:
            result = drawing.result()
        except Exception as error:
            yield _event("error", error_answer(error)[1]["error"])
            return
        data = await _encoded(result.image, body.format, body.quality, picture_text(manifest, wanted))
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


async def _encoded(image: Any, kind: str, quality: int, text: Mapping[str, str] | None = None) -> dict[str, str]:
    data = await asyncio.to_thread(encode_image, image, kind, quality, text)
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


def _describe(manifest: Manifest, names: tuple[str, ...]) -> dict[str, Any]:
    model, variant = manifest.model, manifest.default
    known = parameters(manifest)
    return {
        "models": list(names),
        "family": model.family,
        "takes": [name for name, parameter in known.items() if parameter.condition and not parameter.needs],
        "parameters": [dataclasses.asdict(parameter) for parameter in known.values()],
        "num_classes": model.num_classes,
        "text_length": model.text_length,
        "width": variant.image_width,
        "height": variant.image_height,
        "sizes": list(manifest.sizes),
        "edits": variant.takes_pictures,
        "examples": list(manifest.examples),
        "precision": manifest.precision,
        "plan": variant.plan.name,
        "batches": list(manifest.batches),
        "scales": [list(size) for size in variant.schedule],
        "preview_scales": list(manifest.preview_scales),
        "sampling": dataclasses.asdict(manifest.sampling),
    }
