"""Pruning plans: which tokens are computed at which scale and layer (FastVAR, arXiv 2503.23367).

A plan may also end guidance early: from some scale on only the conditional half is computed (FasterVAR, SkipVAR). Where
two models share a chain (CoDe), it is that of the second one.

A `PruningPlan` is what a user writes; scales are named by their place in the schedule, negative from the
end, so one plan fits any resolution and aspect ratio. `PruningPlan.resolve` checks it against a model's
schedule and gives the `ResolvedPlan` that the exporter and the runtime work with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fastvar_trt.runtime.errors import PlanError

_SCORE = "mse_to_mean"  # FastVAR's; plan files may name it, and none other exists


@dataclasses.dataclass(frozen=True)
class Drafted:
    """The first scales, which a model of its own draws: the drafter of CoDe (arXiv 2411.17787).

    The refiner draws the others. Its first step, at the switch, computes the tokens of all scales so far.

    Attributes:
        num_scales: N, how many it draws; the switch is scale N.
        depth: its layers, which are numbered before the refiner's.
    """

    num_scales: int
    depth: int


@dataclasses.dataclass(frozen=True)
class ResolvedPlan:
    """A plan in absolute terms: what each step of one model computes."""

    schedule: tuple[tuple[int, int], ...]  # (height, width) of every scale, skipped ones included
    depth: int  # layers of the model, of a drafter and its refiner together
    num_kept: tuple[int, ...]  # K per scale in a pruned layer; L where nothing is pruned, 0 where skipped
    cache_scale: int | None  # scale whose sublayer outputs are cached; None where no scale is pruned
    first_layer: int
    last_layer: int  # inclusive
    context_tokens: int = 0  # what the first scale computes in place of its map, of models whose text is a prefix
    unguided_from: int | None = None  # from which scale on there is no guidance; None: all scales are guided
    drafted: Drafted | None = None

    @property
    def switch(self) -> int | None:
        """The scale at which the refiner takes over; None where one model draws all."""
        return None if self.drafted is None else self.drafted.num_scales

    def layers(self, scale: int) -> range:
        """The layers that run at a scale."""
        if self.drafted is None:
            return range(self.depth)
        first = self.drafted.depth
        return range(first) if scale < self.drafted.num_scales else range(first, self.depth)

    def is_guided(self, scale: int) -> bool:
        """Whether a scale computes the unconditional half, too."""
        return self.unguided_from is None or scale < self.unguided_from

    def rows(self, scale: int, batch: int = 1) -> int:
        """Rows that a scale computes for a batch of images: B2 = 2B with guidance, B without."""
        return 2 * batch if self.is_guided(scale) else batch

    def num_tokens(self, scale: int) -> int:
        """L, the tokens of the map at `scale`."""
        height, width = self.schedule[scale]
        return height * width

    def scale_tokens(self, scale: int) -> tuple[int, ...]:
        """Tokens that a step starts from, by scale: its own, and at the switch those of all before."""
        first = 0 if scale == self.switch else scale
        return tuple(self.num_tokens(k) for k in range(first, scale + 1))

    def _in_pruned_layers(self, layer: int) -> bool:
        return self.first_layer <= layer <= self.last_layer

    @property
    def steps(self) -> tuple[int, ...]:
        """The scales that run, in order."""
        return tuple(k for k in range(len(self.schedule)) if self.num_kept[k] > 0)

    def is_pruned(self, scale: int) -> bool:
        """True where some layer of the step computes a part of the tokens only."""
        return self.prunes(scale, self.first_layer)

    def prunes(self, scale: int, layer: int) -> bool:
        """True where this layer of this step computes a part of the tokens only."""
        is_part = 0 < self.num_kept[scale] < self.num_tokens(scale)
        return is_part and layer in self.layers(scale) and self._in_pruned_layers(layer)

    def kept(self, scale: int, layer: int) -> int:
        """K, the tokens that `layer` computes at `scale`, and so the keys that it adds; 0 where it does not run."""
        if not self.num_kept[scale] or layer not in self.layers(scale):
            return 0
        if self.prunes(scale, layer):
            return self.num_kept[scale]
        return self.context_tokens if scale == 0 and self.context_tokens else sum(self.scale_tokens(scale))

    def num_pairs(self, scale: int, layer: int) -> int:
        """Pairs of a query and a key that it sees, of one row of a layer at a scale."""
        kept = self.kept(scale, layer)
        if kept and scale == self.switch:  # a scale does not see later ones
            lengths = self.scale_tokens(scale)
            return sum(own * seen for own, seen in zip(lengths, itertools.accumulate(lengths), strict=True))
        return kept * (self.num_past(scale, layer) + kept)

    def writes_cache(self, scale: int, layer: int) -> bool:
        """True where the layer's sublayer outputs are kept for the pruned scales."""
        return scale == self.cache_scale and self._in_pruned_layers(layer)

    def emits_keys(self, scale: int) -> bool:
        """True where a later step reads the keys and values of this one."""
        return scale != self.steps[-1] and (self.switch is None or scale != self.switch - 1)

    def num_past(self, scale: int, layer: int) -> int:
        """S, the keys that `layer` has kept before `scale`."""
        return sum(self.kept(k, layer) for k in range(scale))

    def past(self, scale: int, layer: int, batch: int) -> tuple[tuple[int, int], ...]:
        """The same in pieces [S, rows]: of scales with guidance and, after these, of scales without."""
        first = scale if self.unguided_from is None else min(scale, self.unguided_from)
        guided = self.num_past(first, layer)
        pieces = ((guided, 2 * batch), (self.num_past(scale, layer) - guided, batch))
        return tuple(piece for piece in pieces if piece[0])


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
        unguided_from: the scale from which on only the conditional half is computed; None: guidance at all scales.
    """

    name: str = "none"
    fractions: tuple[tuple[int, float], ...] = ()
    cache_scale: int | None = None
    first_layer: int = 0
    last_layer: int = -1
    unguided_from: int | None = None

    def resolve(
        self,
        schedule: Sequence[tuple[int, int]],
        depth: int,
        context_tokens: int = 0,
        drafted: Drafted | None = None,
    ) -> ResolvedPlan:
        """This plan for one model.

        Args:
            schedule: (height, width) per scale.
            depth: layers.
            context_tokens: of the text, where it comes as a prefix in place of the first scale's map; else 0.
            drafted: what another model draws; the plan is that of the refiner, whose layers are `depth`.

        Raises:
            PlanError: a scale or layer that the model has not, a fraction outside [0, 1], a cache scale
                that is itself pruned or does not come first, a first scale that is skipped, a scale of the drafter
                or the switch.
        """
        lengths = [height * width for height, width in schedule]
        num_kept = self._num_kept(lengths)
        first_layer, last_layer = self._pruned_layers(depth)
        if drafted is not None:
            self._check_drafted(drafted, lengths, num_kept)
        if num_kept[0] == 0:
            raise self._error("scale 0 is skipped; it is what the condition enters by")
        if context_tokens and num_kept[0] < lengths[0]:
            raise self._error("scale 0 is pruned; it is the text, all of which is computed")
        before = 0 if drafted is None else drafted.depth
        return ResolvedPlan(
            schedule=tuple((int(h), int(w)) for h, w in schedule),
            depth=before + depth,
            num_kept=tuple(num_kept),
            cache_scale=self._cache_scale(lengths, num_kept, drafted),
            first_layer=before + first_layer,
            last_layer=before + last_layer,
            context_tokens=context_tokens,
            unguided_from=self._unguided_from(len(lengths), drafted),
            drafted=drafted,
        )

    def _num_kept(self, lengths: Sequence[int]) -> list[int]:
        num_kept = list(lengths)
        seen: set[int] = set()
        for place, fraction in self.fractions:
            scale = self._place("scale", place, len(lengths))
            if scale in seen:
                raise self._error(f"scale {scale} is named twice; name each scale once")
            seen.add(scale)
            if not 0.0 <= fraction <= 1.0:  # also False for NaN
                raise self._error(f"scale {place}: got the pruned fraction {fraction}, expected 0 to 1")
            num_kept[scale] -= int(lengths[scale] * fraction)
        return num_kept

    def _pruned_layers(self, depth: int) -> tuple[int, int]:
        first = self._place("first_layer", self.first_layer, depth)
        last = self._place("last_layer", min(self.last_layer, depth - 1), depth)
        if first > last:
            raise self._error(
                f"first_layer {self.first_layer} comes after last_layer {self.last_layer} in a model of {depth} layers"
            )
        return first, last

    def _cache_scale(self, lengths: Sequence[int], num_kept: Sequence[int], drafted: Drafted | None) -> int | None:
        """The scale that is cached; None where nothing is pruned."""
        pruned = [k for k, (kept, length) in enumerate(zip(num_kept, lengths, strict=True)) if 0 < kept < length]
        if not pruned:
            return None
        if self.cache_scale is None:
            raise self._error(f"cache_scale is missing, but scale {pruned[0]} is pruned")
        cache_scale = self._place("cache_scale", self.cache_scale, len(lengths))
        if num_kept[cache_scale] < lengths[cache_scale]:
            raise self._error(
                f"cache_scale {self.cache_scale} is itself pruned; name an unpruned scale before scale {pruned[0]}"
            )
        if cache_scale > pruned[0]:
            raise self._error(
                f"cache_scale {self.cache_scale} comes after the pruned scale {pruned[0]}; the cache must be written "
                "before it is read"
            )
        if drafted is not None and cache_scale < drafted.num_scales:
            raise self._error(
                f"cache_scale {self.cache_scale} is drawn by the drafter; name one of the refiner's, "
                f"{drafted.num_scales} or later"
            )
        return cache_scale

    def _unguided_from(self, num_scales: int, drafted: Drafted | None) -> int | None:
        if self.unguided_from is None:
            return None
        scale = self._place("unguided_from", self.unguided_from, num_scales)
        if scale == 0:
            raise self._error(
                f"unguided_from {self.unguided_from} is scale 0, by which the condition enters for both halves; name a "
                "later one, and draw with a cfg that does not guide for none at all"
            )
        if drafted is not None and scale <= drafted.num_scales:
            raise self._error(
                f"unguided_from {self.unguided_from}: got scale {scale}, expected one after scale "
                f"{drafted.num_scales}, at which the refiner takes over"
            )
        return scale

    def _check_drafted(self, drafted: Drafted, lengths: Sequence[int], num_kept: Sequence[int]) -> None:
        """That either model draws some scales, and nothing is pruned before the refiner's first step is over."""
        if not 0 < drafted.num_scales < len(lengths):
            raise self._error(
                f"the drafter draws {drafted.num_scales} of {len(lengths)} scales, expected 1 to {len(lengths) - 1}"
            )
        for scale in range(drafted.num_scales + 1):
            if num_kept[scale] < lengths[scale]:
                raise self._error(
                    f"scale {scale} is pruned, which the drafter draws or the refiner's first step computes; prune "
                    f"scales after {drafted.num_scales}"
                )

    def _place(self, what: str, place: int, count: int) -> int:
        if not -count <= place < count:
            raise self._error(
                f"{what} {place} does not exist: the model has {count}, numbered 0 to {count - 1}, or -{count} to -1 "
                "from the end"
            )
        return place % count

    def _error(self, problem: str) -> PlanError:
        return PlanError(f"plan {self.name!r}: {problem}")

    def to_json(self) -> dict[str, Any]:
        """The plan as the JSON object that `from_json` reads."""
        return {
            "name": self.name,
            "pruned": [{"scale": scale, "fraction": fraction} for scale, fraction in self.fractions],
            "cache_scale": self.cache_scale,
            "first_layer": self.first_layer,
            "last_layer": self.last_layer,
            "unguided_from": self.unguided_from,
        }

    @classmethod
    def from_json(cls, data: object, *, name: str = "plan") -> PruningPlan:
        """A plan from a JSON object; `name` is used where the object has none.

        Raises:
            PlanError: not an object, an unknown key, a value of the wrong type.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"plan {name!r}: got a JSON {type(data).__name__}, expected an object")
        # Where `fastvar tune` has found it to lie is for people.
        known = {"name", "pruned", "cache_scale", "first_layer", "last_layer", "unguided_from", "score", "measured"}
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
            is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
            if not is_number or not 0 <= fraction <= 1:  # also False for NaN
                raise PlanError(f"plan {name!r}: fraction: got {fraction!r}, expected a number from 0 to 1")
            fractions.append((integer(entry["scale"], "scale"), float(fraction)))
        if data.get("score", _SCORE) != _SCORE:
            raise PlanError(f"plan {name!r}: score: got {data['score']!r}, expected {_SCORE!r}, or leave it out")
        places = {
            key: None if data.get(key) is None else integer(data[key], key) for key in ("cache_scale", "unguided_from")
        }
        return cls(
            name=name,
            fractions=tuple(fractions),
            **places,
            first_layer=integer(data.get("first_layer", 0), "first_layer"),
            last_layer=integer(data.get("last_layer", -1), "last_layer"),
        )


DENSE = PruningPlan()
