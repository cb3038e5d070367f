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

from fastvar_trt.export.models.var import BLOCK_DOMAIN, VAR, BlockSpec, Request, run_block
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

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The distinct blocks, in order of first use."""
        return tuple(dict.fromkeys(self.layers))

    def same_graph(self, other: GraphFunction) -> bool:
        """True where both trace to the same graph over the same weights, whatever their plans."""
        return self.spec == other.spec and self.layers == other.layers


def chain_functions(model: VAR, plan: ResolvedPlan, batch: int) -> list[GraphFunction]:
    """Condition, steps, decoder for one batch size."""
    config = model.config
    rows, last = 2 * batch, config.patch_nums[-1]
    side = last * model.vae_config.pixels_per_token
    f_hat_shape = (batch, config.code_channels, last, last)
    modulations = tuple(
        TensorSpec(names.modulation(i), (rows, 6, config.width), "float32") for i in range(config.depth)
    )
    start = TensorSpec(names.START, (rows, config.width), "float32")
    head_modulation = TensorSpec(names.HEAD_MODULATION, (rows, 2, config.width), "float32")

    def run_condition(tensors: Mapping[str, Tensor], _: Any) -> dict[str, Tensor]:
        first, per_layer, head = model.condition(tensors[names.LABELS])
        by_layer = {names.modulation(i): value for i, value in enumerate(per_layer)}
        return {names.START: first, **by_layer, names.HEAD_MODULATION: head}

    def run_decoder(tensors: Mapping[str, Tensor], _: Any) -> dict[str, Tensor]:
        image, pixels = model.decode(tensors[names.F_HAT])
        return {names.PIXELS: pixels, names.IMAGE: image}

    condition = GraphSpec(
        names.graph_file("condition", batch),
        "condition",
        batch,
        None,
        (TensorSpec(names.LABELS, (batch,), "int64"),),
        (start, *modulations, head_modulation),
    )
    decoder = GraphSpec(
        names.graph_file("decoder", batch),
        "decoder",
        batch,
        None,
        (TensorSpec(names.F_HAT, f_hat_shape, "float32"),),
        (
            TensorSpec(names.PIXELS, (batch, side, side, 3), "uint8"),
            TensorSpec(names.IMAGE, (batch, 3, side, side), "float32"),
        ),
    )
    steps = [
        _step_function(model, plan, scale, batch, start, modulations, head_modulation, f_hat_shape)
        for scale in plan.steps
    ]
    return [GraphFunction(condition, run_condition, ()), *steps, GraphFunction(decoder, run_decoder, ())]


def _step_function(
    model: VAR,
    plan: ResolvedPlan,
    scale: int,
    batch: int,
    start: TensorSpec,
    modulations: tuple[TensorSpec, ...],
    head_modulation: TensorSpec,
    f_hat_shape: tuple[int, ...],
) -> GraphFunction:
    config = model.config
    first = scale == plan.steps[0]
    length = plan.num_tokens(scale)
    specs = [model.block_spec(plan, scale, layer, 2 * batch) for layer in range(config.depth)]
    kv_dtype = DTYPE_NAME[model.dtype]
    inputs = [start if first else TensorSpec(names.F_HAT, f_hat_shape, "float32"), *modulations, head_modulation]
    outputs = [
        TensorSpec(names.TOKENS, (batch, length), "int32"),
        TensorSpec(names.F_HAT_OUT, f_hat_shape, "float32"),
        TensorSpec(names.LOGITS, (batch, length, config.vocab_size), "float32"),
    ]
    for layer, spec in enumerate(specs):
        new = spec.kv_shape
        if spec.num_past:
            past = (spec.num_past, *new[1:])
            inputs += [TensorSpec(name(layer), past, kv_dtype) for name in (names.past_k, names.past_v)]
        if spec.keep is not None:
            cached = (new[1], spec.cached_height * spec.cached_width, config.width)
            inputs += [TensorSpec(names.cache(layer, sub), cached, kv_dtype) for sub in names.SUBLAYERS]
        if spec.emits_kv:
            outputs += [TensorSpec(name(layer), new, kv_dtype) for name in (names.new_k, names.new_v)]
        if spec.writes_cache:
            full = (new[1], length, config.width)
            outputs += [TensorSpec(names.cache(layer, sub), full, kv_dtype) for sub in names.SUBLAYERS]
    inputs.append(TensorSpec(names.UNIFORM, (batch, length), "float32"))
    request = {
        names.CFG: "float32",
        names.TEMPERATURE: "float32",
        names.TOP_K: "int64",
        names.TOP_P: "float32",
        names.GREEDY: "bool",
    }
    if scale == 0:
        del request[names.CFG]  # the guidance ramp starts at 0
    inputs += [TensorSpec(name, (batch,), dtype) for name, dtype in request.items()]

    def run(tensors: Mapping[str, Tensor], block_names: Mapping[BlockSpec, str] | None) -> dict[str, Tensor]:
        result = model.step(
            plan,
            scale,
            start=tensors.get(names.START),
            f_hat=tensors.get(names.F_HAT),
            modulations=[tensors[spec.name] for spec in modulations],
            head_modulation=tensors[names.HEAD_MODULATION],
            past=[
                (tensors[names.past_k(i)], tensors[names.past_v(i)]) for i, spec in enumerate(specs) if spec.num_past
            ],
            caches={
                i: (tensors[names.cache(i, "attn")], tensors[names.cache(i, "ffn")])
                for i, spec in enumerate(specs)
                if spec.keep is not None
            },
            uniform=tensors[names.UNIFORM],
            request=Request(
                cfg=tensors.get(names.CFG, torch.zeros(batch)),
                temperature=tensors[names.TEMPERATURE],
                top_k=tensors[names.TOP_K],
                top_p=tensors[names.TOP_P],
                greedy=tensors[names.GREEDY],
            ),
            block_names=block_names,
        )
        by_name = {names.TOKENS: result.tokens, names.F_HAT_OUT: result.f_hat, names.LOGITS: result.logits}
        for i, (k, v) in enumerate(result.new_kv):
            by_name |= {names.new_k(i): k, names.new_v(i): v}
        for i, (attn, ffn) in result.caches.items():
            by_name |= {names.cache(i, "attn"): attn, names.cache(i, "ffn"): ffn}
        return {spec.name: by_name[spec.name] for spec in outputs}

    graph = GraphSpec(names.graph_file("step", batch, scale), "step", batch, scale, tuple(inputs), tuple(outputs))
    return GraphFunction(graph, run, tuple(specs))


def build_graph(function: GraphFunction, model: VAR, places: Mapping[str, TensorPlace], folder: Path) -> ir.Model:
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
    for proto in onnx_functions.function_protos(OPSET):
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


def _block_function(spec: BlockSpec, name: str, model: VAR) -> ir.Function:
    """A traced block as an ONNX function of its inputs, weights among them."""
    rows, channels, dtype = spec.rows, spec.channels, spec.dtype
    past = (spec.num_past, *spec.kv_shape[1:])
    cached = (rows, spec.cached_height * spec.cached_width, channels)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "x": ((rows, spec.num_tokens, channels), torch.float32),
        "modulation": ((rows, 6, channels), torch.float32),
        "past_k": (past, dtype),
        "past_v": (past, dtype),
        "cached_attn": (cached, dtype),
        "cached_ffn": (cached, dtype),
    }
    examples = [
        torch.zeros(shapes[i][0], dtype=shapes[i][1])
        if i in shapes
        else model.weight(i if i == "norm.weight" else f"blocks.0.{i}")
        for i in spec.input_names
    ]

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {o[0]: value for o, value in zip(spec.outputs, run_block(spec, tensors), strict=True)}

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
