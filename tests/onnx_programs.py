"""torch's conversion of traced programs to ONNX, made once for equal programs.

Tests export the same small models again and again, and five sixths of an export are what torch does after it has
traced our code. That part depends on nothing but the traced program, its constants and the options (parameters are
inputs of it), so that it is kept on disk by these. Our code is traced every time, and everything that follows the
conversion runs every time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._flags import set_onnx_exporting_flag

_export = torch.onnx.export
_VERSIONS = repr((torch.__version__, onnxscript.__version__, onnx.__version__, ir.__version__))


@dataclasses.dataclass(frozen=True)
class Converted:
    """What our tracing takes of `torch.onnx.ONNXProgram`."""

    model: ir.Model


def keep_in(folder: Path) -> None:
    """Replace `torch.onnx.export` by one that keeps its results in a folder."""
    folder.mkdir(parents=True, exist_ok=True)

    @set_onnx_exporting_flag
    def export(module: nn.Module, inputs: Sequence[Tensor], **options: Any) -> Converted:
        program = torch.export.export(module, tuple(inputs), strict=False)
        file = folder / f"{_key(program, options)}.onnx"
        if not file.exists():
            converted = _export(program, **options)
            assert converted is not None
            partial = file.with_suffix(f".{os.getpid()}")
            ir.save(converted.model, partial)
            partial.rename(file)
        return Converted(ir.load(file))

    torch.onnx.export = export  # type: ignore[assignment]  # gives no ONNXProgram, but what is read of it


def _key(program: torch.export.ExportedProgram, options: Any) -> str:
    digest = hashlib.sha256((_VERSIONS + str(program) + repr(sorted(options.items()))).encode())
    for name, tensor in sorted(program.constants.items()):
        digest.update(name.encode() + tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
