"""Checks of outputs before minutes of work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastvar_trt.runtime.errors import RequestError


def check_writable(*paths: Path | None) -> None:
    """That files can be written there; makes their folders. None: a file that is not asked for.

    Raises:
        RequestError: one cannot.
    """
    for path in paths:
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{path.parent}: cannot be made: {error.strerror}; give another output") from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise RequestError(f"{path}: cannot be written; give another output")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; it takes its place when the block ends well, and vanishes when not.

    Raises:
        RequestError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file.

    Raises:
        RequestError: it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
