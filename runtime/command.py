"""What the commands share: errors become messages and exit codes, comma-separated options become tuples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from fastvar_trt.runtime.errors import FastVARError


class ErrorCommand(click.Command):
    """A command that shows our errors without a traceback and exits with their code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FastVARError as error:
            failure = click.ClickException(str(error))
            failure.exit_code = error.exit_code  # type: ignore[misc]  # click reads it from the instance
            raise failure from error


class _List(click.ParamType):
    def __init__(self, convert_part: Callable[[str], Any], name: str, kind: str) -> None:
        self._convert_part, self.name, self._kind = convert_part, name, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._convert_part(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"got {value!r}, expected {self._kind} separated by commas", param, ctx)


def integers() -> click.ParamType:
    """`1,4` -> (1, 4)."""
    return _List(int, "N,N,...", "whole numbers")


def numbers() -> click.ParamType:
    """`0.4,0.5` -> (0.4, 0.5)."""
    return _List(float, "X,X,...", "numbers")
