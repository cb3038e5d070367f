"""Errors as answers: our own form, and OpenAI's on the paths that its clients ask."""

from __future__ import annotations

import logging
import time
from typing import Any

from pydantic import BaseModel

from fastvar_trt.runtime.errors import CancelledError, FastVARError, OutOfMemoryError, OverloadedError, RequestError

_LOG = logging.getLogger(__name__)
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (RequestError, 422),
    (OverloadedError, 503),
    (MemoryError, 503),
    (OutOfMemoryError, 503),
    (CancelledError, 504),
)


class RateError(OverloadedError):
    """More requests from one client than are allowed."""

    def __init__(self, message: str, reset_time: float) -> None:
        super().__init__(message)
        self.seconds = max(1, round(reset_time - time.time()))


class _ErrorBody(BaseModel):
    """`type` is the name of the error's class: of `fastvar_trt.runtime`, or one of the server's own."""

    type: str
    message: str


class ErrorResponse(BaseModel):
    """What every status of 400 and above carries."""

    error: _ErrorBody


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        401: "The API key is missing or wrong, where the server has any.",
        413: "The request is too large.",
        422: "A value is out of range.",
        429: "Too many requests from this client; see Retry-After.",
        500: "The backend failed.",
        503: "The queue is full, or the server stops; see Retry-After.",
        504: "The deadline has passed.",
    }.items()
}


def error_content(kind: str, message: str) -> dict[str, dict[str, Any]]:
    """The body of an error."""
    return {"error": {"type": kind, "message": message}}


def error_answer(error: Exception) -> tuple[int, dict[str, dict[str, Any]]]:
    """Status and body; what we did not foresee is logged, and says nothing of our insides."""
    if isinstance(error, RateError):
        return 429, error_content("OverloadedError", str(error))
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    if status >= 500 and not isinstance(error, OverloadedError | CancelledError):
        _LOG.error("a request failed", exc_info=error)
    if isinstance(error, MemoryError):
        return status, error_content("MemoryError", "out of memory; try again later")
    if isinstance(error, FastVARError):
        return status, error_content(type(error).__name__, str(error))
    return status, error_content("InternalError", "the server failed; see its log")


def retry_after(error: Exception, status: int) -> dict[str, str]:
    """When to try again, where that is of use."""
    if isinstance(error, RateError):
        return {"retry-after": str(error.seconds)}
    return {"retry-after": "1"} if status == 503 else {}


# OpenAI's types and codes by status.
_OPENAI = {
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "model_not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("server_error", "overloaded"),
    504: ("server_error", "timeout"),
}


def openai_content(status: int, message: str, param: str | None = None) -> dict[str, dict[str, Any]]:
    """The body of an error as OpenAI's API has it."""
    kind, code = _OPENAI.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
