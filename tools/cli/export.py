"""`fastvar-export`: checkpoints in, a bundle out. A command per way to get a model, and `bundle` for what is there."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from fastvar_trt.export.models.family import SourceCommand
from fastvar_trt.export.models.registry import FAMILIES, load_plan, presets
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.runtime.precision import PRECISIONS, Precision
from fastvar_trt.tools.cli.command import (
    ErrorCommand,
    ErrorGroup,
    ProgressBar,
    examples,
    extras,
    integers,
    progress_bars,
)

_BUNDLE_EXAMPLES = (
    "fastvar-export bundle --from out/demo_dense --prune infinity-short --out out/short",
    "fastvar-export bundle --from out/demo_dense --precision w8a8 --target cpu --out out/demo_w8a8",
    "fastvar-export bundle --from out/infinity --checkpoint finetuned.pth --out out/finetuned",
    "fastvar-export bundle --from out/demo_dense --triton out/model_repository",
)
Export = Callable[[Path, ProgressBar], Any]  # writes the bundle to a folder, and gives the exporter's report


def _prune(*, has_default: bool = True) -> click.Option:
    default = "  Default: the model's own preset." if has_default else ""
    names = ", ".join(presets())
    return click.Option(["--prune"], help=f"Pruning plan: a preset ({names}) or a JSON file.{default}")


class _Rule(click.ParamType):
    """PATTERN=FORMAT."""

    name = "PATTERN=FORMAT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        pattern, _, name = value.partition("=")
        if not pattern or not name:
            self.fail(f"got {value!r}, expected a pattern and a format as in head=w8", param, ctx)
        return pattern, name


class _Subject(click.ParamType):
    """A class or a prompt."""

    name = "CLASS|PROMPT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return int(value) if isinstance(value, str) and value.isdecimal() else value


def _precision(default: str | None) -> list[click.Option]:
    """How matrices are stored and computed with; `default` for bundles: as they are."""
    return [
        click.Option(
            ["--precision"],
            type=click.Choice(list(PRECISIONS)),
            metavar="PRECISION",
            default=default,
            show_default=default is not None,
            help="Everything in fp32, fp16 or bf16; matrices in 8 or 4 bits (w8, w4), or products of 8-bit numbers "
            f"(w8a8, fp8), the rest in fp32 or the half precision that is named behind: {', '.join(PRECISIONS)}.",
        ),
        click.Option(
            ["--matrix", "matrices"],
            type=_Rule(),
            multiple=True,
            help="Another format for linear layers whose names fit a pattern, as in 'ffn.fc2=plain'; repeatable.",
        ),
        click.Option(
            ["--integer-kv"], is_flag=True, help="Keep keys and values in 8 bits, a scale per layer: half the memory."
        ),
        click.Option(
            ["--calibrate", "calibration"],
            type=_Subject(),
            multiple=True,
            help="Class or prompt to draw for scales (of w8a8, fp8, --integer-kv); repeatable. Default: "
            f"{'four' if default else 'those of the bundle, or four'}.",
        ),
    ]


def _batches(default: str) -> click.Option:
    text = f"Batch sizes: N or N,N,...  Default: {default}."
    return click.Option(["--batch", "batches"], type=integers(), help=text)


def _lora() -> list[click.Option]:
    return [
        click.Option(
            ["--lora"],
            type=click.Path(path_type=Path),
            help="LoRA of the checkpoint to merge: a file, or PEFT's folder.",
        ),
        click.Option(["--lora-scale"], type=float, help="A factor on it. Default: 1."),
    ]


def _lora_with_scale(lora: Path | None, scale: float | None) -> tuple[Path, float] | None:
    if lora is None:
        if scale is not None:
            raise click.UsageError("--lora-scale needs --lora, which it is a factor on")
        return None
    return lora, 1.0 if scale is None else scale


def _destinations(*, out_required: bool = True) -> list[click.Option]:
    return [
        click.Option(["--out"], type=click.Path(path_type=Path), required=out_required, help="Folder of the bundle."),
        click.Option(
            ["--target", "targets"], metavar="T,T,...", help="Also build for these targets, as `fastvar build` does."
        ),
        click.Option(
            ["--triton"],
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Also write the bundle as a model into this model repository of Triton Inference Server.",
        ),
        click.Option(["--force"], is_flag=True, help="Replace what is there."),
    ]


def _source_command(command: SourceCommand) -> click.Command:
    """The command of one way to get a model."""

    def run(
        prune: str | None,
        precision: str,
        batches: tuple[int, ...] | None,
        out: Path,
        targets: str | None,
        triton: Path | None,
        force: bool,
        compare: bool,
        matrices: tuple[tuple[str, str], ...],
        integer_kv: bool,
        calibration: tuple[Any, ...],
        with_encoder: bool,
        lora: Path | None,
        lora_scale: float | None,
        examples_file: Path | None,
        max_top_k: int = 0,
        **own: Any,
    ) -> None:
        merged = _lora_with_scale(lora, lora_scale)
        sizes = [(size, load_plan(prune or command.default_plan(**size))) for size in command.sizes(**own)]
        offered = () if examples_file is None else _lines(examples_file)

        def load(size: Mapping[str, Any]) -> Any:
            source = command.load(**size)
            source = source if merged is None else source.with_lora(*merged)
            return source.with_encoder() if with_encoder else source

        def export(out: Path, progress: ProgressBar) -> Any:
            from fastvar_trt.export.exporter import ExportOptions, export_model

            first, *more = [(load(size), plan) for size, plan in sizes]
            options = ExportOptions(
                plan=first[1],
                precision=precision,
                batches=batches or (1,),
                max_top_k=max_top_k,
                compare=compare,
                matrices=matrices,
                calibration=calibration,
                integer_kv=integer_kv,
                examples=offered,
            )
            return export_model(first[0], out, options, more=more, force=force, progress=progress)

        wanted = dataclasses.replace(PRECISIONS[precision], matrices=matrices)
        _run(export, out, wanted, targets, triton, force=force)

    top_k = click.Option(
        ["--max-top-k"],
        type=click.IntRange(0),
        default=command.top_k,
        show_default=True,
        help="Bound of top-k; 0: no bound.",
    )
    params: list[click.Parameter] = [
        *command.options,
        _prune(),
        *_precision(next(iter(PRECISIONS))),
        _batches("1"),
        click.Option(
            ["--compare/--no-compare"],
            default=True,
            help="Compare every graph with PyTorch, most of an export's time; `fastvar verify` needs it. Default: do.",
        ),
        *([top_k] if command.top_k else []),
        click.Option(["--with-encoder"], is_flag=True, help="The VAE's encoder, too: pictures can be edited."),
        *_lora(),
        click.Option(
            ["--examples", "examples_file"],
            type=click.Path(path_type=Path),
            help="Text file, a line each, of what the server's page offers: prompts, or the names of all classes.",
        ),
        *_destinations(),
    ]
    epilog = examples(*command.examples)
    return ErrorCommand(command.name, params=params, callback=run, help=command.description, epilog=epilog)


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty.

    Raises:
        ExportError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"--examples {path}: cannot be read: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def _bundle_command() -> click.Command:
    def run(
        bundle: Path,
        prune: str | None,
        precision: str | None,
        matrices: tuple[tuple[str, str], ...],
        integer_kv: bool,
        calibration: tuple[Any, ...],
        batches: tuple[int, ...] | None,
        checkpoint: Path | None,
        lora: Path | None,
        lora_scale: float | None,
        out: Path | None,
        targets: str | None,
        triton: Path | None,
        force: bool,
    ) -> None:
        merged = _lora_with_scale(lora, lora_scale)
        own = integer_kv or calibration or any(x is not None for x in (prune, precision, batches, checkpoint))
        if out is None:
            if triton is None or own or matrices or targets is not None or lora is not None:
                raise click.UsageError("give --out; without it, --triton alone writes the bundle as it is")
            _write_triton(bundle, triton, force=force)
            return
        if lora is not None and checkpoint is None:
            raise click.UsageError("--lora needs --checkpoint, which it is of")
        if not own:
            raise click.UsageError(
                "--out needs --prune, --precision, --integer-kv, --calibrate, --batch or --checkpoint: what the new "
                "bundle has of its own"
            )
        if precision is None and matrices:
            raise click.UsageError("--matrix needs --precision")
        plan = None if prune is None else load_plan(prune)

        def export(out: Path, progress: ProgressBar) -> Any:
            from fastvar_trt.export.exporter import export_again

            return export_again(
                bundle,
                out,
                plan,
                precision=precision,
                matrices=matrices,
                integer_kv=integer_kv,
                calibration=calibration,
                batches=batches,
                checkpoint=checkpoint,
                lora=merged,
                force=force,
                progress=progress,
            )

        manifest = read_manifest(bundle)
        wanted = manifest.own_precision  # with its exceptions, which stay
        if precision not in (None, manifest.precision):
            wanted = dataclasses.replace(PRECISIONS[precision], matrices=matrices)
        _run(export, out, wanted, targets, triton, force=force)

    source = click.Option(
        ["--from", "bundle"], type=click.Path(path_type=Path), required=True, help="The bundle whose weights are taken."
    )
    plan, batch = _prune(has_default=False), _batches("those of the bundle")
    retrained = click.Option(
        ["--checkpoint"],
        type=click.Path(path_type=Path),
        help="Another transformer of the same sizes, as a fine-tune is; VAE and text encoder stay.",
    )
    own = [source, plan, *_precision(None), batch, retrained, *_lora()]
    params: list[click.Parameter] = [*own, *_destinations(out_required=False)]
    return ErrorCommand(
        "bundle",
        params=params,
        callback=run,
        help="The model of a bundle with another plan, precision, scales or batch sizes, without its checkpoint, or "
        "with another one: only the graphs that a plan changes are traced. With --triton and no --out, the bundle goes "
        "into a model repository as it is.",
        epilog=examples(*_BUNDLE_EXAMPLES),
    )


def _run(
    export: Export, out: Path, precision: Precision, targets: str | None, triton: Path | None, *, force: bool
) -> None:
    """Write a bundle and what was asked for beyond it, and say what came out."""
    with extras("export,cpu"):
        import fastvar_trt.export.exporter  # noqa: F401  # with all that it needs, before minutes of work
        from fastvar_trt.export.build.registry import build_targets, parse_targets
        from fastvar_trt.export.models.matrix import check_exceptions
        from fastvar_trt.serving.triton.repository import check_free, model_folder
    check_exceptions(precision.matrices)  # errors before minutes of work
    builders = parse_targets(targets) if targets is not None else []
    for builder in builders:
        builder.check_precision(precision)
    if triton is not None:
        check_free(model_folder(triton, out), force=force)
    begin = time.perf_counter()
    with progress_bars() as progress:
        report = export(out, progress)
        built = build_targets(out, builders, progress)
    manifest = report.manifest
    size = sum(spec.num_bytes for spec in manifest.files.values()) / 2**20
    click.echo(f"{out}: {len(manifest.graphs)} graphs ({len(report.traced)} traced), {size:.1f} MiB")
    if report.errors:
        worst_file, worst = max(report.errors.items(), key=lambda item: item[1].relative_error)
        click.echo(
            f"largest difference from PyTorch {worst.max_error:.2g} ({worst.relative_error:.1g} of the largest value), "
            f"in {worst.worst_tensor} of {worst_file}"
        )
    for result in built:
        click.echo(result.line(out))
    if triton is not None:
        _write_triton(out, triton, force=force)
    click.echo(json.dumps({"bundle": str(out), "export_s": round(time.perf_counter() - begin, 1)}))


def _write_triton(bundle: Path, repository: Path, *, force: bool) -> None:
    with extras("export,cpu"):
        from fastvar_trt.serving.triton.repository import write_triton_model
    target = write_triton_model(bundle, repository, force=force)
    click.echo(f"{target}: a model for tritonserver --model-repository {repository}")


class _Models(ErrorGroup):
    """The commands of all registered families, and `bundle`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._sources(), "bundle"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        source = self._sources().get(cmd_name)
        if source is not None:
            return _source_command(source)
        return _bundle_command() if cmd_name == "bundle" else None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.epilog = examples(*(e for source in self._sources().values() for e in source.examples), *_BUNDLE_EXAMPLES)
        super().format_epilog(ctx, formatter)

    def _sources(self) -> dict[str, SourceCommand]:
        return {command.name: command for family in FAMILIES.values() for command in family.commands}


@click.group(cls=_Models)
@click.version_option(package_name="fastvar-trt")
def main() -> None:
    """Export a next-scale model to a bundle: one ONNX graph per scale step."""
