"""What the commands share: errors become messages and exit codes, options become values, long work shows a bar."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from fastvar_trt.export.models.family import ListParam
from fastvar_trt.runtime.backends import BACKENDS, DEFAULT_BACKEND, Backend, BackendOption, create_backend
from fastvar_trt.runtime.errors import FastVARError, UnavailableError
from fastvar_trt.runtime.pipeline import Pipeline

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
_WIDTH = 24  # of bars, characters
_EXAMPLE_WIDTH = 72  # of command lines in a help of 80 columns


class ErrorCommand(click.Command):
    """A command that shows our errors without a traceback and exits with their code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FastVARError as error:
            failure = click.ClickException(str(error))
            failure.exit_code = error.exit_code  # type: ignore[misc]  # click reads it from the instance
            raise failure from error


class ErrorGroup(click.Group):
    """A group of such commands."""

    command_class = ErrorCommand


def examples(*lines: str) -> str:
    """Command lines as the end of a command's help, broken to fit 80 columns."""
    return "\b\nExamples:\n" + "\n".join(f"  {row}" for line in lines for row in _broken(line))


def _broken(line: str) -> list[str]:
    """A command line as rows that a shell takes together; what is quoted stays whole."""
    word = r"""(?:[^\s'"]|'[^']*'|"[^"]*")+"""
    words = re.findall(rf"-\S+ (?!-){word}|{word}", line.replace("\\\n", " "))  # an option with its value
    rows = [words[0]]
    for word in words[1:]:
        if len(rows[-1]) + len(word) + 1 > _EXAMPLE_WIDTH:
            rows[-1] += " \\"
            rows.append(f"    {word}")
        else:
            rows[-1] += f" {word}"
    return rows


@contextmanager
def extras(names: str) -> Iterator[None]:
    """Around imports of what these extras bring, `export,cpu`.

    Raises:
        UnavailableError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name} is not installed; pip install 'fastvar-trt[{names}]'") from error


def integers() -> click.ParamType:
    """`1,4` -> (1, 4)."""
    return ListParam(int, "N,N,...", "whole numbers")


def numbers() -> click.ParamType:
    """`0.4,0.5` -> (0.4, 0.5)."""
    return ListParam(float, "X,X,...", "numbers")


@dataclasses.dataclass(frozen=True)
class RuntimeOptions:
    """Where and how a command runs a bundle: arguments of `Pipeline.load`."""

    backend: str
    device: str | None
    options: Mapping[str, Any]

    def load(self, bundle: Path) -> Pipeline:
        """`Pipeline.load` with them."""
        return Pipeline.load(bundle, backend=self.backend, device=self.device, **self.options)

    def profiling_backend(self) -> Backend:
        """A backend that takes the times of operators, which costs time itself."""
        return create_backend(self.backend, self.device, profile=True, **self.options)


def runtime_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of all backends; it gets them as `runtime: RuntimeOptions`."""
    own = {option.name: option for entry in BACKENDS.values() for option in entry.options}

    @functools.wraps(command)
    def collected(*args: Any, backend: str, device: str | None, **others: Any) -> Any:
        given = {name: value for name in own if (value := others.pop(name)) is not None}
        return command(*args, runtime=RuntimeOptions(backend, device, given), **others)

    result: Callable[..., Any] = collected
    for option in reversed(own.values()):
        result = _click_option(option)(result)
    result = click.option("--device", help="cpu, cuda or cuda:N; default: what the backend runs on.")(result)
    names = click.Choice(list(BACKENDS))
    return click.option("--backend", type=names, default=DEFAULT_BACKEND, show_default=True)(result)


def _click_option(option: BackendOption) -> Callable[..., Any]:
    flag = option.flag or f"--{option.name.replace('_', '-')}"
    if option.kind is bool:
        both = f"{flag}/--no-{flag.removeprefix('--')}"
        return click.option(both, option.name, default=None, help=option.description)
    kinds: Mapping[type, Any] = {int: click.IntRange(1), str: str}
    kind = click.Choice(option.choices) if option.choices else kinds[option.kind]
    return click.option(flag, option.name, type=kind, help=option.description)


class ProgressBar:
    """A bar per task, one after another, with the phase that it is in: a `progress` callback of the library."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task = ""

    def __call__(self, task: str, phase: str, share: float) -> None:
        """Show how far a task is; another one than before ends the line of that."""
        if task != self._task:
            self.close()
            self._task = task
            self._bar = click.progressbar(
                length=100, label=f"{task:<18}", item_show_func=lambda item: item, width=_WIDTH
            )
            self._bar.__enter__()
        # Phases may nest and repeat: the bar never goes back, and is full at the end only.
        ahead = 100 if phase == "done" else int(share * 99)
        self._bar.update(max(ahead - self._bar.pos, 0), phase)

    def close(self) -> None:
        """End the line of the current bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar, self._task = None, ""


@contextmanager
def progress_bars() -> Iterator[ProgressBar]:
    """Bars whose last line is ended, however the block ends."""
    bar = ProgressBar()
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def counting_bar(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many more of its items are done."""
    with click.progressbar(length=length, label=label, width=_WIDTH) as bar:
        yield bar.update
