"""`fastvar verify`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from fastvar_trt.runtime.errors import BundleError
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.tools.cli.command import BUNDLE, ErrorCommand, RuntimeOptions, examples, runtime_options
from fastvar_trt.tools.tables import format_table


@click.command(
    cls=ErrorCommand,
    short_help="Check files, and draw PyTorch's pictures again.",
    epilog=examples("fastvar verify out/b", "fastvar verify out/b --engines require"),
)
@BUNDLE
@runtime_options
def verify(bundle: Path, runtime: RuntimeOptions) -> None:
    """Check every file's hash, then draw the images that PyTorch drew at export and compare."""
    with runtime.load(bundle) as pipe:
        outcome = verify_bundle(pipe)
        num_files, precision = len(pipe.manifest.files), pipe.manifest.own_precision

    def show(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    rows = [
        [
            s.batch,
            s.scale,
            s.num_images,
            show(s.token_agreement, ".2%"),
            show(s.logits_error, ".2g"),
            show(s.relative_error, ".2g"),
            show(s.positions_off, ".1%"),
        ]
        for s in outcome.steps
    ]
    click.echo(
        format_table(
            ["batch", "scale", "images compared", "tokens equal", "max logits error", "relative", "positions off"], rows
        )
    )
    click.echo(
        f"{num_files} files match the manifest; {outcome.num_images_equal} of {outcome.num_images} images compared to "
        f"their end, on PyTorch's tokens, max image error {show(outcome.image_error, '.2g')}"
    )
    if not outcome.failures:
        click.echo(f"all within the tolerance of {precision.name}, {precision.tolerance.error:g} of the largest logit")
    click.echo(json.dumps(dataclasses.asdict(outcome)))
    if outcome.failures:
        raise BundleError(f"bundle {bundle} does not compute what PyTorch computed: {'; '.join(outcome.failures)}")
