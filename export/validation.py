"""Each exported graph, run once by ONNX Runtime and compared with eager PyTorch on the same inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from fastvar_trt.export.tracing import DTYPE_NAME, TORCH_DTYPE, GraphFunction
from fastvar_trt.export.widen import widen_bfloat16
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.backends import Buffer
from fastvar_trt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import GraphSpec
from fastvar_trt.runtime.verify import MAX_TOKENS_CHANGED, TOLERANCE


@dataclasses.dataclass(frozen=True)
class GraphError:
    """How far one graph is from PyTorch."""

    worst_tensor: str
    max_error: float  # absolute
    relative_error: float  # of the tensor's largest magnitude
    tokens_changed: float  # share


def run_in_onnxruntime(
    folder: Path, spec: GraphSpec, model: ir.Model, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The graph's outputs by ONNX Runtime on the CPU, on torch tensors bound in place.

    bfloat16 graphs run widened to fp32: ONNX Runtime's CPU provider has no bfloat16 kernels. It widens float16 itself.
    """
    widened = None
    if widen_bfloat16(model):
        widened = folder / f"widened_{spec.file}"
        ir.save(model, widened)
        spec = dataclasses.replace(spec, file=widened.name)
    backend = OnnxRuntimeBackend(engines="off")
    backend.open(folder, "fp32", check_hashes=False)
    try:
        backend.load(spec)
        outputs = {o.name: torch.zeros(o.shape, dtype=TORCH_DTYPE[o.dtype]) for o in spec.outputs}
        held = {i.name: inputs[i.name].contiguous() for i in spec.inputs}
        backend.bind(
            spec,
            {name: _buffer(tensor).view() for name, tensor in held.items()},
            {name: _buffer(tensor).view() for name, tensor in outputs.items()},
        ).enqueue()
    finally:
        backend.close()
        if widened is not None:
            widened.unlink()
    return outputs


def _buffer(tensor: Tensor) -> Buffer:
    return Buffer(tuple(tensor.shape), DTYPE_NAME[tensor.dtype], tensor.data_ptr(), tensor)


def compare_graph(
    function: GraphFunction, expected: Mapping[str, Tensor], got: Mapping[str, Tensor], precision: str
) -> GraphError:
    """Compare the outputs of one graph.

    Where tokens differ, what follows from them (f_hat of that image) cannot be compared and is left out; the
    share of such tokens is bounded instead.

    Raises:
        ExportError: naming graph, tensor and maximum error.
    """
    worst = GraphError("", 0.0, 0.0, 0.0)
    same_image = None
    changed = 0.0
    if names.TOKENS in expected:
        equal = expected[names.TOKENS] == got[names.TOKENS]
        changed = 1.0 - float(equal.float().mean())
        same_image = equal.all(dim=1)
        if changed > MAX_TOKENS_CHANGED[precision]:
            raise ExportError(
                f"{function.spec.file}: {names.TOKENS}: {changed:.1%} of the tokens are not those of PyTorch, "
                f"expected at most {MAX_TOKENS_CHANGED[precision]:.0%}"
            )
    for name, reference in expected.items():
        if name == names.TOKENS:
            continue
        ours = got[name]
        if name == names.F_HAT_OUT and same_image is not None:
            reference, ours = reference[same_image], ours[same_image]
        if reference.numel() == 0:
            continue
        reference, ours = reference.float(), ours.float()
        error = float((reference - ours).abs().max())
        relative = error / max(float(reference.abs().max()), 1e-6)
        # `not <=` is also true of NaN.
        if not relative <= TOLERANCE[precision] and not (name == names.PIXELS and error <= 1.0):
            raise ExportError(
                f"{function.spec.file}: {name}: maximum error {error:.3g} against PyTorch, {relative:.3g} of its "
                f"largest value, expected at most {TOLERANCE[precision]:g}"
            )
        if relative > worst.relative_error and name != names.PIXELS:
            worst = GraphError(name, error, relative, changed)
    return dataclasses.replace(worst, tokens_changed=changed)
