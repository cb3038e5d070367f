"""Folders that appear whole or not at all: made beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fastvar_trt.runtime.errors import ExportError

_NAME_LENGTH = 8


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, on the same file system; gone when the block ends, unless it was renamed.

    What processes that were killed have left of the same target is cleared away, or put back, before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    # A random name: after a kill, a later process may have the same id and would meet what was left.
    name = uuid.uuid4().hex[:_NAME_LENGTH]
    folder, lock = _beside(target, "partial", name), _beside(target, "lock", name)
    try:
        with FileLock(lock):  # for as long as the folder is somebody's
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, option: str, check_free: Callable[[], object]) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        target: an absolute path.
        option: of the command line, for messages.
        check_free: raises where `target` is there and may not be replaced; called before the block and after it.

    Raises:
        ExportError: it cannot be written.
    """
    with disk_errors(option, target):
        recover(target)
        check_free()
        with temporary_folder(target) as folder:
            yield folder
            check_free()  # minutes have passed
            replace_folder(folder, target)


@contextlib.contextmanager
def disk_errors(option: str, target: Path) -> Iterator[None]:
    """What the disk refuses, as an `ExportError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExportError(f"{option} {target}: the disk is full: {error.strerror}; nothing was kept") from error
        raise ExportError(f"{option} {target}: cannot be written: {error}; nothing was kept") from error


def replace_folder(folder: Path, target: Path) -> None:
    """Rename a `temporary_folder` to `target`; what was there is removed only once the new one is in place.

    Raises:
        OSError: the rename failed; `target` is what it was before.
    """
    previous = _beside(target, "previous", folder.name[-_NAME_LENGTH:])
    try:
        if os.path.lexists(target):
            target.rename(previous)
        folder.rename(target)
    except BaseException:
        if os.path.lexists(previous) and not os.path.lexists(target):
            previous.rename(target)
        raise
    _remove(previous)


def recover(target: Path) -> None:
    """Clear away what killed processes have left beside `target`; a target that one was just replacing is put back."""
    kinds = ("partial", "previous", "lock")
    found = [path.name for kind in kinds for path in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*")]
    for name in {path[-_NAME_LENGTH:] for path in found}:
        folder, previous, lock = (_beside(target, kind, name) for kind in kinds)
        try:
            with FileLock(lock, timeout=0):
                if os.path.lexists(previous) and not os.path.lexists(target):
                    previous.rename(target)
                _remove(previous)
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:  # its process lives
            continue
        lock.unlink(missing_ok=True)


def _beside(target: Path, kind: str, name: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{name}"


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
