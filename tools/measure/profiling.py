"""Where the time of a bundle goes: per graph and scale, against counted work and the machine's measured ceiling."""

from __future__ import annotations

import dataclasses
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.backends.onnxruntime import cpu_fields, num_cores
from fastvar_trt.runtime.errors import BundleError
from fastvar_trt.runtime.layout import kv_bytes
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, Manifest, Role
from fastvar_trt.runtime.precision import DTYPES, in_block
from fastvar_trt.runtime.weights import TensorPlace, read_layout
from fastvar_trt.tools.measure.stored import stored_matrices
from fastvar_trt.tools.measure.work import has_cross_attention, output_bytes, step_multiply_adds
from fastvar_trt.tools.sheets import saved_figure
from fastvar_trt.tools.tables import format_table

FORMAT_VERSION = 1
_CEILING_SIDE = 2048  # of the matrix product that the ceiling is measured with
_COPIED_BYTES = 256 << 20
_OF_THE_CONDITION = frozenset({"modulation", "cross.mat_kv"})  # layers of blocks that no step runs


@dataclasses.dataclass(frozen=True)
class GraphProfile:
    """One graph over all runs.

    Attributes:
        name: `condition`, `step_00`, ..., `decoder`.
        mean_ms, p50_ms, p90_ms, p99_ms: of one call.
        share: of the sum of the means.
        tokens_kept, tokens: of a step, in its pruned layers and in all.
        multiply_adds: counted matrix products of a step, one batch.
        num_bytes: a step's matrices, read once, and its keys and values.
    """

    name: str
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    share: float
    tokens_kept: int | None = None
    tokens: int | None = None
    multiply_adds: int | None = None
    num_bytes: int | None = None
    scale: int | None = None

    @property
    def gflop_per_s(self) -> float | None:
        """Achieved arithmetic, two operations per multiply-add."""
        return None if self.multiply_adds is None else 2 * self.multiply_adds / self.p50_ms / 1e6

    @property
    def gbyte_per_s(self) -> float | None:
        """Achieved traffic, if all that is counted comes from memory once."""
        return None if self.num_bytes is None else self.num_bytes / self.p50_ms / 1e6


@dataclasses.dataclass(frozen=True)
class Profile:
    """What `fastvar profile` found; `to_json` and `from_json` are inverse."""

    conditions: Mapping[str, Any]
    graphs: tuple[GraphProfile, ...]
    overhead_ms: float  # p50 of a call of `Pipeline.generate` beyond the sum of its graphs
    ceiling: Mapping[str, float]  # of the machine: gflop_per_s, gbyte_per_s; empty where it was not measured
    memory_mib: Mapping[str, float]
    operators: Mapping[str, Mapping[str, float]]  # graph -> operator -> ms of one call; empty unless asked for

    @property
    def total_ms(self) -> float:
        """Sum of the medians."""
        return sum(graph.p50_ms for graph in self.graphs)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Any, where: str) -> Profile:
        """A profile from its JSON object.

        Raises:
            BundleError: not a profile of this release.
        """
        try:
            if data["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {data['format_version']!r}, expected {FORMAT_VERSION}")
            fields = {field.name: data[field.name] for field in dataclasses.fields(cls)}
            return cls(**{**fields, "graphs": tuple(GraphProfile(**graph) for graph in fields["graphs"])})
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{where}: not a profile of `fastvar profile` ({error}); make it again") from error


def statistics_of(samples: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles (linear interpolation) of times in ms."""
    p50, p90, p99 = np.percentile(samples, [50, 90, 99])
    return {
        "mean_ms": round(float(np.mean(samples)), 4),
        "p50_ms": round(float(p50), 4),
        "p90_ms": round(float(p90), 4),
        "p99_ms": round(float(p99), 4),
    }


def step_bytes(manifest: Manifest, layout: Mapping[str, TensorPlace], scale: int, batch: int) -> int:
    """What a step moves at least: its matrices once, as the weights file stores them, keys and values of the past read,
    new ones written, those of the text read."""
    model, plan, precision = manifest.model.at(scale), manifest.resolved_plan, manifest.own_precision
    part = "" if manifest.model.drafter is None else "refiner." if model is manifest.model else "drafter."
    alone = {f"{part}head", *([f"{part}word_embed"] if scale > 0 else [])}
    layers = tuple(f"blocks.{layer}." for layer in plan.layers(scale))
    matrices = sum(
        own.num_bytes
        for own in stored_matrices(layout, precision)
        if own.name in alone or (own.name.startswith(layers) and in_block(own.name) not in _OF_THE_CONDITION)
    )
    rows = plan.rows(scale, batch)
    keys = sum(plan.num_past(scale, layer) + plan.kept(scale, layer) for layer in plan.layers(scale))
    text = model.depth * model.text_length if has_cross_attention(model) else 0
    sizes = DTYPES[precision.kv].num_bytes * keys + DTYPES[precision.computed].num_bytes * text
    return matrices + 2 * rows * model.width * sizes


class Recorder:
    """The times of one pipeline's runs.

    Args:
        pipe: the pipeline.
        draw: called with the number of the run; returns what `pipe.generate` does for one batch.
        batch: images per run.
        conditions: what the report should say besides the machine.
    """

    def __init__(self, pipe: Pipeline, draw: Callable[[int], Any], batch: int, conditions: Mapping[str, Any]) -> None:
        self._pipe, self._draw, self._batch, self._conditions = pipe, draw, batch, conditions
        self._times: dict[str, list[float]] = defaultdict(list)
        self._overheads: list[float] = []

    @property
    def on_cpu(self) -> bool:
        """Whether the ceiling of this machine's processor is the backend's."""
        return self._pipe.backend.on_cpu

    def run(self, number: int, *, counts: bool) -> None:
        """One run; a warm-up where it does not count."""
        begin = time.perf_counter()
        result = self._draw(number)
        total = (time.perf_counter() - begin) * 1e3
        if counts:
            for name, ms in result.timings.items():
                self._times[name].append(ms)
            self._overheads.append(total - sum(result.timings.values()))

    def profile(self, warmup: int) -> Profile:
        """What the runs that counted say, and the memory of this process now."""
        manifest = self._pipe.manifest
        plan, layout = manifest.resolved_plan, read_layout(self._pipe.bundle / WEIGHTS_FILE)
        sum_of_means = sum(float(np.mean(samples)) for samples in self._times.values())
        graphs = []
        for graph in manifest.default.chain(self._batch):
            samples = self._times[graph.name]
            figures: dict[str, Any] = statistics_of(samples)
            if graph.scale is not None:
                figures |= {
                    "tokens_kept": plan.num_kept[graph.scale],
                    "tokens": plan.num_tokens(graph.scale),
                    "multiply_adds": self._batch * step_multiply_adds(manifest.model, plan, graph.scale),
                    "num_bytes": step_bytes(manifest, layout, graph.scale, self._batch),
                }
            share = round(float(np.mean(samples)) / sum_of_means, 4)
            graphs.append(GraphProfile(graph.name, share=share, scale=graph.scale, **figures))
        runs = {"warmup": warmup, "runs": len(self._overheads), "batch": self._batch}
        return Profile(
            conditions={**machine(), **self._conditions, **runs},
            graphs=tuple(graphs),
            overhead_ms=round(float(np.median(self._overheads)), 4),
            ceiling={},
            memory_mib=_memory(self._pipe, self._batch),
            operators={},
        )


def measure(
    recorders: Sequence[Recorder], warmup: int, runs: int, progress: Callable[[int], None] = lambda count: None
) -> list[Profile]:
    """Run pipelines in turns, so that what else the machine does meets them alike.

    Args:
        recorders: one per pipeline.
        warmup: runs of each before those that count.
        runs: runs of each that count.
        progress: called with 1 after every run.
    """
    for number in range(warmup + runs):
        for recorder in recorders:
            recorder.run(number, counts=number >= warmup)
            progress(1)
    profiles = [recorder.profile(warmup) for recorder in recorders]  # their memory, before the ceiling takes its own
    top = ceiling() if recorders[0].on_cpu else {}
    return [dataclasses.replace(profile, ceiling=top) for profile in profiles]


def machine() -> dict[str, Any]:
    """What times depend on."""
    name = cpu_fields().get("model name", platform.processor())
    return {"cpu": name, "cores": num_cores(), "system": platform.platform(), "python": platform.python_version()}


def ceiling() -> dict[str, float]:
    """What this processor reaches: fp32 matrix products (numpy's BLAS), and copying. Best of five."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_CEILING_SIDE, _CEILING_SIDE)).astype(np.float32) for _ in range(2))
    source = np.ones(_COPIED_BYTES // 4, dtype=np.float32)
    target = np.empty_like(source)

    def best(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return min(times)

    flop, moved = 2 * _CEILING_SIDE**3, 2 * _COPIED_BYTES  # read and written
    return {
        "gflop_per_s": round(flop / best(lambda: a @ b) / 1e9, 1),
        "gbyte_per_s": round(moved / best(lambda: np.copyto(target, source)) / 1e9, 1),
    }


def _memory(pipe: Pipeline, batch: int) -> dict[str, float]:
    manifest = pipe.manifest

    memory = {
        "weights": round(manifest.files[WEIGHTS_FILE].num_bytes / 2**20, 2),
        "keys_and_values": round(kv_bytes(manifest.default.chain(batch)) / 2**20, 2),
        "token_cache": round(output_bytes(manifest, batch, Role.CACHE) / 2**20, 2),
        "all_buffers": round(pipe.num_buffer_bytes / 2**20, 2),
        "peak_rss": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 2),
    }
    rollup = Path("/proc/self/smaps_rollup")
    if rollup.is_file():
        lines = rollup.read_text(encoding="utf-8").splitlines()
        memory["pss"] = round(sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024, 2)
    return memory


def operators_of(pipe: Pipeline, batch: int, runs: int) -> dict[str, dict[str, float]]:
    """What the backend of a pipeline measured of its operators.

    Returns:
        graph name -> operator -> ms of one run, the largest first.

    Raises:
        BackendError: it was not made to measure them.
    """
    by_file = pipe.backend.operator_times()
    result = {}
    for graph in pipe.manifest.default.chain(batch):
        ordered = sorted(by_file[graph.file].items(), key=lambda item: -item[1])
        result[graph.name] = {operator: round(ms / runs, 4) for operator, ms in ordered}
    return result


def to_table(profile: Profile) -> str:
    """The graphs for people."""
    rows: list[list[object]] = []
    for g in profile.graphs:
        gflops, gbytes = g.gflop_per_s, g.gbyte_per_s
        top = profile.ceiling
        row: list[object] = [g.name, "" if g.tokens is None else f"{g.tokens_kept}/{g.tokens}"]
        row += [f"{value:.2f}" for value in (g.mean_ms, g.p50_ms, g.p90_ms, g.p99_ms)]
        row += [f"{g.share:.1%}"]
        row += ["" if gflops is None else f"{gflops:.1f}" + (f" ({gflops / top['gflop_per_s']:.0%})" if top else "")]
        row += ["" if gbytes is None else f"{gbytes:.1f}" + (f" ({gbytes / top['gbyte_per_s']:.0%})" if top else "")]
        rows.append(row)
    rows.append(["all", "", "", f"{profile.total_ms:.2f}", "", "", "", "", ""])
    return format_table(["graph", "tokens kept", "mean ms", "p50", "p90", "p99", "share", "GFLOP/s", "GB/s"], rows)


def to_markdown(profile: Profile, title: str) -> str:
    """The report."""
    lines = [f"# {title}", "", ", ".join(f"{key} {value}" for key, value in profile.conditions.items()), ""]
    if profile.ceiling:
        lines += [
            f"Ceiling of this machine: {profile.ceiling['gflop_per_s']} GFLOP/s (fp32 product of {_CEILING_SIDE}^3), "
            f"{profile.ceiling['gbyte_per_s']} GB/s (copy). Percentages are of it; GB/s counts a step's matrices "
            "once and its keys and values.",
            "",
        ]
    lines += ["```", to_table(profile), "```", ""]
    lines += [
        f"Beyond the graphs, a call takes {profile.overhead_ms:.2f} ms ({profile.overhead_ms / profile.total_ms:.1%}).",
        "",
        "Memory, MiB (peak_rss and pss are the whole process's): "
        + ", ".join(f"{key} {value}" for key, value in profile.memory_mib.items()),
        "",
    ]
    for name, operators in profile.operators.items():
        total = sum(operators.values())
        shares = ", ".join(f"{op} {ms:.2f} ms ({ms / total:.0%})" for op, ms in list(operators.items())[:6])
        lines.append(f"- {name}: {shares}")
    return "\n".join(lines).rstrip() + "\n"


def to_trace(profile: Profile) -> dict[str, Any]:
    """One run as Chrome's and Perfetto's trace events, every graph with its median time."""
    events: list[dict[str, Any]] = []
    start = 0.0
    for g in profile.graphs:
        args = {"tokens_kept": g.tokens_kept, "tokens": g.tokens, "gflop_per_s": g.gflop_per_s}
        events.append(
            {"name": g.name, "cat": "graph", "ph": "X", "pid": 1, "tid": 1, "ts": start, "dur": g.p50_ms * 1e3}
            | {"args": {key: value for key, value in args.items() if value is not None}}
        )
        inner = start
        for operator, ms in profile.operators.get(g.name, {}).items():
            event = {"name": operator, "cat": "operators, largest first", "ph": "X", "pid": 1, "tid": 2}
            events.append({**event, "ts": inner, "dur": ms * 1e3})
            inner += ms * 1e3
        start += g.p50_ms * 1e3
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def comparison_table(a: Profile, b: Profile) -> str:
    """Two profiles graph by graph: medians, and how much faster the second is."""
    theirs = {g.name: g for g in b.graphs}
    rows: list[list[object]] = []
    for g in a.graphs:
        other = theirs.pop(g.name, None)
        second = ["-", "skipped"] if other is None else [f"{other.p50_ms:.2f}", f"{g.p50_ms / other.p50_ms:.2f}x"]
        rows.append([g.name, f"{g.p50_ms:.2f}", *second])
    rows += [[name, "-", f"{g.p50_ms:.2f}", ""] for name, g in theirs.items()]
    rows.append(["all", f"{a.total_ms:.2f}", f"{b.total_ms:.2f}", f"{a.total_ms / b.total_ms:.2f}x"])
    return format_table(["graph", "A p50 ms", "B p50 ms", "B is faster"], rows)


def plot(profiles: Mapping[str, Profile], path: Path) -> None:
    """Stacked bars: one per profile, one part per graph."""
    from matplotlib import colormaps

    scales = {g.name: g.scale for profile in profiles.values() for g in profile.graphs}
    colours = colormaps["viridis"](np.linspace(0, 0.95, max(len(scales), 2)))
    with saved_figure(path, (7, 0.9 + 0.8 * len(profiles))) as figure:
        axes = figure.subplots()
        labels = list(profiles)
        left = np.zeros(len(labels))
        for (name, scale), colour in zip(scales.items(), colours, strict=False):
            medians = {label: {g.name: g.p50_ms for g in profile.graphs} for label, profile in profiles.items()}
            widths = np.array([medians[label].get(name, 0.0) for label in labels])
            axes.barh(labels, widths, left=left, color=colour, label=name, edgecolor="white", linewidth=0.4)
            ink = "black" if colour[1] > 0.55 else "white"  # viridis becomes light as it becomes green
            for i, width in enumerate(widths):
                if width > 0.06 * max(profile.total_ms for profile in profiles.values()):
                    text = name if scale is None else str(scale)
                    axes.text(left[i] + width / 2, i, text, ha="center", va="center", color=ink, fontsize=8)
            left += widths
        axes.invert_yaxis()
        axes.set_xlabel("ms per call, medians; numbers are scales")
