"""What all paths ask of a request."""

from __future__ import annotations

from fastapi import Request
from starlette.types import Scope

from fastvar_trt.runtime.errors import RequestError

CLIENT_CLOSED_REQUEST = 499  # as nginx calls it; nobody reads it but the metrics


def path_of(scope: Scope) -> str:
    """The path, without the prefix under which the application is mounted."""
    return str(scope["path"].removeprefix(scope.get("root_path", "")))


async def json_body(request: Request) -> bytes:
    """The body of a request that says that it is JSON.

    Raises:
        RequestError: it says something else, as what a page of another site can send unasked does.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"content-type: got {kind!r}, expected application/json")
    return await request.body()
