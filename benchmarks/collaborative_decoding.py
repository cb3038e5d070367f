"""CoDe at 256x256: a large VAR alone against the same one with a small refiner, dense and pruned, in turns in one run.

Weights are random: times do not depend on their values. Work, weights, keys and values are counted for any sizes;
`--no-times` leaves the rest out, and with it the checkpoints: official sizes then take seconds.

    python benchmarks/collaborative_decoding.py --drafter 30 --refiner 16 --no-times
    python benchmarks/collaborative_decoding.py --drafter 16 --refiner 8 --runs 5

Prints a table, then one JSON line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.exporter import ExportOptions, export_again, export_model
from fastvar_trt.export.models.source import Source
from fastvar_trt.export.models.var.code import CoDeSource
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.export.tracing import chain_functions
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.backends.onnxruntime import cpu_fields
from fastvar_trt.runtime.layout import kv_bytes
from fastvar_trt.runtime.plan import DENSE, PruningPlan
from fastvar_trt.runtime.precision import DTYPES, PRECISIONS
from fastvar_trt.tools.measure.compare import Pictures, take_turns
from fastvar_trt.tools.measure.work import chain_multiply_adds
from fastvar_trt.tools.random_checkpoints import PATCH_NUMS_256, random_checkpoint
from fastvar_trt.tools.tables import format_table

_OFFICIAL: dict[str, Any] = {"num_classes": 1000, "vocab_size": 4096, "vae_channels": 160}


@dataclasses.dataclass(frozen=True)
class Chain:
    """A chain to measure: its name, model and plan."""

    name: str
    source: Source
    plan: PruningPlan

    def counts(self, precision: str) -> dict[str, float]:
        """TFLOP per image, GB of weights, MB of keys and values per image."""
        fmt = PRECISIONS[precision]
        model = self.source.new_model(fmt)
        plan = model.resolve(self.plan)
        shapes = self.source.shapes(fmt, 600)
        num_bytes = sum(math.prod(shape) * DTYPES[dtype].num_bytes for shape, dtype in shapes.values())
        graphs = [function.spec for function in chain_functions(model, plan, 1)]
        return {
            "tflop": 2e-12 * chain_multiply_adds(model.model_spec(), plan),
            "weights_gb": num_bytes / 1e9,
            "kv_mb": kv_bytes(graphs) / 1e6,
        }


def chains(drafter: int, refiner: int, switch: int, *, on_meta: bool) -> list[Chain]:
    """The large model alone, and the pair, dense and pruned after the switch."""
    with torch.device("meta" if on_meta else "cpu"):
        large, vae = random_checkpoint(depth=drafter, width=64 * drafter, **_OFFICIAL)
        small, _ = random_checkpoint(depth=refiner, width=64 * refiner, **_OFFICIAL)
    # Where the schedule is read from has to hold values.
    levels = [torch.full((n * n,), k) for k, n in enumerate(PATCH_NUMS_256)]
    states: list[dict[str, Tensor]] = [{**state, "lvl_1L": torch.cat(levels)[None]} for state in (large, small)]
    pair = CoDeSource.from_states({"drafter": states[0], "refiner": states[1]}, vae, switch)
    # As FastVAR's for the last scales, of those that the refiner draws after its first step.
    num_pruned = 9 - switch
    fractions = ((-2, 0.4), (-1, 0.5))[-num_pruned:] if num_pruned else ()
    pruned = PruningPlan("pruned", fractions, cache_scale=-1 - len(fractions) if fractions else None)
    return [
        Chain(f"d{drafter} alone", VARSource.from_state(states[0], vae), DENSE),
        Chain(f"d{drafter} + d{refiner}", pair, DENSE),
        Chain(f"d{drafter} + d{refiner}, pruned", pair, pruned),
    ]


def times(found: list[Chain], folder: Path, runs: int, *, prepacked: bool) -> list[dict[str, float]]:
    """Median seconds of the steps of each."""
    bundles: list[Path] = []
    for i, chain in enumerate(found):
        bundle = folder / str(i)
        if i and chain.source is found[i - 1].source:
            export_again(bundles[-1], bundle, chain.plan)
        else:
            export_model(chain.source, bundle, ExportOptions(chain.plan, max_top_k=600, compare=False))
        if prepacked:
            build_targets(bundle, "cpu")
        bundles.append(bundle)
    seconds: list[list[float]] = [[] for _ in bundles]
    with contextlib.ExitStack() as stack:
        pipelines = [stack.enter_context(Pipeline.load(bundle, check="size")) for bundle in bundles]
        for _, turns in take_turns(pipelines, Pictures((1,) * runs, tuple(range(runs))), {}):
            for own, turn in zip(seconds, turns, strict=True):
                own.append(sum(ms for name, ms in turn.result.timings.items() if name.startswith("step")) / 1e3)
    return [{"steps_s": statistics.median(own)} for own in seconds]


@click.command()
@click.option("--drafter", default=30, show_default=True, help="Depth of the large model; its width is 64 times that.")
@click.option("--refiner", default=16, show_default=True, help="Of the small one.")
@click.option("--switch", default=8, show_default=True, type=click.IntRange(1, 9))
@click.option("--precision", default="fp16", show_default=True, help="Of what is counted; times are of fp32.")
@click.option("--times/--no-times", "measured", default=True, show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option("--prepacked/--as-exported", default=True, show_default=True, help="The first takes twice the disk.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Where bundles may lie. Default: a temporary folder.")
def main(
    drafter: int,
    refiner: int,
    switch: int,
    precision: str,
    measured: bool,
    runs: int,
    prepacked: bool,
    work_dir: Path | None,
) -> None:
    """Count and measure."""
    found = chains(drafter, refiner, switch, on_meta=not measured)
    records: list[dict[str, Any]] = [{"chain": chain.name, **chain.counts(precision)} for chain in found]
    if measured:
        with tempfile.TemporaryDirectory(dir=work_dir) as scratch:
            for record, own in zip(records, times(found, Path(scratch), runs, prepacked=prepacked), strict=True):
                record |= own
    click.echo(format_table(list(records[0]), [[_text(value) for value in record.values()] for record in records]))
    click.echo(json.dumps({"switch": switch, "precision": precision, "cpu": cpu_fields(), "chains": records}))


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    main()
