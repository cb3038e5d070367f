"""`fastvar build`."""

from __future__ import annotations

from pathlib import Path

import click

from fastvar_trt.tools.cli.command import BUNDLE, ErrorCommand, examples, extras, progress_bars


@click.command(
    cls=ErrorCommand,
    epilog=examples(
        "fastvar build out/b --target cpu",
        "fastvar build out/b --target sm86,sm89,sm120",
        "fastvar build out/b --target current",
    ),
)
@BUNDLE
@click.option(
    "--target",
    "targets",
    required=True,
    metavar="T,T,...",
    help="cpu, cuda, sm75 ... sm121, current, current+plugins; the error for another one lists all.",
)
def build(bundle: Path, targets: str) -> None:
    """Build what targets need beyond the graphs.

    cpu: weights prepacked for this processor. cuda: graphs for ONNX Runtime's CUDA provider. sm75, sm80, sm86, sm89,
    sm120, sm121: engines of TensorRT for RTX, built without a GPU (extra `rtx`). current: engines of enterprise
    TensorRT for this machine's GPU (extra `tensorrt`); current+plugins: the same with our CUDA kernels for the cache
    operator, which have not been run yet. All need the extra `export`. Only what is missing or stale is built.
    """
    with extras("export,cpu"):
        from fastvar_trt.export.build.registry import build_targets
    with progress_bars() as progress:
        reports = build_targets(bundle, targets, progress)
    for report in reports:
        click.echo(report.line(bundle))
