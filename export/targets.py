"""`--target`: what a bundle is built for, and the builders behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastvar_trt.export.build_cpu import build_cpu
from fastvar_trt.export.build_cuda import build_cuda
from fastvar_trt.export.tensorrt.build import build_tensorrt
from fastvar_trt.export.tensorrt.flavour import flavour_of
from fastvar_trt.runtime.backends.onnxruntime import CPU_TARGET
from fastvar_trt.runtime.backends.onnxruntime_cuda import CUDA_TARGET
from fastvar_trt.runtime.errors import ExportError


def parse_targets(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`cpu,sm86,sm89` -> (("cpu",), ("sm86", "sm89")).

    Args:
        text: targets, separated by commas.

    Returns:
        those of ONNX Runtime, and those of TensorRT.

    Raises:
        ExportError: an unknown target, or targets that no one package builds for.
    """
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    of_onnxruntime = (CPU_TARGET, CUDA_TARGET)
    engines = tuple(name for name in names if name not in of_onnxruntime)
    if engines:
        try:
            flavour_of(engines)
        except ExportError as error:
            raise ExportError(f"--{error}; or {' or '.join(of_onnxruntime)} (ONNX Runtime)") from error
    return tuple(name for name in names if name in of_onnxruntime), engines


def build_targets(bundle: Path, text: str) -> list[str]:
    """Build for all targets of the option, with a progress bar.

    Args:
        bundle: its folder.
        text: targets, separated by commas.

    Returns:
        what was built, one line for people each.
    """
    of_onnxruntime, engines = parse_targets(text)
    lines = []
    if CUDA_TARGET in of_onnxruntime:
        graphs = build_cuda(bundle)
        lines.append(
            f"{bundle}: {graphs.num_graphs} graphs for {CUDA_TARGET}, {graphs.num_bytes / 2**20:.1f} MiB, "
            f"{graphs.seconds:.1f} s"
            if graphs.built
            else f"{bundle}: the graphs for {CUDA_TARGET} are up to date; nothing to build"
        )
    if CPU_TARGET in of_onnxruntime:
        report = build_cpu(bundle)
        lines.append(
            f"{bundle}: {report.num_graphs} graphs for {CPU_TARGET}, {report.num_bytes / 2**20:.1f} MiB of prepacked "
            f"weights, {report.seconds:.1f} s"
            if report.built
            else f"{bundle}: the engines for {CPU_TARGET} are up to date; nothing to build"
        )
    if engines:
        progress = _EngineProgress()
        try:
            result = build_tensorrt(bundle, engines, progress)
        finally:
            progress.close()
        megabytes = sum(record.content.num_bytes for record in (*result.built, *result.kept)) / 2**20
        lines.append(
            f"{bundle}: {len(result.built)} {result.flavour} engines for {', '.join(result.targets)} built in "
            f"{result.seconds:.1f} s, {len(result.kept)} kept, {megabytes:.1f} MiB in all"
            if result.built
            else f"{bundle}: the {result.flavour} engines for {', '.join(engines)} are up to date; nothing to build"
        )
    return lines


class _EngineProgress:
    """One bar per engine, with TensorRT's phase."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._file = ""

    def __call__(self, graph: str, phase: str, share: float) -> None:
        if graph != self._file:
            self.close()
            self._file = graph
            self._bar = click.progressbar(
                length=100, label=f"{graph:<18}", item_show_func=lambda item: item, show_eta=False, width=24
            )
            self._bar.__enter__()
        # Phases nest and repeat, so the bar shows the share of the current one and never goes back.
        ahead = 100 if phase == "done" else int(share * 99)
        self._bar.update(max(ahead - self._bar.pos, 0), phase)

    def close(self) -> None:
        """End the line of the current bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
