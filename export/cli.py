"""`fastvar-export`: checkpoints in, a bundle out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from fastvar_trt.runtime.command import ErrorCommand, integers
from fastvar_trt.runtime.errors import CheckpointError, ExportError
from fastvar_trt.runtime.plan import INFINITY_SIZES, PRESETS, infinity_preset, load_plan

_DEFAULT_PLANS = {"demo": "fastvar-demo", "var": "fastvar-var"}
_EXAMPLES = """
\b
Examples:
  fastvar-export demo --out out/demo
  fastvar-export bundle --from out/demo --prune none --out out/demo_dense
  fastvar-export var --checkpoint var_d16.pth --vae vae_ch160v4096z32.pth --out out/d16
  fastvar-export var --checkpoint var_d36.pth --vae vae_ch160v4096z32.pth \\
      --prune my_plan.json --precision fp16 --batch 1,4 --out out/d36 --target sm86,sm89
  fastvar-export infinity --checkpoint infinity_2b_reg.pth --vae infinity_vae_d32reg.pth --pn 1M --h-div-w 1.333 \\
      --precision fp16 --out out/infinity_1m
  fastvar-export bundle --from out/demo --triton out/model_repository
"""


class _Aspect(click.ParamType):
    """`W:H` as height over width."""

    name = "W:H"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """`16:9` -> 0.5625."""
        if isinstance(value, float):
            return value
        try:
            width, height = (float(part) for part in value.split(":"))
            return height / width
        except (ValueError, ZeroDivisionError):
            self.fail(f"got {value!r}, expected two numbers as in 4:3", param, ctx)


class _Progress:
    """One bar per graph, advancing with its phases."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, graph: str, phase: str) -> None:
        from fastvar_trt.export.exporter import PHASES

        if phase == PHASES[0]:
            self._bar = click.progressbar(
                length=len(PHASES),
                label=f"{graph:<18}",
                item_show_func=lambda item: item,
                show_eta=False,
                width=24,
            )
            self._bar.__enter__()
            self._bar.update(0, phase)
        elif phase == "done":
            self._bar.update(self._bar.length - self._bar.pos, phase)
            self.close()
        else:
            self._bar.update(1, phase)

    def close(self) -> None:
        """End the line of an unfinished bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


@click.command(cls=ErrorCommand, epilog=_EXAMPLES)
@click.argument("model", type=click.Choice(["demo", "var", "infinity", "bundle"]))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The official file, or a folder of shards.")
@click.option("--vae", type=click.Path(path_type=Path), help="The official file of its VAE.")
@click.option("--from", "bundle", type=click.Path(path_type=Path), help="The bundle whose weights get another plan.")
@click.option("--config", help="JSON of what state dicts do not tell: num_heads, patch_nums, quant_resi (0.5).")
@click.option(
    "--prune",
    help=f"Pruning plan: a preset ({', '.join(PRESETS)}) or a JSON file. Default: the model's own preset.",
)
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), help="Default: fp32; with --from, its own.")
@click.option(
    "--batch", "batches", type=integers(), help="Batch sizes: N or N,N,...  Default: 1; with --from, its own."
)
@click.option("--max-top-k", type=click.IntRange(0), help="Bound of top-k; 0: no bound. Default: 900.")
@click.option("--pn", type=click.Choice(INFINITY_SIZES), help="Infinity: pixels of the image. Default: 1M.")
@click.option("--h-div-w", type=float, help="Infinity: height over width. Default: 1.")
@click.option("--aspect", type=_Aspect(), help="Infinity: width to height as W:H, the same said otherwise.")
@click.option("--text-length", type=click.IntRange(1), help="Infinity: longest prompt in tokens. Default: the model's.")
@click.option(
    "--text-encoder", type=click.Path(path_type=Path), help="Infinity: Hugging Face folder of flan-t5, for prompts."
)
@click.option("--target", "targets", metavar="T,T,...", help="Also build for these targets, as `fastvar build` does.")
@click.option(
    "--triton",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write the bundle as a model into this model repository of Triton Inference Server.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
def main(
    model: str,
    out: Path | None,
    checkpoint: Path | None,
    vae: Path | None,
    bundle: Path | None,
    config: str | None,
    prune: str | None,
    precision: str | None,
    batches: tuple[int, ...] | None,
    max_top_k: int | None,
    pn: str | None,
    h_div_w: float | None,
    aspect: float | None,
    text_length: int | None,
    text_encoder: Path | None,
    targets: str | None,
    triton: Path | None,
    force: bool,
) -> None:
    """Export a next-scale model to a bundle: one ONNX graph per scale step.

    MODEL is `var` or `infinity` for an official checkpoint, `demo` for the small model that comes with the package, or
    `bundle` for the weights of a bundle with another pruning plan: only the graphs that it changes are traced. With
    --triton and no --out, `bundle` goes into a model repository as it is.
    """
    if model == "bundle" and bundle is not None and triton is not None and out is None:
        others = (checkpoint, vae, config, prune, precision, batches, max_top_k, targets, pn, h_div_w, aspect)
        if any(option is not None for option in (*others, text_length, text_encoder)):
            raise click.UsageError("MODEL bundle without --out takes --from, --triton and --force only")
        _write_triton(bundle, triton, force)
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    if model in ("var", "infinity") and (checkpoint is None or vae is None):
        raise click.UsageError(f"MODEL {model} needs --checkpoint and --vae")
    if model in ("demo", "bundle") and (checkpoint is not None or vae is not None):
        raise click.UsageError(f"MODEL {model} takes no --checkpoint or --vae")
    if model != "var" and config is not None:
        raise click.UsageError(f"MODEL {model} takes no --config")
    if model != "infinity" and any(option is not None for option in (pn, h_div_w, aspect, text_length, text_encoder)):
        raise click.UsageError(f"MODEL {model} takes no --pn, --h-div-w, --aspect, --text-length or --text-encoder")
    if h_div_w is not None and aspect is not None:
        raise click.UsageError("--h-div-w and --aspect say the same; give one of them")
    if model == "infinity" and max_top_k is not None:
        raise click.UsageError("MODEL infinity draws bits, which have two values: it takes no --max-top-k")
    if (model == "bundle") != (bundle is not None):
        raise click.UsageError("MODEL bundle needs --from, and no other takes it")
    if model == "bundle" and (precision is not None or max_top_k is not None):
        raise click.UsageError("MODEL bundle keeps the precision and the top-k of its graphs")
    if model == "bundle" and prune is None:
        raise click.UsageError("MODEL bundle needs --prune")
    default_plan = infinity_preset(pn or "1M") if model == "infinity" else _DEFAULT_PLANS.get(model)
    plan = load_plan(prune or str(default_plan))
    overrides = _read_config(config)
    try:
        from fastvar_trt.export import exporter
        from fastvar_trt.export.demo import demo_source
        from fastvar_trt.export.models.var import DEFAULT_TOP_K
        from fastvar_trt.export.sources import InfinitySource, Source, VARSource
        from fastvar_trt.export.targets import build_targets, parse_targets
        from fastvar_trt.export.triton import check_free, model_folder
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed; pip install 'fastvar-trt[export,cpu]'") from error

    if targets is not None:
        parse_targets(targets)  # an error before minutes of work
    if triton is not None:
        check_free(model_folder(triton, out), force=force)
    begin = time.perf_counter()
    progress = _Progress()
    try:
        if bundle is not None:
            report = exporter.export_again(bundle, out, plan, batches=batches, force=force, progress=progress)
        else:
            if model == "infinity" and checkpoint is not None and vae is not None:
                ratio = next((value for value in (h_div_w, aspect) if value is not None), 1.0)
                source: Source = InfinitySource.from_files(
                    checkpoint, vae, pn or "1M", ratio, text_length, text_encoder
                )
            elif checkpoint is not None and vae is not None:
                source = VARSource.from_files(checkpoint, vae, overrides)
            else:
                source = demo_source()
            top_k = DEFAULT_TOP_K if max_top_k is None else max_top_k
            options = exporter.ExportOptions(plan, precision or "fp32", batches or (1,), top_k)
            report = exporter.export_model(source, out, options, force=force, progress=progress)
    finally:
        progress.close()
    built = build_targets(out, targets) if targets is not None else []
    num_graphs, num_traced = len(report.manifest.graphs), len(report.errors)
    size = sum(f.num_bytes for f in report.manifest.files.values()) / 2**20
    click.echo(f"{out}: {num_graphs} graphs ({num_traced} traced), {size:.1f} MiB")
    if report.errors:
        worst_file, worst = max(report.errors.items(), key=lambda item: item[1].relative_error)
        click.echo(
            f"largest difference from PyTorch {worst.max_error:.2g} ({worst.relative_error:.1g} of the largest value), "
            f"in {worst.worst_tensor} of {worst_file}"
        )
    for line in built:
        click.echo(line)
    if triton is not None:
        _write_triton(out, triton, force)
    click.echo(json.dumps({"bundle": str(out), "export_s": round(time.perf_counter() - begin, 1)}))


def _write_triton(bundle: Path, repository: Path, force: bool) -> None:
    try:
        from fastvar_trt.export.triton import write_triton_model
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed; pip install 'fastvar-trt[export,cpu]'") from error
    target = write_triton_model(bundle, repository, force=force)
    click.echo(f"{target}: a model for tritonserver --model-repository {repository}")


def _read_config(text: str | None) -> dict[str, Any] | None:
    """The --config option: JSON, or the name of a JSON file."""
    if text is None:
        return None
    try:
        if Path(text).is_file():
            text = Path(text).read_text(encoding="utf-8")
        data = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--config: neither JSON nor a JSON file that exists: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"--config: got a JSON {type(data).__name__}, expected an object")
    return data
