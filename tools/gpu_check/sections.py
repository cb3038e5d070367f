"""Parts of a check that run in processes of their own, so that one that hangs or crashes costs only itself."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.errors import UnavailableError

Results = list[dict[str, Any]]  # rows of a table; `ok` False: what was checked does not hold


@dataclasses.dataclass
class Section:
    """One part of the check: what it found, or why it was skipped, or how it failed.

    Attributes:
        name: for people.
        results: the rows.
        skipped: why it could not run on this machine.
        failed: how it failed.
        seconds: that it took.
    """

    name: str
    results: Results = dataclasses.field(default_factory=list)
    skipped: str = ""
    failed: str = ""
    seconds: float = 0.0


def run_section(name: str, check: Callable[[], Results], limit_s: float, *, isolate: bool = True) -> Section:
    """Run a part; what is not on this machine skips it, anything else fails it.

    Args:
        name: for people.
        check: the part; where it is isolated, a function that can be pickled.
        limit_s: after which it is ended, where it is isolated.
        isolate: run it in a process of its own.
    """
    begin = time.perf_counter()
    section = _isolated(name, check, limit_s) if isolate else _run(name, check)
    section.seconds = round(time.perf_counter() - begin, 1)
    return section


def _run(name: str, check: Callable[[], Results]) -> Section:
    section = Section(name)
    try:
        section.results = check()
    except UnavailableError as error:
        section.skipped = str(error)
    except Exception as error:  # one part must not keep the others from running
        section.failed = f"{type(error).__name__}: {error}"
    if any(not result.get("ok", True) for result in section.results):
        section.failed = "results differ, see the table"
    return section


def _isolated(name: str, check: Callable[[], Results], limit_s: float) -> Section:
    if limit_s <= 0:
        return Section(name, skipped="no time is left; give more --minutes")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "section.json"
        # Not forked: CUDA does not survive that.
        process = multiprocessing.get_context("spawn").Process(target=_child, args=(name, check, path))
        process.start()
        process.join(limit_s)
        if process.is_alive():
            process.kill()
            process.join()
            return Section(name, failed=f"took longer than {limit_s:.0f} s, and was ended")
        if not path.is_file():
            return Section(name, failed=f"its process ended with exit code {process.exitcode} and left no result")
        return Section(**json.loads(path.read_text(encoding="utf-8")))


def _child(name: str, check: Callable[[], Results], path: Path) -> None:
    section = _run(name, check)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(section)), encoding="utf-8")
    partial.replace(path)
