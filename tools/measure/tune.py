"""A pruning plan by measurement: sweep, keep the front of work and quality, time it in the runtime, choose.

The sweep runs in eager PyTorch over the bundle's own weights: the scales before the first pruned one are the same for
every candidate and run once. Only the candidates on the front are exported and timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvar_trt.export.exporter import export_again, load_bundle_model
from fastvar_trt.export.models.base import NextScaleModel
from fastvar_trt.export.models.reference import ChainState, default_request
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import PlanError
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.runtime.plan import DENSE, PruningPlan, ResolvedPlan
from fastvar_trt.runtime.text import PromptTokenizer
from fastvar_trt.tools.measure.compare import Comparison, Pictures, compare, draw_side_by_side, shared_sampling
from fastvar_trt.tools.measure.quality import (
    ImageMetrics,
    ReferenceMetrics,
    image_metrics,
    mean_metrics,
    reference_metrics,
)
from fastvar_trt.tools.measure.work import relative_work

# Fractions of the last scales in order; the last of them is the last scale's.
DEFAULT_FRACTIONS = ((0.25,), (0.5,), (0.75,), (0.4, 0.5), (0.5, 0.75), (0.75, 0.9))
_BATCH = 8
_LABEL_DISTANCE = 0.03  # of the plotted share of work


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan and what it costs and gives, against the dense chain on the same requests.

    Attributes:
        plan: the plan.
        work: multiply-adds of the transformer as a share of the dense chain's.
        metrics: mean of all images.
        references: against photographs of the classes; None without any.
        on_front: no other candidate has less work and a higher SSIM.
        is_marked: it was asked for by name: measured and shown wherever it lies.
        measured: through exported graphs and the runtime; of the front, and what is marked.
    """

    plan: PruningPlan
    work: float
    metrics: ImageMetrics
    references: ReferenceMetrics | None
    on_front: bool = False
    is_marked: bool = False
    measured: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "plan": self.plan.to_json(),
            "work": round(self.work, 4),
            "metrics": self.metrics.to_json(),
            "references": None if self.references is None else dataclasses.asdict(self.references),
            "on_front": self.on_front,
            "is_marked": self.is_marked,
            "measured": None if self.measured is None else self.measured.to_json(),
        }


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All candidates by rising work, and the dense chain that they are judged against."""

    candidates: tuple[Candidate, ...]
    dense_references: ReferenceMetrics | None


def candidate_plans(
    fractions: Sequence[Sequence[float]],
    cache_scales: Sequence[int],
    first_layers: Sequence[int],
    unguided_from: Sequence[int] = (),
) -> list[PruningPlan]:
    """Every combination that can be resolved: the cache scale must come before the first pruned one.

    Args:
        fractions: each the pruned fractions of the last scales, in the order of the schedule.
        cache_scales: counted from the end, so negative.
        first_layers: first pruned layer.
        unguided_from: where guidance ends, counted from the end; besides guidance at all scales.
    """
    plans = []
    for values, cache_scale, first_layer, end in itertools.product(
        fractions, cache_scales, first_layers, (None, *unguided_from)
    ):
        if cache_scale >= -len(values):
            continue
        pruned = tuple((place - len(values), value) for place, value in enumerate(values))
        parts = [*(f"{value:g}" for value in values), f"cache{-cache_scale}", f"layer{first_layer}"]
        name = "-".join(parts if end is None else [*parts, f"unguided{-end}"])
        plans.append(PruningPlan(name, pruned, cache_scale, first_layer, unguided_from=end))
    return plans


class _Drawer:
    """A batch of images by eager PyTorch; what plans share is computed once."""

    def __init__(self, model: NextScaleModel, inputs: Mapping[str, Tensor], seeds: Sequence[int], cfg: float) -> None:
        self._model, self._inputs, self._seeds = model, inputs, seeds
        self._request = default_request(model, len(seeds), greedy=False, cfg=cfg)
        self._prefixes: dict[tuple[int, int], ChainState] = {}

    @torch.inference_mode()
    def draw(self, plan: ResolvedPlan) -> NDArray[Any]:
        """uint8 [B, H, W, 3]."""
        end = next((k for k in plan.steps if plan.is_pruned(k) or not plan.is_guided(k)), plan.steps[-1] + 1)
        state = self._after_prefix(plan, end)
        for scale in (k for k in plan.steps if k >= end):
            self._step(state, plan, scale)
        state.finish(self._model, plan, self._request)
        assert state.f_hat is not None
        return self._model.decode(state.f_hat)[1].numpy()

    def _after_prefix(self, plan: ResolvedPlan, end: int) -> ChainState:
        """The state before scale `end`. All layers are cached: a plan reads what it needs."""
        if plan.cache_scale is None:  # nothing is restored, and no other candidate is like it
            return self._run_prefix(plan, end)
        key = (end, plan.cache_scale)
        if key not in self._prefixes:
            self._prefixes[key] = self._run_prefix(plan, end)
        state = self._prefixes[key]
        return dataclasses.replace(state, past=dict(state.past), caches=dict(state.caches), handed_on={})

    def _run_prefix(self, plan: ResolvedPlan, end: int) -> ChainState:
        state = ChainState.begin(self._model, self._inputs, self._seeds)
        full = dataclasses.replace(plan, first_layer=0, last_layer=plan.depth - 1)
        for scale in range(end):
            self._step(state, full, scale)
        return state

    def _step(self, state: ChainState, plan: ResolvedPlan, scale: int) -> None:
        shape = self._model.token_spec(scale)[0]
        noise = np.stack([uniform_noise(seed, scale, shape) for seed in self._seeds])
        state.step(self._model, plan, scale, torch.from_numpy(noise), self._request)


def check(bundle: Path, plans: Sequence[PruningPlan], pictures: Pictures) -> None:
    """That a sweep can be run, before anything is.

    Raises:
        PlanError: no candidate, or one that does not fit the model.
        RequestError: a picture that cannot be asked for.
    """
    if not plans:
        raise PlanError("no candidate: the cache scale must come before the pruned scales; give other --cache-scales")
    manifest = read_manifest(bundle)
    for plan in plans:
        manifest.default.resolve(manifest.model, plan)
    with Pipeline.load(bundle, engines="off") as pipe:
        pipe.check(pictures.requests())


@torch.inference_mode()
def condition_inputs(model: NextScaleModel, tokenizer: PromptTokenizer, pictures: Pictures) -> dict[str, Tensor]:
    """Inputs of the model's condition, of classes or prompts."""
    if pictures.are_classes:
        return {names.LABELS: torch.tensor(pictures.labels)}
    length = model.model_spec().text_length
    encoded = {}
    for prompt in dict.fromkeys(pictures.subjects):  # one prompt is drawn with many seeds
        ids = tokenizer.tokens(str(prompt)).ids
        padded = torch.zeros(1, length, dtype=torch.int64)
        padded[0, : len(ids)] = torch.tensor(ids)
        count = torch.tensor([len(ids)])
        features = model.encode_text({names.TOKEN_IDS: padded, names.TOKEN_COUNT: count})[names.ENCODED]
        encoded[prompt] = (features, count)
    all_features, counts = zip(*(encoded[prompt] for prompt in pictures.subjects), strict=True)
    return {
        names.TEXT_FEATURES: torch.cat(all_features).repeat(2, 1, 1),
        names.TEXT_LENGTHS: torch.cat(counts).repeat(2),
        names.NEGATIVE: torch.zeros(len(pictures), dtype=torch.bool),
    }


def sweep(
    bundle: Path,
    plans: Sequence[PruningPlan],
    pictures: Pictures,
    cfg: float,
    references: dict[int, NDArray[Any]] | None = None,
    progress: Callable[[int], None] = lambda count: None,
    marked: Sequence[PruningPlan] = (),
) -> Sweep:
    """Judge every plan by its pictures.

    Args:
        bundle: the weights, whatever its own plan.
        plans: candidates.
        pictures: what is drawn.
        cfg: guidance scale.
        references: class -> photographs uint8 [M, H, W, 3].
        progress: called with the number of images drawn since the last call, the dense ones included.
        marked: further candidates, which are measured and shown wherever they lie.

    Raises:
        PlanError: a plan that does not fit the model.
    """
    model, manifest = load_bundle_model(bundle)
    plans = list(dict.fromkeys([*marked, *plans]))
    tokenizer = PromptTokenizer(bundle, manifest)
    resolved = [manifest.default.resolve(manifest.model, plan) for plan in plans]
    everything = manifest.default.resolve(manifest.model, DENSE)
    metrics: list[list[ImageMetrics]] = [[] for _ in plans]
    against_photographs: list[list[ReferenceMetrics]] = [[] for _ in range(len(plans) + 1)]
    sizes = []
    for start in range(0, len(pictures), _BATCH):  # outermost: the states that plans share are those of one batch
        part = pictures[start : start + _BATCH]
        drawer = _Drawer(model, condition_inputs(model, tokenizer, part), part.seeds, cfg)
        dense = drawer.draw(everything)
        sizes.append(len(dense))
        progress(len(dense))
        if references is not None:
            against_photographs[-1].append(reference_metrics(dense, part.labels, references))
        for i, plan in enumerate(resolved):
            images = drawer.draw(plan)
            metrics[i] += [image_metrics(x, y, vif=False) for x, y in zip(dense, images, strict=True)]
            if references is not None:
                against_photographs[i].append(reference_metrics(images, part.labels, references))
            progress(len(images))

    def over_batches(parts: list[ReferenceMetrics]) -> ReferenceMetrics | None:
        if not parts:
            return None
        return ReferenceMetrics(
            distance=float(np.average([part.distance for part in parts], weights=sizes)),
            accuracy=float(np.average([part.accuracy for part in parts], weights=sizes)),
        )

    candidates = [
        Candidate(
            plan, relative_work(manifest, places), mean_metrics(found), over_batches(parts), is_marked=plan in marked
        )
        for plan, places, found, parts in zip(plans, resolved, metrics, against_photographs, strict=False)
    ]
    candidates.sort(key=lambda c: (c.work, -c.metrics.ssim))
    best = -1.0
    for i, candidate in enumerate(candidates):
        if candidate.metrics.ssim > best:  # with less work, nothing was as good
            best = candidate.metrics.ssim
            candidates[i] = dataclasses.replace(candidate, on_front=True)
    return Sweep(tuple(candidates), over_batches(against_photographs[-1]))


def measure_front(
    bundle: Path,
    result: Sweep,
    folder: Path,
    pictures: Pictures,
    cfg: float,
    references: dict[int, NDArray[Any]] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Sweep:
    """Export the plans of the front, and those that are marked, and run each beside the dense chain.

    Args:
        bundle: as for `sweep`.
        result: its result.
        folder: where the bundles may lie; the caller removes it.
        pictures: what is drawn.
        cfg: guidance scale.
        references: as for `sweep`.
        progress: called with the number of plans measured since the last call.
    """
    dense = folder / "dense"
    batches = (min(read_manifest(bundle).batches),)
    export_again(bundle, dense, DENSE, batches=batches)
    progress(1)
    candidates = list(result.candidates)
    with Pipeline.load(dense, check="size") as reference:
        for i, candidate in enumerate(candidates):
            if not (candidate.on_front or candidate.is_marked):
                continue
            pruned = folder / f"plan_{i}"
            export_again(dense, pruned, candidate.plan)
            with Pipeline.load(pruned, check="size") as pipe:
                options = shared_sampling([reference, pipe], cfg)
                a, b = draw_side_by_side([reference, pipe], pictures, options)
            measured = compare(a, b, pictures, references)
            candidates[i] = dataclasses.replace(candidate, measured=measured)
            shutil.rmtree(pruned)
            progress(1)
    return dataclasses.replace(result, candidates=tuple(candidates))


def choose(result: Sweep, *, min_ssim: float, max_drop: float) -> Candidate | None:
    """The fastest plan of the front whose pictures hold; None where none does.

    Args:
        result: a sweep whose front was measured.
        min_ssim: mean SSIM against the dense pictures.
        max_drop: relative rise of the distance to the photographs of the classes, where there are some.
    """

    def holds(candidate: Candidate) -> bool:
        if candidate.measured is None or candidate.measured.mean.ssim < min_ssim:
            return False
        if candidate.measured.references is None:
            return True
        dense, pruned = candidate.measured.references
        return pruned.distance <= dense.distance * (1 + max_drop)

    holding = [candidate for candidate in result.candidates if candidate.on_front and holds(candidate)]
    return max(holding, key=lambda c: c.measured.speedup if c.measured else 0.0, default=None)


def plot_front(result: Sweep, chosen: Candidate | None, path: Path) -> None:
    """SSIM over work: every candidate, the front with its measured speed-ups, what is marked, and the choice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    others = [c for c in result.candidates if not c.on_front and not c.is_marked]
    front = [c for c in result.candidates if c.on_front]
    axes.scatter([c.work for c in others], [c.metrics.ssim for c in others], color="0.7", label="other plans")
    axes.plot([c.work for c in front], [c.metrics.ssim for c in front], "o-", color="tab:blue", label="front")
    axes.plot([1.0], [1.0], "s", color="black", label="dense")
    last_labelled = -1.0
    for candidate in sorted(front, key=lambda c: c.work):
        # Labels of near points would cover each other.
        if candidate.measured is not None and candidate.work - last_labelled > _LABEL_DISTANCE:
            axes.annotate(
                f"{candidate.measured.speedup:.2f}x",
                (candidate.work, candidate.metrics.ssim),
                textcoords="offset points",
                xytext=(-8, 7),
                horizontalalignment="center",
                fontsize=8,
            )
            last_labelled = candidate.work
    for candidate in result.candidates:
        if candidate.is_marked:
            name = candidate.plan.name
            if candidate.measured is not None:
                name += f", {candidate.measured.speedup:.2f}x"
            axes.plot([candidate.work], [candidate.metrics.ssim], "D", color="tab:orange", label=name)
    if chosen is not None:
        axes.plot([chosen.work], [chosen.metrics.ssim], "*", markersize=16, color="tab:red", label="chosen")
    axes.set_xlabel("multiply-adds of the transformer, share of dense")
    axes.set_ylabel("SSIM against the dense pictures")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
