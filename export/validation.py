"""Each exported graph, run once by ONNX Runtime and compared with eager PyTorch on the same inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from fastvar_trt.export.models.matrix import dtype_name, torch_dtype
from fastvar_trt.export.passes.expose_selections import ExposeSelections
from fastvar_trt.export.passes.widen_bfloat16 import WidenBFloat16
from fastvar_trt.export.tracing import COMPUTE, GraphFunction, Tracing
from fastvar_trt.plugins.torch_ops import GivenSelections
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.backends import Buffer
from fastvar_trt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import GraphSpec, Role, TensorSpec
from fastvar_trt.runtime.precision import PRECISIONS, Precision, Tolerance
from fastvar_trt.runtime.verify import largest_error

_TOKENS = (Role.TOKENS, Role.GIVEN)  # roles of outputs


@dataclasses.dataclass(frozen=True)
class GraphError:
    """How far one graph is from PyTorch."""

    worst_tensor: str
    max_error: float  # absolute
    relative_error: float  # of the tensor's largest magnitude
    selection_shortfall: float = 0.0  # largest share by which a selection's scores sum to less than PyTorch's


@dataclasses.dataclass(frozen=True)
class GraphOutputs:
    """What one run of a graph computed."""

    tensors: dict[str, Tensor]  # by the names of the graph's outputs
    selections: list[Tensor]  # int64 [B2, K] of every PivotalTokens node, in the order of the chain


def run_in_onnxruntime(folder: Path, spec: GraphSpec, model: ir.Model, inputs: Mapping[str, Tensor]) -> GraphOutputs:
    """The graph's outputs by ONNX Runtime on the CPU, on torch tensors bound in place.

    bfloat16 graphs run widened to fp32: ONNX Runtime's CPU provider has no bfloat16 kernels. It widens float16 itself.
    `model` is the graph of `spec`; it is changed.
    """
    exposed, widened = ExposeSelections()(model), WidenBFloat16()(model)
    selections = [_selection_spec(value) for value in model.graph.outputs[len(spec.outputs) :]]
    changed = None
    if exposed.modified or widened.modified:
        changed = folder / f"checked_{spec.file}"
        ir.save(model, changed)
        spec = dataclasses.replace(spec, file=changed.name, outputs=(*spec.outputs, *selections))
    backend = OnnxRuntimeBackend(engines="off")
    backend.open_graphs(folder)
    try:
        backend.load(spec)
        outputs = {o.name: torch.zeros(o.shape, dtype=torch_dtype(o.dtype)) for o in spec.outputs}
        held = {i.name: inputs[i.name].contiguous() for i in spec.inputs}
        backend.bind(
            spec,
            {name: _buffer(tensor).view() for name, tensor in held.items()},
            {name: _buffer(tensor).view() for name, tensor in outputs.items()},
        ).enqueue()
    finally:
        backend.close()
        if changed is not None:
            changed.unlink()
    return GraphOutputs(
        {o.name: outputs[o.name] for o in spec.outputs if o not in selections},
        [outputs[selection.name] for selection in selections],
    )


def _selection_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None
    return TensorSpec(value.name, tuple(value.shape.numpy()), "int64")


def _buffer(tensor: Tensor) -> Buffer:
    return Buffer(tuple(tensor.shape), dtype_name(tensor.dtype), tensor.data_ptr(), tensor)


def tolerance_of(model: ir.Model, precision: Precision) -> Tolerance:
    """What one graph of a bundle may differ by from PyTorch.

    Matrices of few bits are the same numbers on both sides, up to the dtype that is computed in, and only that counts
    where a graph multiplies no rounded activations, which may lie near a tie.
    """
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and not node.outputs[0].is_graph_output():  # else keys and values
            return precision.tolerance
    return next(own.tolerance for own in PRECISIONS.values() if own.stored == precision.computed)


def compare_with_torch(
    function: GraphFunction, inputs: Mapping[str, Tensor], got: GraphOutputs, tolerance: Tolerance
) -> GraphError:
    """Compare the outputs of one graph with PyTorch's on the same inputs and, in pruned layers, the same tokens.

    Args:
        function: what the graph was traced from.
        inputs: of both.
        got: the graph's outputs.
        tolerance: of the graph.

    Raises:
        ExportError: naming graph, tensor and maximum error, or the selection that is not PyTorch's.
    """
    given = GivenSelections(got.selections)
    expected = function.run(inputs, Tracing(select=given) if got.selections else COMPUTE)
    worst, limit = max(given.shortfalls, default=0.0), tolerance.selection_shortfall
    if not worst <= limit:
        raise ExportError(
            f"{function.spec.file}: the pivotal tokens of one sublayer are not those of PyTorch: their scores sum to "
            f"{worst:.2%} less, expected at most {limit:.2%}"
        )
    return dataclasses.replace(
        compare_graph(function, _on_tokens(function, inputs, got, expected), got.tensors, tolerance),
        selection_shortfall=max(worst, 0.0),
    )


def _on_tokens(
    function: GraphFunction, inputs: Mapping[str, Tensor], got: GraphOutputs, expected: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """PyTorch's outputs with those that follow of tokens and logits as they follow of the graph's own."""
    return expected if function.follow is None else {**expected, **function.follow(inputs, got.tensors)}


def compare_graph(
    function: GraphFunction, expected: Mapping[str, Tensor], got: Mapping[str, Tensor], tolerance: Tolerance
) -> GraphError:
    """Compare the outputs of one graph.

    The share of tokens that differ is bounded; f_hat is expected to follow from the graph's own. Whole numbers may be
    off by one.

    Raises:
        ExportError: naming graph, tensor and maximum error.
    """
    worst = GraphError("", 0.0, 0.0)
    tokens = [spec.name for spec in function.spec.outputs if spec.role in _TOKENS and spec.name != names.DETAIL]
    for name in tokens:
        equal = expected[name] == got[name]
        changed = 1.0 - float(equal.float().mean())
        allowed = tolerance.may_change(equal.numel(), are_bits=expected[name].dtype == torch.uint8)
        if changed > allowed:
            raise ExportError(
                f"{function.spec.file}: {name}: {changed:.1%} of the tokens are not those of PyTorch, "
                f"expected at most {allowed:.1%}"
            )
        if changed:  # of a picture's tokens, those of later scales make up for it
            break
    for name, reference in expected.items():
        if name in tokens:
            continue
        is_rounded = not reference.is_floating_point()  # pixels, and integer keys and values: ties fall either way
        reference, ours = reference.float(), got[name].float()
        error = largest_error(
            (reference - ours).numpy(),
            tolerance.elements_off if function.magnifies and name == names.F_HAT_OUT else 0.0,
        )
        relative = error / max(float(reference.abs().max()), 1e-6)
        # `not <=` is also true of NaN.
        if not relative <= tolerance.error and not (is_rounded and error <= 1.0):
            raise ExportError(
                f"{function.spec.file}: {name}: maximum error {error:.3g} against PyTorch, {relative:.3g} of its "
                f"largest value, expected at most {tolerance.error:g}"
            )
        if relative > worst.relative_error and not is_rounded:
            worst = GraphError(name, error, relative)
    return worst
