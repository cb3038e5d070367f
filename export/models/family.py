"""What the exporter asks of a family of models. Imports neither torch nor onnx: commands show their help without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from fastvar_trt.runtime.plan import PruningPlan
from fastvar_trt.runtime.precision import Precision

if TYPE_CHECKING:
    from fastvar_trt.export.models.base import NextScaleModel
    from fastvar_trt.export.models.source import Source


@dataclasses.dataclass(frozen=True)
class SourceCommand:
    """A command of `fastvar-export`: one way to get a model of a family.

    Attributes:
        name: of the command.
        description: for its help.
        examples: command lines.
        options: its own, besides those that all have.
        load: their values, by name, to the model to export.
        default_plan: their values to the preset that is taken where no plan is asked for.
        sizes: their values to those of every size that is asked for, the default one first.
        top_k: what the graphs bound top-k by unless asked for another, as published; 0 where the model draws from no
            vocabulary.
    """

    name: str
    description: str
    examples: tuple[str, ...]
    options: tuple[click.Option, ...]
    load: Callable[..., Source]
    default_plan: Callable[..., str]
    top_k: int
    sizes: Callable[..., list[dict[str, Any]]] = lambda **own: [own]


class ListParam(click.ParamType):
    """Values separated by commas, as a tuple.

    Args:
        convert_part: of the text of one; raises ValueError.
        name: of the parameter in a command's help.
        kind: what is expected, in words.
    """

    def __init__(self, convert_part: Callable[[str], Any], name: str, kind: str) -> None:
        self._convert_part, self.name, self._kind = convert_part, name, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """`1,4` -> (1, 4)."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._convert_part(part) for part in str(value).split(","))
        except (ValueError, ZeroDivisionError):
            self.fail(f"got {value!r}, expected {self._kind} separated by commas", param, ctx)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models: a folder of `export.models`, and a line in `export.models.registry`.

    Attributes:
        name: in manifests.
        commands: the ways to get a model.
        from_configs: a manifest's `configs` and precision to the model, without weights; raises KeyError or TypeError
            where they are not complete.
        presets: pruning plans that were made for it.
        matrices: exceptions from formats of few bits, as in `Precision.matrices`: what they cannot hold, or do not pay
            for.
    """

    name: str
    commands: tuple[SourceCommand, ...]
    from_configs: Callable[[Mapping[str, Any], Precision], NextScaleModel]
    presets: tuple[PruningPlan, ...]
    matrices: tuple[tuple[str, str], ...] = ()
