"""The time that engines need on a GPU, by the layers that TensorRT listed when it built them: a model, not measured.

Every layer is one launch that moves `num_bytes` and computes `flop`, and takes the longer of the two. `least_ms` is
what the GPU's data sheet allows; `probable_ms` takes shares of it that large kernels of that kind commonly reach, what
a short launch takes however little it does, and the gap between two of them in a CUDA graph. Layers that run beside
each other on TensorRT's auxiliary streams are counted one after another.

Limits: bytes are those of whole tensors, though rows that are gathered are read alone; caches of the GPU are not
modelled; nor are its clock and power limits. It is made to compare graphs, not GPUs.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastvar_trt.runtime.engines import EngineLayer, EngineSet
from fastvar_trt.runtime.errors import BackendError
from fastvar_trt.runtime.manifest import Manifest
from fastvar_trt.runtime.registry import Registry
from fastvar_trt.tools.measure.work import step_multiply_adds
from fastvar_trt.tools.tables import format_table

LAUNCH_US = 2.5  # the shortest kernel
SORT_US = 50.0  # a sort of few rows: its passes wait for each other
GAP_US = 1.0  # between two kernels of a CUDA graph
BANDWIDTH_SHARE = 0.85
# The others are comparisons of scores.
ARITHMETIC_SHARE: Mapping[str, float] = {"linear": 0.75, "attention": 0.5, "convolution": 0.6}
_OTHER_ARITHMETIC_SHARE = 0.5
_COUNTED = ("linear", "attention")  # by `measure.work`, of a step


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet.

    Attributes:
        name: on the command line.
        target: compute capability, as `fastvar build --target` calls it.
        half_tflop_per_s: dense products of fp16 or bf16 with sums in fp32, on tensor cores.
        int8_tflop_per_s: of int8 with sums in int32.
        fp8_tflop_per_s: of fp8 with sums in fp32; 0 where there are none.
        float_tflop_per_s: fp32 outside tensor cores.
        gbyte_per_s: of device memory.
    """

    name: str
    target: str
    half_tflop_per_s: float
    int8_tflop_per_s: float
    fp8_tflop_per_s: float
    float_tflop_per_s: float
    gbyte_per_s: float


# NVIDIA's architecture white papers (Ampere GA102, Ada, Blackwell) and data sheets (L40S, A100 80 GB SXM).
GPUS: Registry[Gpu] = Registry(
    Gpu("rtx3090", "sm86", 71.0, 284.0, 0.0, 35.6, 936.0),
    Gpu("rtx4090", "sm89", 165.2, 660.6, 330.3, 82.6, 1008.0),
    Gpu("rtx5090", "sm120", 209.5, 838.0, 419.0, 104.8, 1792.0),
    Gpu("l40s", "sm89", 362.0, 733.0, 733.0, 91.6, 864.0),
    Gpu("a100", "sm80", 312.0, 624.0, 0.0, 19.5, 2039.0),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Layers taken together.

    Attributes:
        launches: how many layers.
        num_bytes, flop: of all.
        least_ms, probable_ms: see the module.
    """

    launches: int
    num_bytes: int
    flop: int
    least_ms: float
    probable_ms: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the engines of one chain need on one GPU.

    Attributes:
        gpu: its name.
        graphs: graph name -> all its layers.
        kinds: graph name -> kind of layer -> those layers.
        flop_counted: graph name -> arithmetic of a step, counted from the model's sizes (`measure.work`).
    """

    gpu: str
    graphs: Mapping[str, Part]
    kinds: Mapping[str, Mapping[str, Part]]
    flop_counted: Mapping[str, int]

    @property
    def total(self) -> Part:
        """The whole picture."""
        return _sum(self.graphs.values())

    @property
    def by_kind(self) -> dict[str, Part]:
        """Kind of layer -> those of all graphs, the longest first; the decoder's apart."""
        parts: dict[str, list[Part]] = defaultdict(list)
        for graph, by_kind in self.kinds.items():
            for kind, part in by_kind.items():
                parts[kind if graph in self.flop_counted else f"{graph}: {kind}"].append(part)
        summed = {kind: _sum(of_kind) for kind, of_kind in parts.items()}
        return dict(sorted(summed.items(), key=lambda item: -item[1].probable_ms))

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**dataclasses.asdict(self), "total": dataclasses.asdict(self.total)}


def estimate(manifest: Manifest, engines: EngineSet, batch: int, gpu: Gpu) -> Estimate:
    """What a bundle's engines need for one batch.

    Args:
        manifest: of the bundle.
        engines: of all its graphs, built by TensorRT.
        batch: which of the bundle's batch sizes.
        gpu: one of `GPUS`.

    Raises:
        BackendError: an engine that is missing, not for this GPU, or whose builder listed no layers.
    """
    kinds: dict[str, dict[str, Part]] = {}
    counted = {}
    for graph in manifest.default.chain(batch):
        record = engines.records.get(graph.file)
        if record is None or gpu.target not in record.targets:
            there = "none" if record is None else f"one for {', '.join(record.targets)}"
            raise BackendError(
                f"{graph.file}: got {there}, expected an engine for {gpu.target} ({gpu.name}); run `fastvar build "
                f"--target {gpu.target}`"
            )
        if not record.layers:
            raise BackendError(f"{record.file}: TensorRT listed no layers when it was built; build it again")
        by_kind: dict[str, list[EngineLayer]] = defaultdict(list)
        for layer in record.layers:
            by_kind[layer.kind].append(layer)
        kinds[graph.name] = {kind: _part(layers, gpu) for kind, layers in by_kind.items()}
        if graph.scale is not None:
            counted[graph.name] = 2 * batch * step_multiply_adds(manifest.model, manifest.resolved_plan, graph.scale)
    graphs = {name: _sum(parts.values()) for name, parts in kinds.items()}
    return Estimate(gpu.name, graphs, kinds, counted)


def _part(layers: Sequence[EngineLayer], gpu: Gpu) -> Part:
    times = [_times(layer, gpu) for layer in layers]
    return Part(
        launches=len(layers),
        num_bytes=sum(layer.num_bytes for layer in layers),
        flop=sum(layer.flop for layer in layers),
        least_ms=sum(least for least, _ in times),
        probable_ms=sum(probable for _, probable in times),
    )


def _times(layer: EngineLayer, gpu: Gpu) -> tuple[float, float]:
    """Milliseconds: at least, and probably."""
    peaks = {
        "float32": gpu.float_tflop_per_s,
        "int8": gpu.int8_tflop_per_s,
        "float8_e4m3fn": gpu.fp8_tflop_per_s,
    }
    peak = peaks.get(layer.dtype, gpu.half_tflop_per_s)
    moving = layer.num_bytes / gpu.gbyte_per_s / 1e6
    computing = layer.flop / peak / 1e9
    share = ARITHMETIC_SHARE.get(layer.kind, _OTHER_ARITHMETIC_SHARE)
    floor = SORT_US if layer.kind == "sort" else LAUNCH_US
    probable = max(moving / BANDWIDTH_SHARE, computing / share, floor / 1e3)
    return max(moving, computing), probable + GAP_US / 1e3


def _sum(parts: Iterable[Part]) -> Part:
    parts = list(parts)
    return Part(**{f.name: sum(getattr(part, f.name) for part in parts) for f in dataclasses.fields(Part)})


def to_table(result: Estimate) -> str:
    """For people: by graph, then by kind of layer."""
    header = ["launches", "GB", "TFLOP", "at least ms", "probably ms"]

    def row(name: str, part: Part, *more: str) -> list[object]:
        figures = (f"{part.num_bytes / 1e9:.2f}", f"{part.flop / 1e12:.3f}")
        return [name, part.launches, *figures, f"{part.least_ms:.2f}", f"{part.probable_ms:.2f}", *more]

    def ratio(name: str) -> str:
        counted = result.flop_counted.get(name)
        kinds = result.kinds[name]
        return f"{sum(kinds[kind].flop for kind in _COUNTED if kind in kinds) / counted:.3f}" if counted else ""

    rows = [row(name, part, ratio(name)) for name, part in result.graphs.items()]
    by_kind = [row(name, part) for name, part in result.by_kind.items()]
    return "\n\n".join(
        (
            format_table(
                [f"{result.gpu}, estimated", *header, "of counted TFLOP"], [*rows, row("all", result.total, "")]
            ),
            format_table(["kind of layer", *header], by_kind),
        )
    )
