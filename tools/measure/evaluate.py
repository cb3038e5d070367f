"""Prompts through several bundles: whether the pictures show what was asked for, as GenEval does it (arXiv 2310.11513).

A prompt comes with what is to be seen, and a checker looks for it in the picture. Any function does: see `Checker`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.tools.measure.compare import Pictures, take_turns
from fastvar_trt.tools.measure.quality import ImageMetrics, image_metrics, mean_metrics

_Z95 = 1.96  # of the normal distribution, two-sided
_SAMPLE_WIDTH = 256  # pixels
ALL = "all"  # categories; and prompts, whatever their tag
UNTAGGED = "untagged"


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt, and what its picture is to show.

    Attributes:
        prompt: the text.
        tag: what kind of prompt it is; results are given per tag, too.
        expected: whatever the checker looks for.
    """

    prompt: str
    tag: str
    expected: Mapping[str, Any]


class Checker(Protocol):
    """Looks for what is expected in a picture."""

    def __call__(self, picture: NDArray[np.uint8], expected: Mapping[str, Any]) -> Mapping[str, bool]:
        """Whether it is there, by category.

        Args:
            picture: uint8 [H, W, 3].
            expected: of the case: all of its line in the file of prompts but `tag` and `prompt`.
        """


def read_cases(path: Path) -> list[Case]:
    """The cases of a file, one JSON object a line: GenEval's `evaluation_metadata.jsonl` has `tag` and `prompt`, too.

    Raises:
        RequestError: naming the line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompts {path}: cannot be read: {error}") from error
    cases = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            prompt, tag = data.pop("prompt"), data.pop("tag", UNTAGGED)
            if not isinstance(prompt, str) or not isinstance(tag, str) or tag == ALL:
                raise ValueError(f"prompt and tag are texts, and no tag is {ALL!r}")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise RequestError(
                f'--prompts {path}, line {number}: {error}; expected a JSON object with "prompt", "tag", and what the '
                "checker takes"
            ) from error
        cases.append(Case(prompt, tag, data))
    if not cases:
        raise RequestError(f"--prompts {path}: has no line")
    return cases


def load_checker(name: str) -> Checker:
    """`module:function`, which any user may write.

    Raises:
        RequestError: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        checker = getattr(importlib.import_module(module), function)
    except Exception as error:  # of the user's module, too
        raise RequestError(
            f"--checker {name}: {type(error).__name__}: {error}; expected module:function, of what can be imported"
        ) from error
    if not callable(checker):
        raise RequestError(f"--checker {name}: got a {type(checker).__name__}, expected a function")
    found: Checker = checker
    return found


@dataclasses.dataclass(frozen=True)
class Judge:
    """Tells of pictures whether they show what their prompts ask for.

    Attributes:
        cases: one per picture.
        checker: looks at them.
        seed: picture i is drawn with seed + i.
    """

    cases: tuple[Case, ...]
    checker: Checker
    seed: int = 0

    @property
    def pictures(self) -> Pictures:
        """What is drawn."""
        seeds = tuple(range(self.seed, self.seed + len(self.cases)))
        return Pictures(tuple(case.prompt for case in self.cases), seeds)

    def checks(self, index: int, picture: NDArray[np.uint8]) -> Mapping[str, bool]:
        """Whether each category holds in a picture uint8 [H, W, 3] of a case.

        Raises:
            RequestError: the checker cannot check it.
        """
        case = self.cases[index]
        try:
            found = {str(name): bool(held) for name, held in self.checker(picture, case.expected).items()}
        except Exception as error:  # of others
            raise RequestError(
                f"the checker failed on the prompt {case.prompt!r}: {type(error).__name__}: {error}; are its prompts "
                "those that the checker is for?"
            ) from error
        if not found or ALL in found:
            raise RequestError(
                f"the checker: got the categories {', '.join(found) or 'none'} for the prompt {case.prompt!r}, "
                f"expected at least one, and none that is called {ALL!r}"
            )
        return found

    def share(self, pictures: Sequence[NDArray[np.uint8]], first: int = 0) -> Share:
        """How many of pictures of consecutive cases show everything."""
        return Share(sum(all(self.checks(first + i, x).values()) for i, x in enumerate(pictures)), len(pictures))


@dataclasses.dataclass(frozen=True)
class Share:
    """How many of some checks held, of at least one, with the 95 % interval of Wilson (1927)."""

    held: int
    count: int

    @property
    def value(self) -> float:
        """Of 1."""
        return self.held / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        n, p, z2 = self.count, self.value, _Z95**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f}-{high:.3f})"

    def to_json(self) -> dict[str, float]:
        """A JSON object."""
        low, high = self.interval
        return {"value": round(self.value, 4), "low": round(low, 4), "high": round(high, 4), "count": self.count}


@dataclasses.dataclass(frozen=True)
class BundleResult:
    """What one bundle drew.

    Attributes:
        checks: per picture, category -> whether it held.
        metrics: per picture, against the first bundle's; of that one empty.
        seconds: of every call, a batch each.
        step_ms: graph -> median ms per call.
    """

    checks: tuple[Mapping[str, bool], ...]
    metrics: tuple[ImageMetrics, ...]
    seconds: tuple[float, ...]
    step_ms: Mapping[str, float]

    @property
    def steps_ms(self) -> float:
        """Of all steps together."""
        return sum(ms for name, ms in self.step_ms.items() if name.startswith("step"))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Several bundles on the same cases.

    Attributes:
        cases: the cases.
        bundles: their names, the reference first.
        results: of each bundle.
        samples: small pictures of the first cases, per bundle: uint8 [N, height, side, 3].
    """

    cases: tuple[Case, ...]
    bundles: tuple[str, ...]
    results: tuple[BundleResult, ...]
    samples: tuple[NDArray[np.uint8], ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """What is checked, and at the end whether all of it held."""
        return (*dict.fromkeys(name for result in self.results for checks in result.checks for name in checks), ALL)

    @property
    def tags(self) -> tuple[str, ...]:
        """Kinds of prompts."""
        return tuple(dict.fromkeys(case.tag for case in self.cases))

    def share(self, bundle: int, category: str, tag: str = ALL) -> Share | None:
        """How often a category held; None where nothing was checked.

        Args:
            bundle: index.
            category: of `categories`.
            tag: of the cases that count.
        """
        rows = [
            checks
            for checks, case in zip(self.results[bundle].checks, self.cases, strict=True)
            if tag in (ALL, case.tag) and (category == ALL or category in checks)
        ]
        if not rows:
            return None
        return Share(sum(all(r.values()) if category == ALL else r[category] for r in rows), len(rows))

    def failed(self, bundle: int, case: int) -> list[str]:
        """The categories that did not hold in a picture."""
        return [name for name, held in self.results[bundle].checks[case].items() if not held]

    def only_one_complies(self, bundle: int) -> tuple[int, int]:
        """In how many cases this bundle complies and the first does not, and the other way round.

        These pairs (of McNemar's test) tell more than two shares, whose intervals hold how hard the prompts are, too.
        """
        fails = [(bool(self.failed(0, i)), bool(self.failed(bundle, i))) for i in range(len(self.cases))]
        return fails.count((True, False)), fails.count((False, True))

    def speedup(self, bundle: int) -> tuple[float, float]:
        """The first bundle's time over that of another: of the steps, and of whole calls (median of pairs)."""
        first, other = self.results[0], self.results[bundle]
        pairs = zip(first.seconds, other.seconds, strict=True)
        return first.steps_ms / other.steps_ms, statistics.median(a / b for a, b in pairs)

    def _against_first(self, bundle: int) -> dict[str, float | None]:
        this, first = self.only_one_complies(bundle)
        likeness = mean_metrics(self.results[bundle].metrics).to_json()
        return {**likeness, "only_this_complies": this, "only_first_complies": first}

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures, as a JSON object."""
        return {
            "cases": len(self.cases),
            "bundles": [
                {
                    "bundle": name,
                    "compliance": {
                        category: {
                            tag: share.to_json()
                            for tag in (ALL, *self.tags)
                            if (share := self.share(i, category, tag)) is not None
                        }
                        for category in self.categories
                    },
                    "failures": [
                        {"case": number, "prompt": case.prompt, "categories": failed}
                        for number, case in enumerate(self.cases)
                        if (failed := self.failed(i, number))
                    ],
                    "against_first": None if i == 0 else self._against_first(i),
                    "seconds_per_call": round(statistics.median(result.seconds), 4),
                    "speedup_steps": round(self.speedup(i)[0], 3),
                    "speedup_call": round(self.speedup(i)[1], 3),
                    "step_ms": {graph: round(ms, 2) for graph, ms in result.step_ms.items()},
                }
                for i, (name, result) in enumerate(zip(self.bundles, self.results, strict=True))
            ],
        }


def evaluate(
    pipelines: Sequence[Pipeline],
    judge: Judge,
    options: Mapping[str, Any],
    *,
    vif: bool = True,
    num_samples: int = 8,
    progress: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Draw every case with every bundle in turn, and check and compare the pictures.

    Args:
        pipelines: bundles of one model of text, the reference first.
        judge: has what is drawn, and looks at the pictures.
        options: further arguments of `Pipeline.generate`.
        vif: compute VIF, which takes longest.
        num_samples: of how many cases the pictures are kept, scaled to a width of 256 pixels.
        progress: called with the number of cases drawn since the last call.

    Raises:
        RequestError: no batch size that all bundles hold, or a checker that cannot check a case.
    """
    pictures = judge.pictures
    checks: list[list[Mapping[str, bool]]] = [[] for _ in pipelines]
    metrics: list[list[ImageMetrics]] = [[] for _ in pipelines]
    seconds: list[list[float]] = [[] for _ in pipelines]
    timings: list[list[Mapping[str, float]]] = [[] for _ in pipelines]
    samples: list[list[NDArray[np.uint8]]] = [[] for _ in pipelines]
    for rows, turns in take_turns(pipelines, pictures, options):
        for i, turn in enumerate(turns):
            images = turn.result.images
            seconds[i].append(turn.seconds)
            timings[i].append(turn.result.timings)
            checks[i] += [judge.checks(rows.start + j, x) for j, x in enumerate(images)]
            if i:
                first = turns[0].result.images
                metrics[i] += [image_metrics(x, y, vif=vif) for x, y in zip(first, images, strict=True)]
            samples[i] += [_small(x) for x in images[: max(num_samples - rows.start, 0)]]
        progress(len(pictures[rows]))
    return Evaluation(
        judge.cases,
        tuple(str(pipe.bundle) for pipe in pipelines),
        tuple(
            BundleResult(
                tuple(checks[i]),
                tuple(metrics[i]),
                tuple(seconds[i]),
                {name: statistics.median(call[name] for call in timings[i]) for name in timings[i][0]},
            )
            for i in range(len(pipelines))
        ),
        tuple(np.stack(own) for own in samples),
    )


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height = round(_SAMPLE_WIDTH * picture.shape[0] / picture.shape[1])
    return np.asarray(Image.fromarray(picture).resize((_SAMPLE_WIDTH, height), Image.Resampling.LANCZOS))
