"""`fastvar doctor`."""

from __future__ import annotations

import json
import platform
import re
from importlib import metadata
from pathlib import Path

import click

from fastvar_trt.runtime.backends import BACKENDS
from fastvar_trt.runtime.engines import engine_folders, read_engines
from fastvar_trt.runtime.errors import FastVARError
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.tools.cli.command import ErrorCommand, examples
from fastvar_trt.tools.tables import format_table

_PACKAGE = "fastvar-trt"
_PURPOSES = {
    "cpu": "run bundles on the CPU",
    "gpu": "run bundles by ONNX Runtime on a GPU",
    "rtx": "build and run engines of TensorRT for RTX",
    "tensorrt": "build and run engines of enterprise TensorRT",
    "export": "export and build",
    "text": "prompts",
    "quality": "compare, evaluate, tune, plots",
    "serve": "serve over HTTP",
    "ray": "replicas by Ray Serve",
}


@click.command(
    cls=ErrorCommand,
    short_help="Say what is installed, and what runs here.",
    epilog=examples("fastvar doctor", "fastvar doctor out/infinity"),
)
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
def doctor(bundles: tuple[Path, ...]) -> None:
    """Say what is installed, which backends can run here and why others cannot, and what to install for more.

    Of bundles that are given: for what engines were built.
    """
    click.echo(f"{_PACKAGE} {metadata.version(_PACKAGE)}, Python {platform.python_version()}, {platform.platform()}\n")
    extras = {extra: _missing(extra) for extra in _PURPOSES}
    rows: list[list[object]] = [
        [extra, purpose, "installed" if not extras[extra] else f"missing {', '.join(extras[extra])}"]
        for extra, purpose in _PURPOSES.items()
    ]
    click.echo(format_table(["extra", "for", "state"], rows))
    absent = [extra for extra, missing in extras.items() if missing]
    if absent:
        click.echo(f"\nfor more: pip install '{_PACKAGE}[EXTRA]' (exactly one of cpu and gpu)")
    backends = _backends()
    click.echo("\nbackends:")
    for backend, device, state, _ in backends:
        click.echo(click.wrap_text(f"{backend} on {device} {state}", 78, "  ", "      "))
    found = {str(bundle): _engines(bundle) for bundle in bundles}
    for name, engines in found.items():
        own: list[list[object]] = [[folder, targets, versions, count] for folder, targets, versions, count in engines]
        click.echo(
            "\n" + format_table([f"engines of {name}", "for", "built with", "graphs"], own or [["none", "", "", ""]])
        )
    report = {
        "extras": {extra: not missing for extra, missing in extras.items()},
        "backends": {f"{backend} {device}": runs for backend, device, _, runs in backends},
        "engines": {name: {folder: targets for folder, targets, *_ in engines} for name, engines in found.items()},
    }
    click.echo("\n" + json.dumps(report))


def _missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed here."""
    missing = []
    for line in metadata.requires(_PACKAGE) or []:
        requirement, _, marker = line.partition(";")
        if f'extra == "{extra}"' not in marker:
            continue
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        name = "" if match is None else match[0]
        if name == _PACKAGE:  # an extra of ours
            inner = re.search(r"\[(.*?)\]", requirement)
            missing += [] if inner is None else _missing(inner[1])
            continue
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def _backends() -> list[tuple[str, str, str, bool]]:
    """Backend, kind of device, what it would run on or why it cannot, and whether it can."""
    found = []
    for entry in BACKENDS.values():
        for device, check in entry.checks.items():
            try:
                found.append((entry.name, device, f"runs: {check()}", True))
            except FastVARError as error:
                found.append((entry.name, device, f"cannot run: {error}", False))
    return found


def _engines(bundle: Path) -> list[tuple[str, str, str, int]]:
    """Folder, targets, versions and count of what was built of a bundle."""
    read_manifest(bundle)
    found = []
    for folder in engine_folders(bundle):
        records = list(read_engines(bundle, folder).records.values())
        targets = sorted({target for record in records for target in record.targets})
        versions = sorted({f"{name} {v}" for record in records for name, v in record.built_with.items()})
        found.append((folder, ", ".join(targets), ", ".join(versions), len(records)))
    return found
