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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastvar_trt.export.models.base import BLOCK_DOMAIN, BlockSpec, NextScaleModel, Request
from fastvar_trt.export.models.matrix import dtype_name, observing, torch_dtype
from fastvar_trt.export.weights_file import external_tensor
from fastvar_trt.plugins import onnx_functions
from fastvar_trt.plugins.torch_ops import Selector, pivotal_tokens
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import GraphSpec, Role, TensorSpec
from fastvar_trt.runtime.plan import ResolvedPlan
from fastvar_trt.runtime.request import GRAPH_INPUTS
from fastvar_trt.runtime.weights import TensorPlace

OPSET = 23
# Constants up to this size stay in the graph (shapes, axes, epsilons); larger ones belong into the weights file.
_MAX_INLINE_BYTES = 256


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
class Tracing:
    """How a graph function is run: as it is, or with custom nodes in place of its blocks, or on given selections.

    Attributes:
        block_names: while it is traced, the custom node of every block; None where it computes.
        select: which tokens a pruned sublayer computes.
    """

    block_names: Mapping[BlockSpec, str] | None = None
    select: Selector = pivotal_tokens


COMPUTE = Tracing()


@dataclasses.dataclass(frozen=True)
class GraphFunction:
    """One graph of a chain as a torch function: what is traced, and what the traced graph is compared with."""

    spec: GraphSpec
    run: Callable[[Mapping[str, Tensor], Tracing], dict[str, Tensor]]
    layers: Mapping[int, BlockSpec] = dataclasses.field(default_factory=dict)  # the block of every layer that it runs
    # Of what draws or encodes: what follows of its inputs and of other outputs than its own, by name. Tokens differ
    # where rounding decides, and a blend near one code multiplies the rounding of logits.
    follow: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    magnifies: bool = False  # rounding: a share of its result is not comparable
    sums: tuple[int, ...] = ()  # of an image encoder: the scales that its detail is not of

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The distinct blocks, in order of first use."""
        return tuple(dict.fromkeys(self.layers.values()))

    def same_graph(self, other: GraphFunction) -> bool:
        """True where both trace to the same graph over the same weights, whatever their plans."""
        return (self.spec, self.layers, self.sums) == (other.spec, other.layers, other.sums)


def chain_functions(model: NextScaleModel, plan: ResolvedPlan, batch: int, variant: str = "") -> list[GraphFunction]:
    """The graphs of one batch size, in the order in which they run: condition, steps, decoder.

    Args:
        model: the model, at one size.
        plan: its plan.
        batch: images.
        variant: part of the names of files; empty where a bundle has one size.
    """
    height, width = model.image_size()

    def run_condition(tensors: Mapping[str, Tensor], _: Tracing) -> dict[str, Tensor]:
        by_name = model.condition(tensors)
        return {spec.name: by_name[spec.name] for spec in condition.outputs}

    def run_decoder(tensors: Mapping[str, Tensor], _: Tracing) -> dict[str, Tensor]:
        f_hat = tensors[names.F_HAT]
        image, pixels = model.decode(f_hat + tensors[names.DETAIL] if names.DETAIL in tensors else f_hat)
        return {names.PIXELS: pixels, names.IMAGE: image}

    condition = _graph_spec(
        names.CONDITION_GRAPH, batch, None, model.condition_inputs(batch), model.condition_outputs(batch)
    )
    decoder = _graph_spec(
        names.DECODER,
        batch,
        None,
        [
            _f_hat_spec(model, batch, names.F_HAT),
            *([_f_hat_spec(model, batch, names.DETAIL, Role.GIVEN)] if model.has_encoder else []),
        ],
        [
            TensorSpec(names.PIXELS, (batch, height, width, 3), "uint8", Role.PIXELS),
            TensorSpec(names.IMAGE, (batch, 3, height, width), "float32", Role.IMAGE),
        ],
    )
    steps = [_step_function(model, plan, scale, batch) for scale in plan.steps]
    functions = [
        GraphFunction(condition, run_condition),
        *steps,
        *_residual_function(model, plan, batch),
        GraphFunction(decoder, run_decoder),
    ]
    return [functions[0], *(_of_variant(function, variant) for function in functions[1:])]


def _of_variant(function: GraphFunction, variant: str) -> GraphFunction:
    """The function, its graph's file named for a variant; the condition is the same for all of them."""
    spec = function.spec
    file = names.graph_file(spec.kind, spec.batch, spec.scale, variant)
    return dataclasses.replace(function, spec=dataclasses.replace(spec, file=file))


def encoder_function(model: NextScaleModel, plan: ResolvedPlan, variant: str = "") -> GraphFunction | None:
    """The image encoder of one picture, of models that have one."""
    if not model.has_encoder:
        return None
    height, width = model.image_size()

    def run(tensors: Mapping[str, Tensor], _: Tracing) -> dict[str, Tensor]:
        tokens, f_hat, detail = model.encode(tensors[names.PIXELS], plan)
        by_scale = {names.given(scale): own for scale, own in enumerate(tokens)}
        return {**by_scale, names.F_HAT: f_hat, names.DETAIL: detail}

    def follow(_: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens = [outputs[names.given(scale)] for scale in range(len(model.schedule))]
        f_hat, detail = model.accumulated(tokens, plan)
        return {names.F_HAT: f_hat, names.DETAIL: detail}

    tokens = [_given_spec(model, 1, scale) for scale in range(len(model.schedule))]
    f_hats = [_f_hat_spec(model, 1, names.F_HAT), _f_hat_spec(model, 1, names.DETAIL, Role.GIVEN)]
    pixels = TensorSpec(names.PIXELS, (1, height, width, 3), "uint8", Role.PIXELS)
    graph = _graph_spec(names.IMAGE_ENCODER, 1, None, [pixels], [*tokens, *f_hats])
    return _of_variant(GraphFunction(graph, run, follow=follow, sums=plan.steps), variant)


def _given_spec(model: NextScaleModel, batch: int, scale: int) -> TensorSpec:
    """Given tokens of a scale."""
    shape, dtype = model.token_spec(scale)
    return TensorSpec(names.given(scale), (batch, *shape), dtype_name(dtype), Role.GIVEN)


def _residual_function(model: NextScaleModel, plan: ResolvedPlan, batch: int) -> list[GraphFunction]:
    """The graph after the last step, of models that have one."""
    specs = model.residual_specs(plan, batch)
    if specs is None:
        return []
    graph = _graph_spec(
        names.RESIDUAL,
        batch,
        None,
        [_f_hat_spec(model, batch, names.F_HAT), *specs],
        [_f_hat_spec(model, batch, names.F_HAT_OUT)],
    )
    return [GraphFunction(graph, lambda tensors, _: {names.F_HAT_OUT: model.residual(tensors)}, magnifies=True)]


def text_function(model: NextScaleModel) -> GraphFunction | None:
    """The text encoder, of models that have one; the same for all batch sizes."""
    specs = model.text_specs()
    if specs is None:
        return None
    graph = _graph_spec(names.TEXT_ENCODER, 1, None, *specs)
    return GraphFunction(graph, lambda tensors, _: model.encode_text(tensors))


def _graph_spec(
    kind: str, batch: int, scale: int | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> GraphSpec:
    return GraphSpec(names.graph_file(kind, batch, scale), kind, batch, scale, tuple(inputs), tuple(outputs))


def _f_hat_spec(model: NextScaleModel, batch: int, name: str, role: Role = Role.F_HAT) -> TensorSpec:
    return TensorSpec(name, (batch, *model.f_hat_shape()), "float32", role)


def _step_function(model: NextScaleModel, plan: ResolvedPlan, scale: int, batch: int) -> GraphFunction:
    specs = {layer: model.block_spec(plan, scale, layer, batch) for layer in plan.layers(scale)}
    graph = _step_spec(model, plan, scale, batch, specs)

    def request_of(tensors: Mapping[str, Tensor]) -> Request:
        # Zeros for one that this step does not take.
        return Request(**{n: tensors[n] if n in tensors else torch.zeros(batch) for n in GRAPH_INPUTS})

    def given_of(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        own = names.given(scale), names.is_given(scale)
        return (tensors[own[0]], tensors[own[1]]) if own[0] in tensors else None

    def run(tensors: Mapping[str, Tensor], tracing: Tracing) -> dict[str, Tensor]:
        result = model.step(
            plan,
            scale,
            condition=tensors,
            f_hat=tensors.get(names.F_HAT),
            past={
                layer: [
                    (tensors[names.past_k(layer, i)], tensors[names.past_v(layer, i)]) for i in range(len(spec.past))
                ]
                for layer, spec in specs.items()
            },
            caches={
                i: tuple(tensors[names.cache(i, sublayer)] for sublayer in spec.sublayers)
                for i, spec in specs.items()
                if spec.keep is not None
            },
            uniform=tensors[names.UNIFORM],
            request=request_of(tensors),
            gumbel=tensors.get(names.GUMBEL),
            given=given_of(tensors),
            select=tracing.select,
            block_names=tracing.block_names,
        )
        by_name = {
            names.TOKENS: result.tokens,
            names.F_HAT_OUT: result.f_hat,
            names.LOGITS: result.logits,
            names.FINITE: result.finite,
            **result.handed_on,
        }
        for i, (k, v) in result.new_kv.items():
            by_name |= {names.new_k(i): k, names.new_v(i): v}
        for i, outputs in result.caches.items():
            by_name |= {names.cache(i, sublayer): y for sublayer, y in zip(model.sublayers, outputs, strict=True)}
        return {spec.name: by_name[spec.name] for spec in graph.outputs}

    def follow(tensors: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, f_hat, gumbel = outputs[names.TOKENS], tensors.get(names.F_HAT), tensors.get(names.GUMBEL)
        if gumbel is None:
            return {names.F_HAT_OUT: model.accumulate(tokens, f_hat, scale)}
        is_given = tensors.get(names.is_given(scale))
        blended = model.blend(tokens, outputs[names.LOGITS], gumbel, f_hat, scale, request_of(tensors), is_given)
        return {names.F_HAT_OUT: blended}

    return GraphFunction(graph, run, specs, follow)


def _step_spec(
    model: NextScaleModel, plan: ResolvedPlan, scale: int, batch: int, specs: Mapping[int, BlockSpec]
) -> GraphSpec:
    first = scale == plan.steps[0]
    token_shape, token_dtype = model.token_spec(scale)
    inputs = [
        dataclasses.replace(spec, shape=(min(spec.shape[0], plan.rows(scale, batch)), *spec.shape[1:]))
        for spec in model.step_condition_specs(plan, scale, batch)
    ]
    if not first:
        inputs.insert(0, _f_hat_spec(model, batch, names.F_HAT))
    outputs = [
        TensorSpec(names.TOKENS, (batch, *token_shape), dtype_name(token_dtype), Role.TOKENS, scale=scale),
        _f_hat_spec(model, batch, names.F_HAT_OUT),
        TensorSpec(names.LOGITS, (batch, *model.logits_shape(scale)), "float32", Role.LOGITS, scale=scale),
        TensorSpec(names.FINITE, (batch,), "bool", Role.FINITE, scale=scale),
        *model.handed_on_specs(plan, scale, batch),
    ]
    for layer, spec in specs.items():
        read, written = _layer_tensors(layer, spec)
        inputs += read
        outputs += written
    inputs.append(TensorSpec(names.UNIFORM, (batch, *token_shape), "float32", Role.NOISE, scale=scale))
    gumbel_shape = model.gumbel_shape(scale)
    if gumbel_shape is not None:
        inputs.append(TensorSpec(names.GUMBEL, (batch, *gumbel_shape), "float32", Role.GUMBEL, scale=scale))
    if model.has_encoder:
        inputs += [
            _given_spec(model, batch, scale),
            TensorSpec(names.is_given(scale), (batch, token_shape[0]), "bool", Role.GIVEN),
        ]
    for name in model.step_request_inputs(plan, scale):
        parameter = GRAPH_INPUTS[name]
        of_scale = scale if parameter.per_scale else None
        inputs.append(TensorSpec(name, (batch,), parameter.dtype, Role.REQUEST, scale=of_scale))
    return _graph_spec(names.STEP, batch, scale, inputs, outputs)


def _layer_tensors(layer: int, spec: BlockSpec) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """What a layer of a step reads and writes besides its activations: keys, values, token cache."""
    kv_dtype = dtype_name(spec.kv_dtype)

    def keys_and_values(k: str, v: str, shape: tuple[int, ...]) -> list[TensorSpec]:
        return [
            TensorSpec(name, shape, kv_dtype, role, layer=layer) for name, role in ((k, Role.KEYS), (v, Role.VALUES))
        ]

    def caches(num_tokens: int) -> list[TensorSpec]:
        shape = (spec.rows, num_tokens, spec.channels)
        return [
            TensorSpec(names.cache(layer, sublayer), shape, dtype_name(spec.dtype), Role.CACHE, layer=layer)
            for sublayer in spec.sublayers
        ]

    read, written = [], []
    for i, shape in enumerate(spec.past_shapes):
        read += keys_and_values(names.past_k(layer, i), names.past_v(layer, i), shape)
    if spec.keep is not None:
        read += caches(spec.cached_height * spec.cached_width)
    if spec.emits_kv:
        written += keys_and_values(names.new_k(layer), names.new_v(layer), spec.kv_shape)
    if spec.writes_cache:
        written += caches(spec.num_cached)
    return read, written


def build_graph(
    function: GraphFunction, model: NextScaleModel, places: Mapping[str, TensorPlace], folder: Path
) -> ir.Model:
    """The ONNX model of one graph: traced, assembled, its weights pointing into the weights file in `folder`."""
    block_names = {spec: f"Block{i}" for i, spec in enumerate(function.blocks)}
    spec = function.spec
    skeleton = _trace(
        _Graph(lambda tensors: function.run(tensors, Tracing(block_names)), [i.name for i in spec.inputs], model),
        [torch.zeros(i.shape, dtype=torch_dtype(i.dtype)) for i in spec.inputs],
        [i.name for i in spec.inputs],
        [o.name for o in spec.outputs],
    )
    for block, name in block_names.items():
        layer = next(i for i, own in function.layers.items() if own == block)
        function_ = _block_function(block, name, model.block_weights(block, layer))
        skeleton.functions[function_.identifier()] = function_
    passes.InlinePass(lambda f: f.domain == BLOCK_DOMAIN)(skeleton)
    skeleton.opset_imports.pop(BLOCK_DOMAIN, None)
    for proto in onnx_functions.function_protos(OPSET):
        operator = ir.serde.deserialize_function(proto)
        skeleton.functions[operator.identifier()] = operator
    passes.RemoveUnusedFunctionsPass()(skeleton)
    passes.CommonSubexpressionEliminationPass()(skeleton)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(skeleton)
    passes.DeduplicateInitializersPass()(skeleton)
    passes.RemoveUnusedNodesPass()(skeleton)
    passes.RemoveUnusedOpsetsPass()(skeleton)
    passes.ClearMetadataAndDocStringPass()(skeleton)
    passes.NameFixPass()(skeleton)
    _point_weights(skeleton, len(spec.inputs), places, folder, spec.file)
    skeleton.graph.name = spec.name
    skeleton.producer_name = "fastvar-trt"
    return skeleton


def _block_function(spec: BlockSpec, name: str, weights: Mapping[str, Tensor]) -> ir.Function:
    """A traced block as an ONNX function of its inputs, weights among them."""
    activations = [torch.zeros(shape, dtype=dtype) for shape, dtype in spec.activations.values()]
    examples = [*activations, *weights.values()]

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {o[0]: value for o, value in zip(spec.outputs, spec.run(tensors, pivotal_tokens), strict=True)}

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


class _Recorder(TorchFunctionMode):
    """Collects the parameters that functions of torch are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()  # ids

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read |= {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter)}
        return func(*args, **(kwargs or {}))


def _parameters_read(module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The parameters that a module reads, by name: a step reads its own tables only, and no part of the decoder."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Recorder() as recorder:
        module(*inputs)
    return {name: value for name, value in module.named_parameters() if id(value) in recorder.read}


class _ParametersAsInputs(nn.Module):
    """A module whose parameters of given names are inputs after its own; the others are no part of a trace of it.

    Initializers would be merged where they are equal, and folded where they are small. The same graph may read another
    checkpoint's weights (`exporter.export_again`), in which neither holds.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[str]) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple it is no submodule, whose parameters are initializers
        self._parameter_names = parameters

    def forward(self, *inputs: Tensor) -> Any:
        count = len(inputs) - len(self._parameter_names)
        parameters = dict(zip(self._parameter_names, inputs[count:], strict=True))
        return torch.func.functional_call(self._module[0], parameters, inputs[:count])


def linear_layers(models: Iterable[NextScaleModel], functions: Iterable[GraphFunction]) -> frozenset[str]:
    """The names of the linear layers that graphs of models multiply with, whose matrices are no more than cast."""
    names_of = {id(parameter): name for model in models for name, parameter in model.named_parameters()}
    found = set()

    def observe(linear: str, tensors: Mapping[str, Tensor], x: Tensor) -> None:
        weight = tensors.get(f"{linear}.weight")  # keys and values have none
        if weight is not None:
            found.add(names_of[id(weight)].removesuffix(".weight"))

    with FakeTensorMode(allow_non_fake_inputs=True), observing(observe):
        for function in functions:
            inputs = {i.name: torch.zeros(i.shape, dtype=torch_dtype(i.dtype)) for i in function.spec.inputs}
            function.run(inputs, COMPUTE)
    return frozenset(found)


def _trace(
    module: nn.Module, inputs: Sequence[Tensor], input_names: Sequence[str], output_names: Sequence[str]
) -> ir.Model:
    with torch.no_grad(), _quiet():
        parameters = _parameters_read(module, inputs)
        program = torch.onnx.export(
            _ParametersAsInputs(module, list(parameters)).eval(),
            (*inputs, *parameters.values()),
            input_names=[*input_names, *parameters],
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


def _point_weights(
    model: ir.Model, num_inputs: int, places: Mapping[str, TensorPlace], folder: Path, file: str
) -> None:
    """Let the inputs after the graph's own be references into the weights file; nothing large may stay behind."""
    for initializer in model.graph.initializers.values():
        tensor = initializer.const_value
        assert tensor is not None
        if tensor.nbytes > _MAX_INLINE_BYTES:
            raise ExportError(
                f"{file}: constant {initializer.name} of {tensor.nbytes} bytes is not one of the weights; it would be "
                "copied into every graph"
            )
    weights = model.graph.inputs[num_inputs:]
    del model.graph.inputs[num_inputs:]
    for value in weights:
        name = (value.name or "").removeprefix("model.").removeprefix("image_decoder.").removeprefix("image_encoder.")
        place = places[name]
        assert value.shape is not None and tuple(value.shape) == place.shape, (file, name)
        if _is_int4(value):
            place = dataclasses.replace(place, dtype="int4", shape=(*place.shape[:-1], 2 * place.shape[-1]))
            value.shape, value.type = ir.Shape(place.shape), ir.TensorType(ir.DataType.INT4)
        value.const_value = external_tensor(place, name, folder)
        value.name = name
        model.graph.register_initializer(value)


def _is_int4(value: ir.Value) -> bool:
    """Whether bytes are two numbers each: torch has no such dtype, and a weights file neither."""
    uses = [node for node, _ in value.uses() if node.op_type == "DequantizeLinear"]
    return bool(uses) and value.dtype == ir.DataType.UINT8 and uses[0].outputs[0].shape != value.shape


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
