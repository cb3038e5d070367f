"""How long work reports how far it is; a bar is the command line's."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, str, float], None]  # graph file, phase, share of its work that is done


def no_progress(graph: str, phase: str, share: float) -> None:
    """For callers that want none."""
