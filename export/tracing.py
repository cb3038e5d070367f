"""From step functions to ONNX graphs: trace what repeats once, assemble, point the weights into their file.

A step is traced twice: as a skeleton, in which every transformer block is one custom node, and once per
distinct block. The blocks become ONNX functions and are inlined into the skeleton. Tracing a 16-layer step as
a whole takes about ten times as long and gives the same graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from fastvar_trt.export.models.base import BLOCK_DOMAIN, BlockSpec, NextScaleModel, Request
from fastvar_trt.export.weights_file import TensorPlace
from fastvar_trt.plugins import onnx_functions
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import GraphSpec, TensorSpec
from fastvar_trt.runtime.plan import ResolvedPlan

OPSET = 23
# Constants up to this size stay in the graph (shapes, axes, epsilons); larger ones belong into the weights file.
_MAX_INLINE_BYTES = 256

DTYPE_NAME: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
TORCH_DTYPE: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAME.items()}


class _Graph(nn.Module):
    """A function of named tensors as a module with positional inputs; `model` makes its parameters visible."""

    def __init__(
        self,
        run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        inputs: Sequence[str],
        model: nn.Module | None,
    ) -> None:
        super().__init__()
        self.model = model
        self._run = run
        self._inputs = inputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._run(dict(zip(self._inputs, inputs, strict=True))).values())


@dataclasses.dataclass(frozen=True)
class GraphFunction:
    """One graph of a chain as a torch function: what is traced, and what the traced graph is compared with.

    `block_names` is empty when the function computes, and names the custom nodes when it is traced.
    """

    spec: GraphSpec
    run: Callable[[Mapping[str, Tensor], Mapping[BlockSpec, str] | None], dict[str, Tensor]]
    layers: tuple[BlockSpec, ...]  # the block of every layer; empty where there are none
    # Of a step: f_hat after other tokens than its own, which differ where rounding decides.
    accumulate: Callable[[Mapping[str, Tensor], Tensor], Tensor] | None = None

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The distinct blocks, in order of first use."""
        return tuple(dict.fromkeys(self.layers))

    def same_graph(self, other: GraphFunction) -> bool:
        """True where both trace to the same graph over the same weights, whatever their plans."""
        return self.spec == other.spec and self.layers == other.layers


def chain_functions(model: NextScaleModel, plan: ResolvedPlan, batch: int) -> list[GraphFunction]:
    """Condition, steps, decoder for one batch size."""
    f_hat = TensorSpec(names.F_HAT, (batch, *model.f_hat_shape()), "float32")
    sizes = model.model_spec()

    def run_condition(tensors: Mapping[str, Tensor], _: Any) -> dict[str, Tensor]:
        by_name = model.condition(tensors)
        return {spec.name: by_name[spec.name] for spec in condition.outputs}

    def run_decoder(tensors: Mapping[str, Tensor], _: Any) -> dict[str, Tensor]:
        image, pixels = model.decode(tensors[names.F_HAT])
        return {names.PIXELS: pixels, names.IMAGE: image}

    condition = GraphSpec(
        names.graph_file("condition", batch),
        "condition",
        batch,
        None,
        model.condition_inputs(batch),
        model.condition_outputs(batch),
    )
    decoder = GraphSpec(
        names.graph_file("decoder", batch),
        "decoder",
        batch,
        None,
        (f_hat,),
        (
            TensorSpec(names.PIXELS, (batch, sizes.image_height, sizes.image_width, 3), "uint8"),
            TensorSpec(names.IMAGE, (batch, 3, sizes.image_height, sizes.image_width), "float32"),
        ),
    )
    steps = [_step_function(model, plan, scale, batch) for scale in plan.steps]
    return [GraphFunction(condition, run_condition, ()), *steps, GraphFunction(decoder, run_decoder, ())]


def text_function(model: NextScaleModel) -> GraphFunction | None:
    """The text encoder, of models that have one; the same for all batch sizes."""
    specs = model.text_specs()
    if specs is None:
        return None
    graph = GraphSpec(names.graph_file("text_encoder", 1), "text_encoder", 1, None, *specs)
    return GraphFunction(graph, lambda tensors, _: model.encode_text(tensors), ())


def _step_function(model: NextScaleModel, plan: ResolvedPlan, scale: int, batch: int) -> GraphFunction:
    specs = [model.block_spec(plan, scale, layer, 2 * batch) for layer in range(model.depth)]
    graph = _step_spec(model, plan, scale, batch, specs)

    def run(tensors: Mapping[str, Tensor], block_names: Mapping[BlockSpec, str] | None) -> dict[str, Tensor]:
        def request(name: str) -> Tensor:
            return tensors[name] if name in tensors else torch.zeros(batch)  # one that this step does not take

        result = model.step(
            plan,
            scale,
            condition=tensors,
            f_hat=tensors.get(names.F_HAT),
            past=[
                (tensors[names.past_k(i)], tensors[names.past_v(i)]) for i, spec in enumerate(specs) if spec.num_past
            ],
            caches={
                i: tuple(tensors[names.cache(i, sublayer)] for sublayer in spec.sublayers)
                for i, spec in enumerate(specs)
                if spec.keep is not None
            },
            uniform=tensors[names.UNIFORM],
            request=Request(**{name: request(name) for name in names.REQUEST_INPUTS}),
            block_names=block_names,
        )
        by_name = {names.TOKENS: result.tokens, names.F_HAT_OUT: result.f_hat, names.LOGITS: result.logits}
        for i, (k, v) in enumerate(result.new_kv):
            by_name |= {names.new_k(i): k, names.new_v(i): v}
        for i, outputs in result.caches.items():
            by_name |= {names.cache(i, sublayer): y for sublayer, y in zip(model.sublayers, outputs, strict=True)}
        return {spec.name: by_name[spec.name] for spec in graph.outputs}

    def accumulate(tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        return model.accumulate(tokens, tensors.get(names.F_HAT), scale)

    return GraphFunction(graph, run, tuple(specs), accumulate)


def _step_spec(
    model: NextScaleModel, plan: ResolvedPlan, scale: int, batch: int, specs: Sequence[BlockSpec]
) -> GraphSpec:
    first = scale == plan.steps[0]
    length = plan.num_tokens(scale)
    kv_dtype = DTYPE_NAME[model.dtype]
    f_hat_shape = (batch, *model.f_hat_shape())
    token_shape, token_dtype = model.token_spec(scale)
    inputs = [spec for spec in model.condition_outputs(batch) if first or spec.name != names.START]
    if not first:
        inputs.insert(0, TensorSpec(names.F_HAT, f_hat_shape, "float32"))
    outputs = [
        TensorSpec(names.TOKENS, (batch, *token_shape), DTYPE_NAME[token_dtype]),
        TensorSpec(names.F_HAT_OUT, f_hat_shape, "float32"),
        TensorSpec(names.LOGITS, (batch, *model.logits_shape(scale)), "float32"),
    ]
    for layer, spec in enumerate(specs):
        new = spec.kv_shape
        if spec.num_past:
            past = (spec.num_past, *new[1:])
            inputs += [TensorSpec(name(layer), past, kv_dtype) for name in (names.past_k, names.past_v)]
        if spec.keep is not None:
            cached = (new[1], spec.cached_height * spec.cached_width, spec.channels)
            inputs += [TensorSpec(names.cache(layer, sublayer), cached, kv_dtype) for sublayer in spec.sublayers]
        if spec.emits_kv:
            outputs += [TensorSpec(name(layer), new, kv_dtype) for name in (names.new_k, names.new_v)]
        if spec.writes_cache:
            full = (new[1], length, spec.channels)
            outputs += [TensorSpec(names.cache(layer, sublayer), full, kv_dtype) for sublayer in spec.sublayers]
    inputs.append(TensorSpec(names.UNIFORM, (batch, *token_shape), "float32"))
    inputs += [TensorSpec(name, (batch,), names.REQUEST_DTYPES[name]) for name in model.request_inputs(scale)]
    return GraphSpec(names.graph_file("step", batch, scale), "step", batch, scale, tuple(inputs), tuple(outputs))


def build_graph(
    function: GraphFunction, model: NextScaleModel, places: Mapping[str, TensorPlace], folder: Path
) -> ir.Model:
    """The ONNX model of one graph: traced, assembled, its weights pointing into the weights file in `folder`."""
    block_names = {spec: f"Block{i}" for i, spec in enumerate(function.blocks)}
    spec = function.spec
    skeleton = _trace(
        _Graph(lambda tensors: function.run(tensors, block_names), [i.name for i in spec.inputs], model),
        [torch.zeros(i.shape, dtype=TORCH_DTYPE[i.dtype]) for i in spec.inputs],
        [i.name for i in spec.inputs],
        [o.name for o in spec.outputs],
    )
    for block, name in block_names.items():
        function_ = _block_function(block, name, model)
        skeleton.functions[function_.identifier()] = function_
    passes.InlinePass(lambda f: f.domain == BLOCK_DOMAIN)(skeleton)
    skeleton.opset_imports.pop(BLOCK_DOMAIN, None)
    kept = {block.keep for block in function.blocks if block.keep is not None}
    assert len(kept) <= 1, kept  # of a step, so that one body of the operator serves all its layers
    for proto in onnx_functions.function_protos(OPSET, max(kept, default=1)):
        cache_function = ir.serde.deserialize_function(proto)
        skeleton.functions[cache_function.identifier()] = cache_function
    passes.RemoveUnusedFunctionsPass()(skeleton)
    passes.CommonSubexpressionEliminationPass()(skeleton)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(skeleton)
    passes.DeduplicateInitializersPass()(skeleton)
    passes.RemoveUnusedNodesPass()(skeleton)
    passes.RemoveUnusedOpsetsPass()(skeleton)
    passes.ClearMetadataAndDocStringPass()(skeleton)
    passes.NameFixPass()(skeleton)
    _point_weights(skeleton, places, folder, spec.file)
    skeleton.graph.name = spec.name
    skeleton.producer_name = "fastvar-trt"
    return skeleton


def _block_function(spec: BlockSpec, name: str, model: NextScaleModel) -> ir.Function:
    """A traced block as an ONNX function of its inputs, weights among them."""
    activations = [torch.zeros(shape, dtype=dtype) for shape, dtype in spec.activations.values()]
    weights = [*spec.shared_weights, *(f"blocks.0.{weight}" for weight in spec.weight_names)]
    examples = [*activations, *(model.weight(weight) for weight in weights)]

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {o[0]: value for o, value in zip(spec.outputs, spec.run(tensors), strict=True)}

    onnx_names = [i.replace(".", "_") for i in spec.input_names]
    block = _trace(_Graph(run, spec.input_names, None), examples, onnx_names, [o[0] for o in spec.outputs])
    graph = block.graph
    for initializer in list(graph.initializers.values()):
        # A function has no initializers: they become constants again.
        constant = ir.node("Constant", [], attributes={"value": initializer.const_value})
        constant.outputs[0].shape, constant.outputs[0].type = initializer.shape, initializer.type
        initializer.replace_all_uses_with(constant.outputs[0])
        graph.insert_before(graph[0], constant)
        assert initializer.name is not None
        graph.initializers.pop(initializer.name)
    return ir.Function(BLOCK_DOMAIN, name, graph=graph, attributes=[])


def _trace(
    module: nn.Module, inputs: Sequence[Tensor], input_names: Sequence[str], output_names: Sequence[str]
) -> ir.Model:
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs),
            input_names=list(input_names),
            output_names=list(output_names),
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that this project does not use (torchvision, pytree internals)."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _point_weights(model: ir.Model, places: Mapping[str, TensorPlace], folder: Path, file: str) -> None:
    """Replace every weight by a reference into the weights file; nothing large may stay behind."""
    for value in list(model.graph.initializers.values()):
        name = (value.name or "").removeprefix("model.").removeprefix("image_decoder.")
        tensor = value.const_value
        assert tensor is not None
        if name in places:
            assert tuple(tensor.shape) == places[name].shape, (file, name)
            value.const_value = places[name].external(name, folder)
            value.name = name
        elif tensor.nbytes > _MAX_INLINE_BYTES:
            raise ExportError(
                f"{file}: constant {value.name} of {tensor.nbytes} bytes is not one of the weights; it would be "
                "copied into every graph"
            )


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph and check it: `onnx.checker` with full shape inference.

    Raises:
        ExportError: the checker refused it.
    """
    ir.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: onnx.checker refused the graph: {error}") from error
