"""`fastvar capture`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.runtime.request import Request, example_requests
from fastvar_trt.tools.cli.command import BUNDLE, ErrorCommand, examples
from fastvar_trt.tools.files import check_writable
from fastvar_trt.tools.measure.capture import capture_graph, write_capture
from fastvar_trt.tools.tables import format_table


@click.command(
    cls=ErrorCommand,
    short_help="Save what one graph takes and gives.",
    epilog=examples('fastvar capture out/scenes --graph step_03 --prompt "two blue cubes on snow" -o out/step_03'),
)
@BUNDLE
@click.option("--graph", required=True, help="Its name in timings: condition, step_03, decoder, ...")
@click.option("--class", "label", type=int, help="What is drawn; default: an example.")
@click.option("--prompt", help="Likewise, of a model of text.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder; must not exist.")
def capture(bundle: Path, graph: str, label: int | None, prompt: str | None, seed: int, out: Path) -> None:
    """Save what one graph takes and gives, to debug it alone: by ONNX Runtime, or by Polygraphy against TensorRT.

    The chain of the smallest batch size runs on the CPU: as the exporter wrote it, or, in half precision, as `fastvar
    build --target cpu` made it.
    """
    if label is not None and prompt is not None:
        raise click.UsageError("give one of --class and --prompt")
    if out.exists():
        raise RequestError(f"--out {out}: exists already; give another folder")
    check_writable(out)
    manifest = read_manifest(bundle)
    if label is None and prompt is None:
        (request,) = example_requests(manifest, 1)
    else:
        request = Request(label=label, prompt=prompt, seed=seed)
    captured = capture_graph(bundle, graph, request)
    write_capture(out, captured)
    rows: list[list[object]] = [
        [kind, name, array.dtype, list(array.shape)] for kind, own in captured.items() for name, array in own.items()
    ]
    click.echo(format_table(["", "tensor", "dtype", "shape"], rows))
    file = next(own.file for own in manifest.default.chain(min(manifest.batches)) if own.name == graph)
    arguments = ("run", bundle / file, "--onnxrt", "--data-loader-script", out / "load_data.py")
    common = shlex.join(["polygraphy", *map(str, arguments)])
    click.echo(f"\n{common}\n{common} --trt --onnx-outputs mark all --trt-outputs mark all --fail-fast")
    click.echo(json.dumps({"graph": graph, "out": str(out), "tensors": len(rows)}))
