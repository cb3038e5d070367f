"""A pruning plan by measurement: sweep, keep the front of work and quality, time it in the runtime, choose.

The sweep runs in eager PyTorch over the bundle's own weights: the scales before the first pruned one are the same for
every candidate and run once. With a budget, half of the candidates are left out after each round of pictures: those
that lie behind the front, then some of its crowded parts (after successive halving, Jamieson and Talwalkar, arXiv
1502.07943). Only the candidates on the front are exported and timed.

Quality is the share of pictures that show what their prompts ask for, where somebody looks; else the SSIM against the
dense pictures.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from fastvar_trt.tools.measure.evaluate import Judge, Share
from fastvar_trt.tools.measure.quality import (
    ImageMetrics,
    ReferenceMetrics,
    image_metrics,
    mean_metrics,
    reference_metrics,
)
from fastvar_trt.tools.measure.work import relative_work
from fastvar_trt.tools.sheets import saved_figure

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
        num_images: how many were drawn, of those that were asked for; on the front all of them.
        compliance: how many show what was asked for; None where nobody looks.
        references: against photographs of the classes; None without any.
        on_front: it has drawn all pictures, and nothing with less work is as good.
        is_marked: it was asked for by name: measured and shown wherever it lies.
        measured: through exported graphs and the runtime; of the front, and what is marked.
    """

    plan: PruningPlan
    work: float
    metrics: ImageMetrics
    references: ReferenceMetrics | None
    num_images: int = 0
    compliance: Share | None = None
    on_front: bool = False
    is_marked: bool = False
    measured: Comparison | None = None

    @property
    def quality(self) -> tuple[float, float]:
        """What candidates are ordered by: compliance where there is one, then SSIM."""
        return (0.0 if self.compliance is None else self.compliance.value, self.metrics.ssim)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "plan": self.plan.to_json(),
            "work": round(self.work, 4),
            "images": self.num_images,
            "metrics": self.metrics.to_json(),
            "compliance": None if self.compliance is None else self.compliance.to_json(),
            "references": None if self.references is None else dataclasses.asdict(self.references),
            "on_front": self.on_front,
            "is_marked": self.is_marked,
            "measured": None if self.measured is None else self.measured.to_json(),
        }


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All candidates by rising work, and the dense chain that they are judged against."""

    candidates: tuple[Candidate, ...]
    dense_compliance: Share | None = None


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

    Raises:
        PlanError: a scale that is not counted from the end.
    """
    for option, scales in (("--cache-scales", cache_scales), ("--unguided-from", unguided_from)):
        if (highest := max(scales, default=-1)) >= 0:
            raise PlanError(f"{option}: got {highest}, expected -1 or less: scales are counted from the end")
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
        self._prefixes: dict[tuple[tuple[int, ...], int], ChainState] = {}  # scales that ran, and the cache's

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
        key = tuple(k for k in plan.steps if k < end), plan.cache_scale
        if key not in self._prefixes:
            self._prefixes[key] = self._run_prefix(plan, end)
        state = self._prefixes[key]
        past, caches, handed_on = dict(state.past), dict(state.caches), dict(state.handed_on)
        return dataclasses.replace(state, past=past, caches=caches, handed_on=handed_on)

    def _run_prefix(self, plan: ResolvedPlan, end: int) -> ChainState:
        state = ChainState.begin(self._model, self._inputs, self._seeds)
        full = dataclasses.replace(plan, first_layer=0, last_layer=plan.depth - 1)
        for scale in (k for k in plan.steps if k < end):
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


@dataclasses.dataclass(frozen=True)
class Study:
    """What plans are judged by.

    Attributes:
        bundle: the weights, whatever its own plan.
        pictures: what is drawn.
        cfg: guidance scale.
        references: class -> photographs uint8 [M, H, W, 3]; None without any.
        judge: looks whether pictures show what their prompts ask for; None where nobody does.
    """

    bundle: Path
    pictures: Pictures
    cfg: float
    references: dict[int, NDArray[Any]] | None = None
    judge: Judge | None = None


@dataclasses.dataclass
class _Drawn:
    """What a plan has drawn so far."""

    study: Study
    plan: PruningPlan
    work: float
    is_marked: bool
    num_images: int = 0
    held: int = 0
    metrics: list[ImageMetrics] = dataclasses.field(default_factory=list)
    references: list[tuple[ReferenceMetrics, int]] = dataclasses.field(default_factory=list)  # and of how many images

    def add(self, images: NDArray[Any], dense: NDArray[Any]) -> None:
        """Judge the next pictures, beside the dense ones."""
        study, start = self.study, self.num_images
        self.num_images += len(images)
        self.metrics += [image_metrics(x, y, vif=False) for x, y in zip(dense, images, strict=True)]
        if study.references is not None:
            labels = study.pictures[start : self.num_images].labels
            self.references.append((reference_metrics(images, labels, study.references), len(images)))
        if study.judge is not None:
            self.held += study.judge.share(list(images), start).held

    def candidate(self) -> Candidate:
        """By all pictures so far."""
        return Candidate(
            self.plan,
            self.work,
            mean_metrics(self.metrics),
            self._mean_references(),
            self.num_images,
            None if self.study.judge is None else Share(self.held, self.num_images),
            is_marked=self.is_marked,
        )

    def _mean_references(self) -> ReferenceMetrics | None:
        if not self.references:
            return None
        parts, sizes = zip(*self.references, strict=True)
        return ReferenceMetrics(
            distance=float(np.average([part.distance for part in parts], weights=sizes)),
            accuracy=float(np.average([part.accuracy for part in parts], weights=sizes)),
        )


def distinct(plans: Sequence[PruningPlan], marked: Sequence[PruningPlan]) -> tuple[PruningPlan, ...]:
    """Candidates without doubles and without those that are marked."""
    return tuple(plan for plan in dict.fromkeys(plans) if plan not in marked)


def rounds(num_pictures: int, num_plans: int, budget: int | None) -> list[tuple[range, int]]:
    """Which pictures are drawn by how many of the candidates: half of them are left out after every round.

    Args:
        num_pictures: what those draw that stay to the end.
        num_plans: candidates.
        budget: pictures that all candidates may draw together; None: all draw all.

    Raises:
        PlanError: not enough for any number of rounds.
    """
    cost = 0
    for count in range(1, num_pictures + 1):
        bounds = itertools.pairwise(num_pictures * i // count for i in range(count + 1))
        found = [(range(start, stop), -(-num_plans // 2**i)) for i, (start, stop) in enumerate(bounds)]
        cost = sum(len(rows) * alive for rows, alive in found)
        if budget is None or cost <= budget:
            return found
    raise PlanError(
        f"--budget {budget}: {num_plans} candidates and {num_pictures} pictures need {cost} at least; allow more, or "
        "give fewer candidates"
    )


def sweep(
    study: Study,
    plans: Sequence[PruningPlan],
    marked: Sequence[PruningPlan] = (),
    budget: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Sweep:
    """Judge every plan by its pictures.

    Args:
        study: what they are judged by.
        plans: candidates, `distinct` from those that are marked.
        marked: further candidates, which draw all pictures and are measured and shown wherever they lie.
        budget: how many pictures the candidates may draw together, besides those that are marked; None: all of theirs.
        progress: called with the number of images drawn since the last call, the dense ones included.

    Raises:
        PlanError: a plan that does not fit the model, or a budget that is too small.
    """
    model, manifest = load_bundle_model(study.bundle)
    tokenizer = PromptTokenizer(study.bundle, manifest)
    everything = model.resolve(DENSE)
    resolved = {plan: model.resolve(plan) for plan in (*marked, *plans)}
    drawn = {plan: _Drawn(study, plan, relative_work(manifest, own), plan in marked) for plan, own in resolved.items()}
    pictures, dense_held, alive = study.pictures, 0, list(plans)
    for rows, count in rounds(len(pictures), len(alive), budget):
        if count < len(alive):
            alive = [one.plan for one in best((drawn[plan].candidate() for plan in alive), count)]
        for start in range(rows.start, rows.stop, _BATCH):  # outermost: the states that plans share are of one batch
            part = pictures[start : min(start + _BATCH, rows.stop)]
            drawer = _Drawer(model, condition_inputs(model, tokenizer, part), part.seeds, study.cfg)
            dense = drawer.draw(everything)
            if study.judge is not None:
                dense_held += study.judge.share(list(dense), start).held
            progress(len(part))
            for plan in dict.fromkeys((*marked, *alive)):
                drawn[plan].add(drawer.draw(resolved[plan]), dense)
                progress(len(part))

    candidates = sorted((own.candidate() for own in drawn.values()), key=_by_work)
    front = {one.plan for one in _front(one for one in candidates if one.num_images == len(pictures))}
    return Sweep(
        tuple(dataclasses.replace(one, on_front=one.plan in front) for one in candidates),
        None if study.judge is None else Share(dense_held, len(pictures)),
    )


def _by_work(candidate: Candidate) -> tuple[float, ...]:
    return (candidate.work, *(-value for value in candidate.quality))


def _front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that are better than all with less work."""
    front: list[Candidate] = []
    for one in sorted(candidates, key=_by_work):
        if not front or one.quality > front[-1].quality:
            front.append(one)
    return front


def best(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """So many of them: the front, then that of the others, and so on; of one that is too long, some all along it."""
    rest, found = list(candidates), list[Candidate]()
    while rest and len(found) < count:
        front = _front(rest)
        room = count - len(found)
        if room < len(front):
            # The best one, and evenly to the one with least work.
            last = len(front) - 1
            front = [front[last - last * i // max(room - 1, 1)] for i in range(room)]
        found += front
        taken = {one.plan for one in front}
        rest = [one for one in rest if one.plan not in taken]
    return found


def measure_front(
    study: Study, result: Sweep, folder: Path, progress: Callable[[int], None] = lambda count: None
) -> Sweep:
    """Export the plans of the front, and those that are marked, and run each beside the dense chain.

    Args:
        study: what they are judged by.
        result: of `sweep`.
        folder: where the bundles may lie; the caller removes it.
        progress: called with the number of plans measured since the last call.
    """
    dense = folder / "dense"
    export_again(study.bundle, dense, DENSE, batches=(min(read_manifest(study.bundle).batches),))
    progress(1)
    candidates = list(result.candidates)
    dense_held: Share | None = None  # of the same pictures beside every plan
    with Pipeline.load(dense, check="size") as reference:
        for i, candidate in enumerate(candidates):
            if not (candidate.on_front or candidate.is_marked):
                continue
            pruned = folder / f"plan_{i}"
            export_again(dense, pruned, candidate.plan)
            with Pipeline.load(pruned, check="size") as pipe:
                options = shared_sampling([reference, pipe], study.cfg)
                a, b = draw_side_by_side([reference, pipe], study.pictures, options)
            measured = compare(a, b, study.pictures, study.references)
            held = None
            if study.judge is not None:
                dense_held = dense_held or study.judge.share(list(a.images))
                held = study.judge.share(list(b.images))
            candidates[i] = dataclasses.replace(candidate, measured=measured, compliance=held)
            shutil.rmtree(pruned)
            progress(1)
    return dataclasses.replace(
        result, candidates=tuple(candidates), dense_compliance=dense_held or result.dense_compliance
    )


def choose(result: Sweep, *, min_ssim: float, max_drop: float, max_loss: float = 0.0) -> Candidate | None:
    """The fastest plan of the front whose pictures hold; None where none does.

    Args:
        result: a sweep whose front was measured.
        min_ssim: mean SSIM against the dense pictures.
        max_drop: relative rise of the distance to the photographs of the classes, where there are some.
        max_loss: share of the prompts that may hold less often than dense, where somebody looks.
    """

    def holds(candidate: Candidate) -> bool:
        if candidate.measured is None or candidate.measured.mean.ssim < min_ssim:
            return False
        held, dense_held = candidate.compliance, result.dense_compliance
        if held is not None and dense_held is not None and held.value < dense_held.value - max_loss:
            return False
        if candidate.measured.references is None:
            return True
        dense, pruned = candidate.measured.references
        return pruned.distance <= dense.distance * (1 + max_drop)

    holding = [candidate for candidate in result.candidates if candidate.on_front and holds(candidate)]
    return max(holding, key=lambda c: c.measured.speedup if c.measured else 0.0, default=None)


def plot_front(result: Sweep, chosen: Candidate | None, path: Path) -> None:
    """Quality over work: every candidate, the front with its measured speed-ups, what is marked, and the choice."""
    looked_at = result.dense_compliance is not None

    def place(candidate: Candidate) -> tuple[float, float]:
        return candidate.work, candidate.quality[0 if looked_at else 1]

    dense = 1.0 if result.dense_compliance is None else result.dense_compliance.value
    num_images = max(c.num_images for c in result.candidates)
    others = [place(c) for c in result.candidates if not c.on_front and not c.is_marked and c.num_images == num_images]
    left_out = [place(c) for c in result.candidates if c.num_images < num_images]
    front = sorted((c for c in result.candidates if c.on_front), key=lambda c: c.work)
    with saved_figure(path, (7, 4.5)) as figure:
        axes = figure.subplots()
        if others:
            axes.scatter([x for x, _ in others], [y for _, y in others], color="0.7", label="other plans")
        if left_out:  # judged by fewer pictures
            axes.scatter([x for x, _ in left_out], [y for _, y in left_out], color="0.8", marker="x", label="left out")
        axes.plot(*zip(*map(place, front), strict=True), "o-", color="tab:blue", label="front")
        axes.plot([1.0], [dense], "ks", label="dense")
        last_labelled = -1.0
        for candidate in front:
            # Labels of near points would cover each other.
            if candidate.measured is not None and candidate.work - last_labelled > _LABEL_DISTANCE:
                axes.annotate(
                    f"{candidate.measured.speedup:.2f}x",
                    place(candidate),
                    textcoords="offset points",
                    xytext=(-8, 7),
                    horizontalalignment="center",
                    fontsize=8,
                )
                last_labelled = candidate.work
        for i, candidate in enumerate(c for c in result.candidates if c.is_marked):
            name = candidate.plan.name
            if candidate.measured is not None:
                name += f", {candidate.measured.speedup:.2f}x"
            axes.plot(*place(candidate), "D", color=f"C{i + 1}", label=name)
        if chosen is not None:
            axes.plot(*place(chosen), "*", markersize=16, color="tab:red", label="chosen")
        axes.set_xlabel("multiply-adds of the transformer, share of dense")
        axes.set_ylabel("pictures that show their prompt, share" if looked_at else "SSIM against the dense pictures")
        axes.grid(alpha=0.3)
        axes.margins(0.1)
        axes.legend(loc="best")
