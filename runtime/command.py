"""What the commands share: errors become messages and exit codes, comma-separated options become tuples."""

from __future__ import annotations

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


class Integers(click.ParamType):
    """`1,4` -> (1, 4)."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"got {value!r}, expected whole numbers separated by commas, as in 1,4", param, ctx)
