"""`fastvar inspect`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click

from fastvar_trt.runtime.engines import EngineSet, device_memory, engine_folders, read_engines
from fastvar_trt.runtime.errors import BundleError
from fastvar_trt.runtime.layout import kv_bytes
from fastvar_trt.runtime.manifest import (
    WEIGHTS_FILE,
    Condition,
    Manifest,
    ModelSpec,
    Role,
    Tokens,
    check_files,
    read_manifest,
)
from fastvar_trt.runtime.weights import TensorPlace, read_layout
from fastvar_trt.tools.cli.command import BUNDLE, ErrorCommand, examples
from fastvar_trt.tools.measure.stored import StoredMatrices, of_all_layers, stored_matrices
from fastvar_trt.tools.measure.work import activation_bytes, output_bytes
from fastvar_trt.tools.tables import format_table


@click.command(
    cls=ErrorCommand,
    epilog=examples("fastvar inspect out/b", "fastvar inspect out/b --tensors", "fastvar inspect out/b --json"),
)
@BUNDLE
@click.option("--tensors", is_flag=True, help="List the inputs and outputs of every graph.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON and nothing else.")
def inspect(bundle: Path, tensors: bool, as_json: bool) -> None:
    """Show what a bundle holds."""
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=False)
    if as_json:
        click.echo(json.dumps(manifest.to_json(), indent=1))
        return
    model, variant, plan = manifest.model, manifest.default, manifest.resolved_plan
    click.echo(
        f"{model.family}, {_sizes(model)}, {_conditions(manifest)}, "
        f"{variant.image_width}x{variant.image_height} pixels, {manifest.precision}, "
        f"{'keys and values in 8 bits, ' if manifest.integer_kv else ''}"
        f"batch {', '.join(map(str, manifest.batches))}"
    )
    first = 0 if model.drafter is None else model.drafter.depth  # plans number the refiner's layers
    told = [f"plan {variant.plan.name}"]
    if plan.cache_scale is not None:
        layers = f"{plan.first_layer - first} to {plan.last_layer - first}"
        told.append(f"cache of scale {plan.cache_scale}, layers {layers}")
    if plan.unguided_from is not None:
        told.append(f"no guidance from scale {plan.unguided_from} on")
    click.echo("; ".join(told))
    rows = [
        [k, f"{h}x{w}", h * w, plan.num_kept[k] or "skipped"] + [plan.num_past(k, plan.layers(k)[i]) for i in (0, -1)]
        for k, (h, w) in enumerate(variant.schedule)
    ]
    click.echo("\n" + format_table(["scale", "map", "tokens", "kept", "past keys, first layer", "last layer"], rows))
    layout = read_layout(bundle / WEIGHTS_FILE)
    if manifest.own_precision.is_quantised:
        stored = of_all_layers(stored_matrices(layout, manifest.own_precision))
        click.echo("\n" + _matrix_table(stored, manifest))
    memory = _memory_rows(manifest)
    click.echo("\n" + format_table(["memory, batch", *[str(b) for b in manifest.batches]], memory))
    files = [[name, f"{spec.num_bytes / 2**20:.2f}", spec.sha256[:12]] for name, spec in manifest.files.items()]
    click.echo("\n" + format_table(["file", "MiB", "SHA-256"], files))
    for folder in engine_folders(bundle):
        try:
            engines = read_engines(bundle, folder)
            click.echo("\n" + _engine_table(folder, engines))
            is_whole = all(graph.file in engines.records for graph in manifest.graphs)
            if is_whole and any(record.activation_bytes for record in engines.records.values()):
                click.echo("\n" + _peak_table(manifest, engines, layout))
        except BundleError as error:
            click.echo(f"\n{folder}: {error}")
    if tensors:
        for graph in manifest.graphs:
            click.echo(f"\n{graph.file}")
            lines = [
                [way, t.name, t.dtype, list(t.shape)]
                for way, ts in (("in", graph.inputs), ("out", graph.outputs))
                for t in ts
            ]
            click.echo(format_table(["", "tensor", "dtype", "shape"], lines))


def _matrix_table(stored: list[StoredMatrices], manifest: Manifest) -> str:
    """Matrices, and what those of few bits save."""
    precision = manifest.own_precision
    rows: list[list[object]] = [
        [
            m.name,
            m.format,
            m.count,
            f"{m.bits:.2f}",
            f"{m.num_bytes / 2**20:.2f}",
            f"{m.num_saved(precision) / 2**20:.2f}",
        ]
        for m in stored
    ]
    total, saved = sum(m.num_bytes for m in stored), sum(m.num_saved(precision) for m in stored)
    bits = 8 * total / sum(m.num_weights for m in stored)
    rows.append(
        ["all", "", sum(m.count for m in stored), f"{bits:.2f}", f"{total / 2**20:.2f}", f"{saved / 2**20:.2f}"]
    )
    header = ["matrices", "format", "count", "bits per weight", "MiB", f"MiB less than {precision.computed}"]
    return format_table(header, rows)


def _sizes(model: ModelSpec) -> str:
    own = f"{model.depth} layers x {model.width}, {model.num_heads} heads"
    if model.drafter is None:
        return own
    return f"{_sizes(model.drafter)} (drafter, {model.num_drafted} scales), {own} (refiner)"


def _conditions(manifest: Manifest) -> str:
    model = manifest.model
    subjects = {
        Condition.CLASS: f"{model.num_classes} classes",
        Condition.TEXT: f"{'text features' if manifest.text_encoder is None else 'prompts'} of up to "
        f"{model.text_length} tokens",
    }
    draws = {
        Tokens.INDEX: f"vocabulary {model.vocab_size}",
        Tokens.BITS: f"{model.vocab_size // 2} bits per token",
    }
    return f"{subjects[model.condition]}, {draws[model.tokens]}"


def _engine_table(folder: str, engines: EngineSet) -> str:
    records = engines.records.values()
    kinds = list(dict.fromkeys(kind for record in records for kind in record.kernels))
    rows: list[list[object]] = [
        [
            r.file,
            f"{r.content.num_bytes / 2**20:.2f}",
            f"{r.activation_bytes / 2**20:.1f}" if r.activation_bytes else "-",
            ", ".join(r.built_with.values()),
            ", ".join(r.targets),
            len(r.weights),
            *(r.kernels.get(kind, "-") for kind in kinds),
        ]
        for r in records
    ]
    total = sum(spec.num_bytes for spec in (*(r.content for r in records), *engines.shared.values()))
    sizes = {**{name: spec.num_bytes for name, spec in engines.shared.items()}, "all": total}
    rows += [[name, f"{size / 2**20:.2f}", "", "", "", "", *[""] * len(kinds)] for name, size in sizes.items()]
    return format_table([folder, "MiB", "activations MiB", "built with", "targets", "weights bound", *kinds], rows)


def _peak_table(manifest: Manifest, engines: EngineSet, layout: Mapping[str, TensorPlace]) -> str:
    """Memory of a GPU where a chain needs the most, by the engines' own figures."""
    ways = {"memory of the GPU": False, "with --low-memory": True}
    columns = [device_memory(manifest, engines, layout, low_memory=low_memory) for low_memory in ways.values()]
    rows: list[list[object]] = [
        [name, *(f"{column[name] / 2**20:.1f} MiB" for column in columns)] for name in columns[0]
    ]
    rows.append(["all", *(f"{sum(column.values()) / 2**20:.1f} MiB" for column in columns)])
    return format_table(["at the most", *ways], rows)


def _memory_rows(manifest: Manifest) -> list[list[object]]:
    """What the runtime holds, MiB per batch size."""

    columns = [
        {
            "weights": manifest.files[WEIGHTS_FILE].num_bytes,
            "keys and values": kv_bytes(manifest.default.chain(batch)),
            "token cache": output_bytes(manifest, batch, Role.CACHE),
            "modulations": output_bytes(manifest, batch, Role.MODULATION),
            "keys and values of the text": output_bytes(manifest, batch, Role.TEXT),
            "activations, estimated": activation_bytes(manifest, batch),
        }
        for batch in manifest.batches
    ]
    rows: list[list[object]] = [
        [name, *[f"{column[name] / 2**20:.2f} MiB" for column in columns]] for name in columns[0]
    ]
    return [*rows, ["all", *[f"{sum(column.values()) / 2**20:.2f} MiB" for column in columns]]]
