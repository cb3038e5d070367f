"""Folders that appear whole or not at all: made beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, on the same file system; gone when the block ends, unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A random name: after a kill, a later process may have the same id and would meet what was left.
    folder = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; what was there is removed only once the new one is in place.

    Raises:
        OSError: the rename failed; `target` is what it was before.
    """
    previous = target.parent / f".{target.name}.previous-{uuid.uuid4().hex[:8]}"
    try:
        if os.path.lexists(target):
            target.rename(previous)
        folder.rename(target)
    except BaseException:
        if os.path.lexists(previous) and not os.path.lexists(target):
            previous.rename(target)
        raise
    if previous.is_symlink():
        previous.unlink()
    else:
        shutil.rmtree(previous, ignore_errors=True)
