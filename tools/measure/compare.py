"""The same classes and seeds through two bundles: how alike the pictures are, and how fast each is."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime import GenerationResult, Pipeline
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
        labels: class of each image.
        seeds: seed of each image.
        per_image: metrics of B's image against A's.
        mean: their mean (of PSNR over the images that differ).
        token_agreement: scale -> share of equal tokens, of the scales that both run.
        speedup: A's time over B's, the median over pairs of calls made one after the other.
        seconds: median seconds per call of A and of B.
        references: of A and of B against photographs of the classes; None without any.
    """

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    per_image: tuple[ImageMetrics, ...]
    mean: ImageMetrics
    token_agreement: dict[int, float]
    speedup: float
    seconds: tuple[float, float]
    references: tuple[ReferenceMetrics, ReferenceMetrics] | None

    def of_class(self, label: int) -> ImageMetrics:
        """Mean metrics of one class."""
        return mean_metrics([m for m, own in zip(self.per_image, self.labels, strict=True) if own == label])

    def to_json(self) -> dict[str, Any]:
        """Everything but the single images, as a JSON object."""
        return {
            "images": len(self.labels),
            "mean": self.mean.to_json(),
            "classes": {str(label): self.of_class(label).to_json() for label in dict.fromkeys(self.labels)},
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


def draw_side_by_side(
    pipelines: Sequence[Pipeline],
    labels: Sequence[int],
    seeds: Sequence[int],
    options: dict[str, Any],
    progress: Callable[[int], None] = lambda count: None,
) -> list[Drawn]:
    """The same requests through several pipelines, which take turns after every batch.

    Args:
        pipelines: bundles of one model.
        labels: class of each image.
        seeds: seed of each image.
        options: further arguments of `Pipeline.generate`.
        progress: called with the number of images drawn since the last call.

    Raises:
        RequestError: no batch size that all of them hold.
    """
    common = set.intersection(*(set(pipe.manifest.batches) for pipe in pipelines))
    if not common:
        sizes = "; ".join(f"{pipe.bundle}: {', '.join(map(str, pipe.manifest.batches))}" for pipe in pipelines)
        raise RequestError(f"batch sizes: the bundles have none in common ({sizes}); export with the same --batch")
    batch = max(common)
    results: list[list[GenerationResult]] = [[] for _ in pipelines]
    seconds: list[list[float]] = [[] for _ in pipelines]
    for pipe in pipelines:  # a first run is slower: buffers are touched for the first time
        pipe.generate(labels[:batch], seeds=seeds[:batch], **options)
    for start in range(0, len(labels), batch):
        rows = slice(start, start + batch)
        turns = list(zip(pipelines, results, seconds, strict=True))
        for pipe, drawn, times in turns if start // batch % 2 == 0 else reversed(turns):
            begin = time.perf_counter()
            drawn.append(pipe.generate(labels[rows], seeds=seeds[rows], **options))
            times.append(time.perf_counter() - begin)
        progress(len(labels[rows]))
    return [
        Drawn(
            images=np.concatenate([result.images for result in drawn]),
            tokens={
                scale: np.concatenate([result.tokens[i] for result in drawn])
                for i, scale in enumerate(pipe.manifest.resolved_plan.steps)
            },
            seconds=tuple(times),
        )
        for pipe, drawn, times in zip(pipelines, results, seconds, strict=True)
    ]


def compare(
    a: Drawn,
    b: Drawn,
    labels: Sequence[int],
    seeds: Sequence[int],
    references: dict[int, NDArray[Any]] | None = None,
) -> Comparison:
    """Measure what two bundles drew for the same requests.

    Args:
        a: the reference, dense or fp32.
        b: what is judged.
        labels: class of each image.
        seeds: seed of each image.
        references: class -> photographs uint8 [M, H, W, 3].
    """
    per_image = tuple(image_metrics(x, y) for x, y in zip(a.images, b.images, strict=True))
    return Comparison(
        labels=tuple(labels),
        seeds=tuple(seeds),
        per_image=per_image,
        mean=mean_metrics(per_image),
        token_agreement={
            scale: float((tokens == b.tokens[scale]).mean()) for scale, tokens in a.tokens.items() if scale in b.tokens
        },
        speedup=statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True)),
        seconds=(statistics.median(a.seconds), statistics.median(b.seconds)),
        references=None
        if references is None
        else (reference_metrics(a.images, labels, references), reference_metrics(b.images, labels, references)),
    )
