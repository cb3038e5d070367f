"""What `fastvar serve` adds to uvicorn."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import uvicorn
from limits import RateLimitItem, parse_many

from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.models import Models

_LOG = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Ends services while uvicorn waits for its connections, so that every client gets an answer.

    Args:
        config: of uvicorn; its timeout_graceful_shutdown must be longer than drain_s.
        models: take no more requests when the server is told to stop.
        drain_s: what the requests that are there get; those that are left then are cancelled.
    """

    def __init__(self, config: uvicorn.Config, models: Models, drain_s: float) -> None:
        super().__init__(config)
        self._models, self._drain_s = models, drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with the services' end beside it."""
        ending: asyncio.Task[Any] = asyncio.create_task(asyncio.to_thread(self._end))
        await super().shutdown(sockets)
        await ending

    def _end(self) -> None:
        if not self._models.drain(self._drain_s):
            _LOG.warning("requests were still there after %g s, and are cancelled", self._drain_s)
        self._models.stop()


def parse_rate(text: str) -> RateLimitItem:
    """`60/minute`.

    Raises:
        RequestError: it is no rate, or several.
    """
    try:
        (rate,) = parse_many(text)
        if rate.amount < 1:
            raise ValueError("none is allowed")
    except ValueError as error:
        raise RequestError(f"--rate: got {text!r}, expected one as in 60/minute") from error
    return rate
