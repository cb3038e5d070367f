"""The same requests through several bundles: how alike the pictures are, and how fast each is."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import GenerationResult, Pipeline, Request
from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.request import parameters
from fastvar_trt.tools.measure.quality import (
    ImageMetrics,
    ReferenceMetrics,
    image_metrics,
    mean_metrics,
    reference_metrics,
)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What is drawn: a class or a prompt, and a seed, per picture."""

    subjects: tuple[int | str, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, rows: slice) -> Pictures:
        return Pictures(self.subjects[rows], self.seeds[rows])

    @property
    def are_classes(self) -> bool:
        """Or prompts."""
        return all(isinstance(subject, int) for subject in self.subjects)

    @property
    def labels(self) -> tuple[int, ...]:
        """The subjects, where they are classes."""
        return tuple(map(int, self.subjects))

    def requests(self) -> list[Request]:
        """One for each."""
        return [
            Request(label=subject, seed=seed) if isinstance(subject, int) else Request(prompt=subject, seed=seed)
            for subject, seed in zip(self.subjects, self.seeds, strict=True)
        ]

    def arguments(self) -> dict[str, Any]:
        """Those of `Pipeline.generate`."""
        return {"labels" if self.are_classes else "prompts": list(self.subjects), "seeds": list(self.seeds)}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one bundle drew for all requests, in their order.

    Attributes:
        images: uint8 [N, H, W, 3].
        tokens: scale -> int32 [N, L], of the scales that run.
        seconds: per call of the pipeline, one batch each.
    """

    images: NDArray[Any]
    tokens: dict[int, NDArray[Any]]
    seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Bundle B against bundle A.

    Attributes:
        pictures: class or prompt, and seed, of each image.
        per_image: metrics of B's image against A's.
        mean: their mean (of PSNR over the images that differ).
        token_agreement: scale -> share of equal tokens, of the scales that both run.
        speedup: A's time over B's, the median over pairs of calls made one after the other.
        seconds: median seconds per call of A and of B.
        references: of A and of B against photographs of the classes; None without any.
    """

    pictures: Pictures
    per_image: tuple[ImageMetrics, ...]
    mean: ImageMetrics
    token_agreement: dict[int, float]
    speedup: float
    seconds: tuple[float, float]
    references: tuple[ReferenceMetrics, ReferenceMetrics] | None

    def of_subject(self, subject: int | str) -> ImageMetrics:
        """Mean metrics of one class or prompt."""
        own = zip(self.per_image, self.pictures.subjects, strict=True)
        return mean_metrics([metrics for metrics, other in own if other == subject])

    def to_json(self) -> dict[str, Any]:
        """Everything but the single images, as a JSON object."""
        return {
            "images": len(self.pictures),
            "mean": self.mean.to_json(),
            "classes" if self.pictures.are_classes else "prompts": {
                str(subject): self.of_subject(subject).to_json() for subject in dict.fromkeys(self.pictures.subjects)
            },
            "token_agreement": {str(scale): round(value, 5) for scale, value in self.token_agreement.items()},
            "speedup": round(self.speedup, 3),
            "seconds_per_call": [round(value, 4) for value in self.seconds],
            "references": None if self.references is None else [dataclasses.asdict(r) for r in self.references],
        }


def check_comparable(a: Pipeline, b: Pipeline) -> None:
    """That two bundles draw the same kind of picture.

    Raises:
        RequestError: naming what differs.
    """
    for name in ("family", "condition", "tokens", "num_classes", "vocab_size", "image_height", "image_width"):
        ours, theirs = (
            getattr(m.model, name) if hasattr(m.model, name) else getattr(m.default, name)
            for m in (a.manifest, b.manifest)
        )
        if ours != theirs:
            raise RequestError(f"{b.bundle}: {name}: got {theirs}, {a.bundle} has {ours}: bundles of one model only")
    if a.manifest.default.schedule != b.manifest.default.schedule:
        raise RequestError(f"{b.bundle}: its scales are not those of {a.bundle}: bundles of one model only")


def shared_sampling(pipelines: Sequence[Pipeline], cfg: float | None) -> dict[str, Any]:
    """One guidance scale, temperature, top-k and top-p for all: the first bundle's, where the others can draw so.

    Args:
        pipelines: bundles of one model.
        cfg: in place of the bundle's.

    Returns:
        arguments of `Pipeline.generate`.
    """
    sampling = [pipe.manifest.sampling for pipe in pipelines]
    first = sampling[0]
    values = {"cfg": first.cfg if cfg is None else cfg, "temperature": first.temperature, "top_p": first.top_p}
    if "top_k" in parameters(pipelines[0].manifest):
        values["top_k"] = min(s.top_k for s in sampling)
    return values


@dataclasses.dataclass(frozen=True)
class Turn:
    """One batch by one bundle.

    Attributes:
        result: what it drew.
        seconds: how long the call took.
    """

    result: GenerationResult
    seconds: float


def take_turns(
    pipelines: Sequence[Pipeline], pictures: Pictures, options: Mapping[str, Any]
) -> Iterator[tuple[slice, list[Turn]]]:
    """The same requests through several pipelines, which take turns after every batch.

    Args:
        pipelines: bundles of one model.
        pictures: what is drawn.
        options: further arguments of `Pipeline.generate`.

    Yields:
        which pictures, and what every pipeline made of them.

    Raises:
        RequestError: no batch size that all of them hold, or a picture that cannot be asked for.
    """
    common = set.intersection(*(set(pipe.manifest.batches) for pipe in pipelines))
    if not common:
        sizes = "; ".join(f"{pipe.bundle}: {', '.join(map(str, pipe.manifest.batches))}" for pipe in pipelines)
        raise RequestError(f"batch sizes: the bundles have none in common ({sizes}); export with the same --batch")
    batch = max(common)
    for pipe in pipelines:  # an error before hours of work
        pipe.check(pictures.requests())
    for pipe in pipelines:  # a first run is slower: buffers are touched for the first time
        pipe.generate(**pictures[:batch].arguments(), **options)
    for start in range(0, len(pictures), batch):
        rows = slice(start, start + batch)
        turns: dict[int, Turn] = {}
        order = range(len(pipelines))
        for i in order if start // batch % 2 == 0 else reversed(order):
            begin = time.perf_counter()
            result = pipelines[i].generate(**pictures[rows].arguments(), **options)
            turns[i] = Turn(result, time.perf_counter() - begin)
        yield rows, [turns[i] for i in order]


def draw_side_by_side(
    pipelines: Sequence[Pipeline],
    pictures: Pictures,
    options: Mapping[str, Any],
    progress: Callable[[int], None] = lambda count: None,
) -> list[Drawn]:
    """All turns of `take_turns`; `progress` is called with the number of images drawn since the last call."""
    turns: list[list[Turn]] = []
    for rows, batch in take_turns(pipelines, pictures, options):
        turns.append(batch)
        progress(len(pictures[rows]))
    return [
        Drawn(
            images=np.concatenate([turn.result.images for turn in own]),
            tokens={
                scale: np.concatenate([turn.result.tokens[i] for turn in own])
                for i, scale in enumerate(pipe.manifest.resolved_plan.steps)
            },
            seconds=tuple(turn.seconds for turn in own),
        )
        for pipe, own in zip(pipelines, zip(*turns, strict=True), strict=True)
    ]


def compare(
    a: Drawn,
    b: Drawn,
    pictures: Pictures,
    references: dict[int, NDArray[Any]] | None = None,
    *,
    vif: bool = True,
) -> Comparison:
    """Measure what two bundles drew for the same requests.

    Args:
        a: the reference, dense or fp32.
        b: what is judged.
        pictures: what they drew.
        references: class -> photographs uint8 [M, H, W, 3].
        vif: compute VIF, which takes longest.
    """
    per_image = tuple(image_metrics(x, y, vif=vif) for x, y in zip(a.images, b.images, strict=True))
    return Comparison(
        pictures=pictures,
        per_image=per_image,
        mean=mean_metrics(per_image),
        token_agreement={
            scale: float((tokens == b.tokens[scale]).mean()) for scale, tokens in a.tokens.items() if scale in b.tokens
        },
        speedup=statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True)),
        seconds=(statistics.median(a.seconds), statistics.median(b.seconds)),
        references=None
        if references is None
        else (
            reference_metrics(a.images, pictures.labels, references),
            reference_metrics(b.images, pictures.labels, references),
        ),
    )
