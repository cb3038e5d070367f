"""API keys: who may draw."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.serving.http.requests import path_of

_MIN_LENGTH = 16  # characters: shorter ones can be guessed
_OPEN = ("/", "/healthz", "/metrics", "/openapi.json")  # paths that are for all


class ApiKeys:
    """Some keys, of which a request must bring one."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Of equal length, and not the keys themselves: a comparison tells nothing of either.
        self._hashes = [_hash(key.encode()) for key in keys]

    @classmethod
    def from_file(cls, path: Path) -> ApiKeys:
        """A key a line; empty lines and those that begin with # do not count.

        Raises:
            RequestError: it cannot be read, has none, or one that is too short.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--api-key-file {path}: cannot be read: {error}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise RequestError(f"--api-key-file {path}: has no key; write one a line")
        for number, key in enumerate(keys, 1):
            if len(key) < _MIN_LENGTH:
                raise RequestError(
                    f"--api-key-file {path}: key {number} has {len(key)} characters, expected at least {_MIN_LENGTH}"
                )
        return cls(keys)

    def admit(self, scope: Any) -> bool:
        """Whether a request of ASGI may go on: it brings a key as `Authorization: Bearer KEY`, or needs none."""
        if path_of(scope) in _OPEN:
            return True
        header = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        given = _hash(key.strip())
        # All are compared, in the same time whichever it is.
        found = [secrets.compare_digest(given, own) for own in self._hashes]
        return scheme.lower() == b"bearer" and any(found)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
