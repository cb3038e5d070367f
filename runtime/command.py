"""What the commands share: errors become messages and exit codes, options become tuples or a way to load a bundle."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastvar_trt.runtime.backends import BACKENDS
from fastvar_trt.runtime.errors import FastVARError
from fastvar_trt.runtime.pipeline import Pipeline


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


@dataclasses.dataclass(frozen=True)
class RuntimeOptions:
    """Where and how a command runs a bundle: arguments of `Pipeline.load`."""

    backend: str
    device: str | None
    num_threads: int | None
    engines: str
    capture: bool | None

    def load(self, bundle: Path) -> Pipeline:
        """`Pipeline.load` with them."""
        return Pipeline.load(
            bundle,
            backend=self.backend,
            device=self.device,
            num_threads=self.num_threads,
            engines=self.engines,
            capture=self.capture,
        )


def runtime_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options; it gets them as `runtime: RuntimeOptions`."""

    @functools.wraps(command)
    def collected(
        *args: Any,
        backend: str,
        device: str | None,
        threads: int | None,
        engines: str,
        capture: bool | None,
        **others: Any,
    ) -> Any:
        return command(*args, runtime=RuntimeOptions(backend, device, threads, engines, capture), **others)

    result: Callable[..., Any] = collected
    for option in (
        click.option(
            "--engines",
            type=click.Choice(["auto", "off", "require"]),
            default="auto",
            show_default=True,
            help="Whether onnxruntime uses what `fastvar build --target cpu` made.",
        ),
        click.option("--threads", type=click.IntRange(1), help="Threads per operator; default: one per core."),
        click.option("--capture/--no-capture", default=None, help="On a GPU: run the chain as one CUDA graph."),
        click.option("--device", help="cpu, cuda or cuda:N; default: what the backend runs on."),
        click.option("--backend", type=click.Choice(BACKENDS), default=BACKENDS[0], show_default=True),
    ):
        result = option(result)
    return result
