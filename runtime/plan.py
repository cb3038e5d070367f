"""Pruning plans: which tokens are computed at which scale and layer (FastVAR, arXiv 2503.23367).

A `PruningPlan` is what a user writes; scales are named by their place in the schedule, negative from the
end, so one plan fits any resolution and aspect ratio. `PruningPlan.resolve` checks it against a model's
schedule and gives the `ResolvedPlan` that the exporter and the runtime work with.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.errors import PlanError

SCORES = ("mse_to_mean",)


@dataclasses.dataclass(frozen=True)
class ResolvedPlan:
    """A plan in absolute terms: what each step of one model computes."""

    schedule: tuple[tuple[int, int], ...]  # (height, width) of every scale, skipped ones included
    depth: int  # layers of the model
    num_kept: tuple[int, ...]  # K per scale in a pruned layer; L where nothing is pruned, 0 where skipped
    cache_scale: int | None  # scale whose sublayer outputs are cached; None where no scale is pruned
    first_layer: int
    last_layer: int  # inclusive

    def num_tokens(self, scale: int) -> int:
        """L, the tokens of the map at `scale`."""
        height, width = self.schedule[scale]
        return height * width

    @property
    def steps(self) -> tuple[int, ...]:
        """The scales that run, in order."""
        return tuple(k for k in range(len(self.schedule)) if self.num_kept[k] > 0)

    def is_pruned(self, scale: int) -> bool:
        """True where some layer of the step computes a part of the tokens only."""
        return 0 < self.num_kept[scale] < self.num_tokens(scale)

    def prunes(self, scale: int, layer: int) -> bool:
        """True where this layer of this step computes a part of the tokens only."""
        return self.is_pruned(scale) and self.first_layer <= layer <= self.last_layer

    def kept(self, scale: int, layer: int) -> int:
        """K, the tokens that `layer` computes at `scale`, and so the keys that it adds."""
        return self.num_kept[scale] if self.prunes(scale, layer) else self.num_tokens(scale)

    def writes_cache(self, scale: int, layer: int) -> bool:
        """True where the layer's sublayer outputs are kept for the pruned scales."""
        return scale == self.cache_scale and self.first_layer <= layer <= self.last_layer

    def num_past(self, scale: int, layer: int) -> int:
        """S, the keys that `layer` has kept before `scale`."""
        return sum(self.kept(k, layer) for k in self.steps if k < scale)


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """What to prune, as a user states it.

    Attributes:
        name: preset name or the stem of the file it came from.
        fractions: (scale, fraction pruned) pairs; a negative scale counts from the end of the schedule;
            a fraction of 1 skips the scale.
        cache_scale: the scale whose outputs restore the pruned tokens; must run unpruned, before the first
            pruned one. None where nothing is pruned.
        first_layer: first pruned layer (negative: from the end).
        last_layer: last pruned layer, inclusive (negative: from the end; beyond the model's depth: its last).
        score: the selection score; `mse_to_mean` is FastVAR's.
    """

    name: str = "none"
    fractions: tuple[tuple[int, float], ...] = ()
    cache_scale: int | None = None
    first_layer: int = 0
    last_layer: int = -1
    score: str = "mse_to_mean"

    def resolve(self, schedule: Sequence[tuple[int, int]], depth: int) -> ResolvedPlan:
        """This plan for one model: `schedule` lists (height, width) per scale, `depth` counts layers.

        Raises:
            PlanError: a scale or layer that the model has not, a fraction outside [0, 1], a cache scale
                that is itself pruned or does not come first, a skipped scale before one that runs.
        """
        num_scales = len(schedule)
        lengths = [height * width for height, width in schedule]
        num_kept = list(lengths)
        seen: set[int] = set()
        for place, fraction in self.fractions:
            scale = self._place("scale", place, num_scales)
            if scale in seen:
                raise PlanError(f"plan {self.name!r}: scale {scale} is named twice; name each scale once")
            seen.add(scale)
            if not 0.0 <= fraction <= 1.0:  # also False for NaN
                raise PlanError(
                    f"plan {self.name!r}: scale {place}: got the pruned fraction {fraction}, expected 0 to 1"
                )
            num_kept[scale] -= int(lengths[scale] * fraction)

        if self.score not in SCORES:
            raise PlanError(f"plan {self.name!r}: score: got {self.score!r}, expected one of {', '.join(SCORES)}")
        first_layer = self._place("first_layer", self.first_layer, depth)
        last_layer = self._place("last_layer", min(self.last_layer, depth - 1), depth)
        if first_layer > last_layer:
            raise PlanError(
                f"plan {self.name!r}: first_layer {self.first_layer} comes after last_layer {self.last_layer} "
                f"in a model of {depth} layers"
            )

        running = [k for k in range(num_scales) if num_kept[k] > 0]
        if not running:
            raise PlanError(f"plan {self.name!r}: every scale is skipped; keep at least the first")
        if running[0] != 0:
            raise PlanError(f"plan {self.name!r}: scale 0 is skipped; it is what the condition enters by")
        pruned = [k for k in running if num_kept[k] < lengths[k]]
        cache_scale = None
        if pruned:
            if self.cache_scale is None:
                raise PlanError(f"plan {self.name!r}: cache_scale is missing, but scale {pruned[0]} is pruned")
            cache_scale = self._place("cache_scale", self.cache_scale, num_scales)
            if cache_scale in pruned or num_kept[cache_scale] == 0:
                raise PlanError(
                    f"plan {self.name!r}: cache_scale {self.cache_scale} is itself pruned; name an unpruned scale "
                    f"before scale {pruned[0]}"
                )
            if cache_scale > pruned[0]:
                raise PlanError(
                    f"plan {self.name!r}: cache_scale {self.cache_scale} comes after the pruned scale {pruned[0]}; "
                    "the cache must be written before it is read"
                )
        return ResolvedPlan(
            schedule=tuple((int(h), int(w)) for h, w in schedule),
            depth=depth,
            num_kept=tuple(num_kept),
            cache_scale=cache_scale,
            first_layer=first_layer,
            last_layer=last_layer,
        )

    def _place(self, what: str, place: int, count: int) -> int:
        if not -count <= place < count:
            raise PlanError(
                f"plan {self.name!r}: {what} {place} does not exist: the model has {count}, numbered 0 to "
                f"{count - 1}, or -{count} to -1 from the end"
            )
        return place % count

    def to_json(self) -> dict[str, Any]:
        """The plan as the JSON object that `from_json` reads."""
        return {
            "name": self.name,
            "pruned": [{"scale": scale, "fraction": fraction} for scale, fraction in self.fractions],
            "cache_scale": self.cache_scale,
            "first_layer": self.first_layer,
            "last_layer": self.last_layer,
            "score": self.score,
        }

    @classmethod
    def from_json(cls, data: object, *, name: str = "plan") -> PruningPlan:
        """A plan from a JSON object; `name` is used where the object has none.

        Raises:
            PlanError: not an object, an unknown key, a value of the wrong type.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"plan {name!r}: got a JSON {type(data).__name__}, expected an object")
        known = {"name", "pruned", "cache_scale", "first_layer", "last_layer", "score"}
        unknown = sorted(set(data) - known)
        if unknown:
            raise PlanError(f"plan {name!r}: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}")
        name = data.get("name", name)
        if not isinstance(name, str):
            raise PlanError(f"plan: name: got {name!r}, expected a string")

        def integer(value: object, what: str) -> int:
            if not isinstance(value, int) or isinstance(value, bool):
                raise PlanError(f"plan {name!r}: {what}: got {value!r}, expected a whole number")
            return value

        entries = data.get("pruned", [])
        if not isinstance(entries, list):
            raise PlanError(f"plan {name!r}: pruned: got {entries!r}, expected a list")
        fractions = []
        for entry in entries:
            if not isinstance(entry, Mapping) or set(entry) != {"scale", "fraction"}:
                raise PlanError(f'plan {name!r}: pruned: got {entry!r}, expected {{"scale": ..., "fraction": ...}}')
            fraction = entry["fraction"]
            if not isinstance(fraction, int | float) or isinstance(fraction, bool) or math.isnan(fraction):
                raise PlanError(f"plan {name!r}: fraction: got {fraction!r}, expected a number from 0 to 1")
            fractions.append((integer(entry["scale"], "scale"), float(fraction)))
        cache_scale = data.get("cache_scale")
        score = data.get("score", "mse_to_mean")
        if not isinstance(score, str):
            raise PlanError(f"plan {name!r}: score: got {score!r}, expected a string")
        return cls(
            name=name,
            fractions=tuple(fractions),
            cache_scale=None if cache_scale is None else integer(cache_scale, "cache_scale"),
            first_layer=integer(data.get("first_layer", 0), "first_layer"),
            last_layer=integer(data.get("last_layer", -1), "last_layer"),
            score=score,
        )


def _infinity(name: str, fractions: tuple[tuple[int, float], ...], cache_scale: int) -> PruningPlan:
    return PruningPlan(name, fractions, cache_scale, first_layer=3, last_layer=27)


# `fastvar-var`: FastVAR's fractions for Infinity's last two computed scales, on VAR's last two; the first layers stay
# dense, as there. Chosen for speed on models of official size (benchmarks/results); what it costs in quality was
# measured on the demo model only, where it is too much (benchmarks/results/tune_demo.md).
# `fastvar-demo`: what `fastvar tune` chose on the demo model.
# `fastvar-infinity`: as published for 1024x1024 (`fastvar_utils.py`: 0.4 of 32x32 and 0.5 of 40x40, cache of 24x24,
# 48x48 and 64x64 skipped, layers 3 to 27), by place, so for every aspect ratio. The smaller sizes are what the
# published code does there. For `-2K` and `-4M` nothing was published: what is skipped and pruned below them stays, and
# of the last scale a quarter is computed.
PRESETS: Mapping[str, PruningPlan] = {
    plan.name: plan
    for plan in (
        PruningPlan(),
        PruningPlan("fastvar-var", ((-2, 0.4), (-1, 0.5)), cache_scale=-3, first_layer=2),
        PruningPlan("fastvar-demo", ((-1, 0.5),), cache_scale=-2, first_layer=4),
        _infinity("fastvar-infinity", ((9, 0.4), (10, 0.5), (11, 1.0), (12, 1.0)), 8),
        _infinity("fastvar-infinity-0.25M", ((9, 0.4),), 8),
        _infinity("fastvar-infinity-0.60M", ((9, 0.4), (10, 0.5), (11, 1.0)), 8),
        _infinity("fastvar-infinity-2K", ((9, 0.4), (10, 0.5), (11, 1.0), (12, 1.0), (13, 0.75)), 8),
        _infinity("fastvar-infinity-4M", ((9, 0.4), (10, 0.5), (11, 1.0), (12, 1.0), (13, 1.0), (14, 0.75)), 8),
    )
}
_OF_SIZE: Mapping[str, str] = {
    "0.06M": "none",
    "0.25M": "fastvar-infinity-0.25M",
    "0.60M": "fastvar-infinity-0.60M",
    "1M": "fastvar-infinity",
    "2K": "fastvar-infinity-2K",
    "4M": "fastvar-infinity-4M",
}


INFINITY_SIZES = tuple(_OF_SIZE)  # Infinity's `pn`, and two sizes beyond


def infinity_preset(size: str) -> str:
    """The preset for a size (`pn`) of Infinity."""
    return _OF_SIZE[size]


def load_plan(preset_or_file: str) -> PruningPlan:
    """The preset of that name, or the plan in that JSON file.

    Raises:
        PlanError: neither a preset nor a readable plan file.
    """
    if preset_or_file in PRESETS:
        return PRESETS[preset_or_file]
    path = Path(preset_or_file)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(
            f"--prune {preset_or_file!r}: neither a preset ({', '.join(PRESETS)}) nor a JSON file that exists"
        ) from error
    except (OSError, ValueError) as error:
        raise PlanError(f"--prune {preset_or_file!r}: not a readable JSON file: {error}") from error
    return PruningPlan.from_json(data, name=path.stem)
