"""torch's conversion of traced programs to ONNX, made once for equal programs.

Tests export the same small models again and again, and five sixths of an export are what torch does after it has
traced our code. That part depends on nothing but the traced program, its constants and the options, so that it is kept
on disk by these. Our code is traced every time, and everything that follows the conversion runs every time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.onnx._internal.exporter._flags import set_onnx_exporting_flag

_export = torch.onnx.export
_FOLDED_BYTES = 8192  # what constant folding may look into: values of parameters up to this size are part of the key
_VERSIONS = repr((torch.__version__, onnxscript.__version__, onnx.__version__, ir.__version__))


class Converted:
    """What our tracing takes of `torch.onnx.ONNXProgram`."""

    def __init__(self, file: Path, parameters: Mapping[str, Tensor]) -> None:
        self.model = ir.load(file)
        for name, value in self.model.graph.initializers.items():
            if name in parameters:
                value.const_value = TorchTensor(parameters[name], name=name)


def keep_in(folder: Path) -> None:
    """Replace `torch.onnx.export` by one that keeps its results in a folder, without parameters."""
    folder.mkdir(parents=True, exist_ok=True)

    @set_onnx_exporting_flag
    def export(module: nn.Module, inputs: Sequence[Tensor], **options: Any) -> Converted:
        program = torch.export.export(module, tuple(inputs), strict=False)
        file = folder / f"{_key(program, options)}.onnx"
        if not file.exists():
            converted = _export(program, **options)
            assert converted is not None
            for name, value in converted.model.graph.initializers.items():
                if name in program.state_dict:
                    tensor = value.const_value
                    assert tensor is not None
                    absent = ("absent", 0, tensor.nbytes, tensor.dtype)
                    value.const_value = ir.ExternalTensor(*absent, shape=ir.Shape(tensor.shape), name=name)
            partial = file.with_suffix(f".{os.getpid()}")
            ir.save(converted.model, partial)
            partial.rename(file)
        return Converted(file, program.state_dict)

    torch.onnx.export = export  # type: ignore[assignment]


def _key(program: torch.export.ExportedProgram, options: Any) -> str:
    digest = hashlib.sha256((_VERSIONS + str(program) + repr(sorted(options.items()))).encode())
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        digest.update(name.encode())
        if name in program.constants or tensor.nbytes <= _FOLDED_BYTES:
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
