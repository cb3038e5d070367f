"""The manifest: the one contract between the exporter and the runtime. Standard library only.

Tensor names that both sides use are defined here and nowhere else; what a tensor is to the runtime, its role, layer and
scale say. Dimension letters: B images, B2 = 2B rows with classifier-free guidance (conditional rows first), L tokens,
K kept tokens, S keys seen so far, T cached tokens, H heads, D head dim, C channels, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.errors import BundleError, PlanError
from fastvar_trt.runtime.plan import Drafted, PruningPlan, ResolvedPlan
from fastvar_trt.runtime.precision import DTYPES, PLAIN, PRECISIONS, Precision

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
REFERENCE_FILE = "reference.npz"  # what PyTorch computed at export, for `fastvar verify`; absent after --no-compare
TOKENIZER_FILE = "tokenizer.json"  # of the text encoder
ENGINES_FOLDER = "engines"
ENGINES_FILE = "engines.json"

# Kinds of graphs. A family may have others: a chain runs whatever graphs it lists.
TEXT_ENCODER = "text_encoder"
CONDITION_GRAPH = "condition"
STEP = "step"
RESIDUAL = "residual"  # after the last step: what of the token features no code says (HART)
DECODER = "decoder"
IMAGE_ENCODER = "image_encoder"


class Role(enum.StrEnum):
    """What a graph's tensor is to the runtime."""

    CONDITION = "condition"  # input: what the image is of; set by the request
    REQUEST = "request"  # input: a run-time value [B], by its name in `runtime.request.Request`; of a scale or of all
    NOISE = "noise"  # input: U[0, 1), one number per draw; of a scale
    NORMAL = "normal"  # input: N(0, 1); of a scale
    GUMBEL = "gumbel"  # input: Gumbel(0, 1); of a scale
    GIVEN = "given"  # input: what is taken of a picture in place of being drawn; of an image encoder an output
    F_HAT = "f_hat"  # what the graph before wrote; as an output, the same after this graph
    # Of a layer, and of as many rows: those of all graphs before; as an output, those that this graph adds.
    KEYS = "keys"
    VALUES = "values"  # likewise
    # Written by one graph and read by later ones under the same name, all rows or the first, conditional half:
    STATE = "state"
    MODULATION = "modulation"
    TEXT = "text"
    CACHE = "cache"
    # Results:
    TOKENS = "tokens"  # of a scale
    LOGITS = "logits"  # of a scale; bound on request only
    FINITE = "finite"  # bool [B], whether an image's logits are; of a scale
    IMAGE = "image"  # bound on request only
    PIXELS = "pixels"


NOISES = (Role.NOISE, Role.NORMAL, Role.GUMBEL)
_PER_SCALE = (*NOISES, Role.TOKENS, Role.LOGITS, Role.FINITE)  # every step has its own
_PER_LAYER = (Role.KEYS, Role.VALUES)
OPTIONAL_ROLES = (Role.LOGITS, Role.IMAGE)
HALVED_ROLES = (Role.STATE, Role.MODULATION, Role.TEXT, Role.CACHE)  # of which a graph may read the conditional half
_HANDED_ON = (Role.F_HAT, *HALVED_ROLES)  # a graph reads what one before wrote
_OF_BATCH = (
    Role.REQUEST,
    *NOISES,
    Role.GIVEN,
    Role.F_HAT,
    Role.TOKENS,
    Role.LOGITS,
    Role.FINITE,
    Role.IMAGE,
    Role.PIXELS,
)

# Graph inputs and outputs.
LABELS = "labels"  # int64 [B], class indices
TEXT_FEATURES = "text_features"  # fp32 [B2, T, C_text], the text encoder's last hidden state; padding is not read
TEXT_LENGTHS = "text_lengths"  # int64 [B2], how many of the T are tokens
NEGATIVE = "negative"  # bool [B], whether the unconditional row has text of its own, or the model's learnt one
TEXT_MASK = "text_mask"  # [B2, 1, 1, T], added to the attention scores: 0, or very low at padding
START = "start"  # [B2, C] or [B2, T, C], condition embedding: what the first step starts from, before positions
HEAD_MODULATION = "head_modulation"  # [B2, 2, C]
F_HAT = "f_hat"  # fp32 [B, C_vae, h_K, w_K], accumulated token features
F_HAT_OUT = "f_hat_out"  # the same after this step (a graph's input and output cannot share one name)
TOKEN_IDS = "token_ids"  # int64 [1, T], of one prompt, padded
TOKEN_COUNT = "token_count"  # int64 [1], how many of them are tokens
ENCODED = "encoded"  # fp32 [1, T, C_text], what the text encoder makes of them
HIDDEN = "hidden"  # [B2, L, C], what the last step hands on to the residual diffusion
NORMAL = "normal"  # fp32 [B, S, L, C_vae], N(0, 1): where the residual diffusion starts, and what its steps add
GUMBEL = "gumbel"  # fp32 [B, L, M], Gumbel(0, 1) of the M likeliest codes, the likeliest first
UNIFORM = "uniform"  # fp32 [B, L] or [B, L, bits], U(0, 1), one per draw
TOKENS = "tokens"  # int32 [B, L], or bits uint8 [B, L, bits]
DETAIL = "detail"  # fp32 [B, C_vae, h_K, w_K], added to f_hat before it is decoded: of given tokens of skipped scales
LOGITS = "logits"  # fp32 [B, L, V] or [B, L, bits, 2], after guidance, before temperature
FINITE = "finite"  # bool [B]
IMAGE = "image"  # fp32 [B, 3, H, W] in [0, 1], RGB
PIXELS = "pixels"  # uint8 [B, H, W, 3], RGB


def modulation(layer: int) -> str:
    """Adaptive-norm modulations of a layer: fp32 [B2, 6, C] (gamma1, gamma2, 1+scale1, 1+scale2, shift1, shift2)."""
    return f"modulation_{layer}"


def past_k(layer: int, piece: int = 0) -> str:
    """Keys kept so far in a layer: [S, B2, H, D]; piece 1: those of scales without guidance, [S, B, H, D]."""
    return f"past_k_{layer}" if piece == 0 else f"past_k_{layer}_unguided"


def past_v(layer: int, piece: int = 0) -> str:
    """Values kept so far in a layer: likewise."""
    return f"past_v_{layer}" if piece == 0 else f"past_v_{layer}_unguided"


def new_k(layer: int) -> str:
    """Keys of this step's kept tokens: [K, B2, H, D], or [K, B, H, D] without guidance."""
    return f"new_k_{layer}"


def new_v(layer: int) -> str:
    """Values of this step's kept tokens: likewise."""
    return f"new_v_{layer}"


def given(scale: int) -> str:
    """Tokens of a scale, as `TOKENS`: what the image encoder gives, and a step takes."""
    return f"given_{scale:02d}"


def is_given(scale: int) -> str:
    """bool [B, L]: which of them a step takes in place of those that it draws."""
    return f"is_given_{scale:02d}"


def hub(scale: int) -> str:
    """What the drafter started a scale from: f_hat at its map, fp32 [B, C_vae, h, w]."""
    return f"hub_{scale}"


def text_k(layer: int) -> str:
    """Cross-attention keys of a layer: [B2, H, T, D]."""
    return f"text_k_{layer}"


def text_v(layer: int) -> str:
    """Cross-attention values of a layer: [B2, H, T, D]."""
    return f"text_v_{layer}"


def cache(layer: int, sublayer: str) -> str:
    """A sublayer's output at the cache scale: [B2, T, C]."""
    return f"cache_{layer}_{sublayer}"


def graph_name(kind: str, scale: int | None = None) -> str:
    """`condition`, `step_00`, ...: a graph in timings and messages, and a step's tokens in files."""
    return kind if scale is None else f"{kind}_{scale:02d}"


def logits_name(scale: int) -> str:
    """A step's logits in the reference file."""
    return f"logits_{scale:02d}"


def graph_file(kind: str, batch: int, scale: int | None = None, variant: str = "") -> str:
    """File name of a graph; only batch sizes other than 1, and variants that are named, are part of the name."""
    size = "" if batch == 1 else f"_b{batch}"
    return f"{graph_name(kind, scale)}{size}{variant and f'_{variant}'}.onnx"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output.

    Attributes:
        name: of the ONNX graph's tensor.
        shape: static.
        dtype: of `precision.DTYPES`.
        role: what it is to the runtime.
        layer: which it belongs to, of keys, values, caches, modulations.
        scale: which it belongs to, where every step has its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role = Role.STATE
    layer: int | None = None
    scale: int | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the dense tensor in bytes."""
        return DTYPES[self.dtype].bytes_of(math.prod(self.shape))

    def to_json(self) -> dict[str, Any]:
        """A JSON object, without what is None."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Read a JSON object.

        Raises:
            KeyError, TypeError, ValueError: not such an object.
        """
        spec = cls(
            name=str(data["name"]),
            shape=tuple(map(int, data["shape"])),
            dtype=str(data["dtype"]),
            role=Role(data["role"]),
            layer=_optional_int(data.get("layer")),
            scale=_optional_int(data.get("scale")),
        )
        if spec.dtype not in DTYPES:
            raise ValueError(f"tensor {spec.name}: unknown dtype {spec.dtype!r}")
        if (spec.role in _PER_SCALE and spec.scale is None) or (spec.role in _PER_LAYER and spec.layer is None):
            raise ValueError(f"tensor {spec.name}: its {spec.role} belong to no scale or layer")
        if spec.role in _PER_LAYER and len(spec.shape) != 4:
            raise ValueError(f"tensor {spec.name}: got {spec.shape}, expected [keys, rows, heads, channels]")
        return spec


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


def check_same_tensors(
    what: str, expected: tuple[TensorSpec, ...], got: tuple[TensorSpec, ...], error: type[Exception]
) -> None:
    """That two lists have the same names, shapes and dtypes.

    Raises:
        error: naming the first that only one of them has.
    """
    ours, theirs = ({(spec.name, spec.shape, spec.dtype) for spec in specs} for specs in (expected, got))
    for name, shape, dtype in sorted(ours ^ theirs, key=str):
        where = "manifest" if (name, shape, dtype) in ours else "graph"
        raise error(
            f"{what}: only the {where} has the tensor {name}, {dtype} {shape}; copy the bundle again, or export it "
            "again"
        )


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph of the bundle; `scale` is set for steps, and for others that belong to one scale."""

    file: str
    kind: str
    batch: int
    scale: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """`condition`, `step_00`, ..., `decoder`: the graph's name in timings and messages."""
        return graph_name(self.kind, self.scale)

    def input(self, role: Role) -> TensorSpec | None:
        """The first input of that role."""
        return next((spec for spec in self.inputs if spec.role is role), None)

    def output(self, role: Role) -> TensorSpec | None:
        """The first output of that role."""
        return next((spec for spec in self.outputs if spec.role is role), None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "file": self.file,
            "kind": self.kind,
            "batch": self.batch,
            "scale": self.scale,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GraphSpec:
        """Read a JSON object.

        Raises:
            KeyError, TypeError, ValueError: not such an object.
        """
        return cls(
            file=str(data["file"]),
            kind=str(data["kind"]),
            batch=int(data["batch"]),
            scale=_optional_int(data["scale"]),
            inputs=tuple(map(TensorSpec.from_json, data["inputs"])),
            outputs=tuple(map(TensorSpec.from_json, data["outputs"])),
        )


ON_DEMAND = (TEXT_ENCODER, IMAGE_ENCODER, DECODER)  # kinds of graphs that need not stay loaded while a chain runs


class Condition(enum.StrEnum):
    """What a model draws from."""

    CLASS = "class"
    TEXT = "text"


class Tokens(enum.StrEnum):
    """What a model draws at a position."""

    INDEX = "index"  # one of a vocabulary
    BITS = "bits"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What the exported model takes and draws, and its sizes. `family` is for people and for the exporter."""

    family: str
    condition: Condition
    tokens: Tokens
    depth: int
    width: int
    num_heads: int
    mlp_width: int
    vocab_size: int  # outputs of the head per token: V, or 2 per bit
    code_channels: int  # inputs of the embedding per token
    num_classes: int = 0  # where the condition is a class
    text_width: int = 0  # C_text, where it is text
    text_length: int = 0  # T, the longest prompt in tokens
    is_gated: bool = False  # whether the feed-forward layers have a gate, a third matrix
    context_tokens: int = 0  # T where the text, padding included, is a prefix of the keys; 0 where it is not
    drafter: ModelSpec | None = None  # draws the first scales in its place; its layers are numbered first
    num_drafted: int = 0  # how many scales it draws

    @property
    def drafted(self) -> Drafted | None:
        """What plans have to know of the drafter."""
        return None if self.drafter is None else Drafted(self.num_drafted, self.drafter.depth)

    def at(self, scale: int) -> ModelSpec:
        """What draws a scale."""
        return self if self.drafter is None or scale >= self.num_drafted else self.drafter

    def _check(self) -> None:
        wanted = {Condition.CLASS: ("num_classes",), Condition.TEXT: ("text_width", "text_length")}
        elsewhere = {name for condition, names in wanted.items() if condition is not self.condition for name in names}
        elsewhere |= {"context_tokens", "num_drafted"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type != "int" or field.name in elsewhere:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.{field.name}: got {value!r}, expected a positive whole number")
        if self.context_tokens not in (0, self.text_length):
            raise ValueError(f"model.context_tokens: got {self.context_tokens!r}, expected 0 or {self.text_length}")
        is_number = type(self.num_drafted) is int and self.num_drafted >= 0
        if not is_number or (self.drafter is None) != (self.num_drafted == 0):
            raise ValueError(f"model.num_drafted: got {self.num_drafted!r}, expected 1 or more with a drafter, else 0")
        if self.drafter is not None and self.drafter.drafter is not None:
            raise ValueError("model.drafter: has a drafter of its own")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Read a JSON object.

        Raises:
            KeyError, TypeError, ValueError: not such an object.
        """
        parts: dict[str, Any] = {"condition": Condition(data["condition"]), "tokens": Tokens(data["tokens"])}
        if data.get("drafter") is not None:
            parts["drafter"] = cls.from_json(data["drafter"])
        model = cls(**{**data, **parts})
        model._check()
        return model


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """Sampling limits and defaults; `max_top_k` is fixed in the graphs, the rest are run-time values."""

    max_top_k: int
    cfg: float
    top_k: int
    top_p: float
    temperature: float = 1.0
    neutral_cfg: float = 1.0  # the guidance scale that does not guide

    def check(self, vocab_size: int) -> None:
        """That the values can be used.

        Raises:
            ValueError: one cannot.
        """
        for name in ("max_top_k", "top_k"):
            value, least = getattr(self, name), int(name == "max_top_k")
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= vocab_size:
                raise ValueError(f"sampling.{name}: got {value!r}, expected {least} to {vocab_size}")
        for name in ("cfg", "top_p", "temperature", "neutral_cfg"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"sampling.{name}: got {value!r}, expected a finite number")
        if self.temperature <= 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"sampling: got temperature {self.temperature} and top_p {self.top_p}")


@dataclasses.dataclass(frozen=True)
class FileSpec:
    """Size and SHA-256 of one file of the bundle."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileSpec:
        """The file as it lies there."""
        return cls(path.stat().st_size, file_sha256(path))

    def problem(self, path: Path, *, check_hash: bool) -> str:
        """What is wrong with the file that lies there; empty where nothing is."""
        if not path.is_file():
            return f"{path.name} is missing"
        size = path.stat().st_size
        if size != self.num_bytes:
            return f"{path.name}: got {size} bytes, expected {self.num_bytes} (an incomplete copy?)"
        if check_hash and file_sha256(path) != self.sha256:
            return f"{path.name}: its SHA-256 is not that on record (damaged or changed)"
        return ""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One size and pruning plan over the bundle's weights.

    Attributes:
        name: by which it is asked for.
        image_height, image_width: pixels.
        schedule: (height, width) of the token map per scale, skipped ones included.
        plan: what is pruned.
        graphs: of all batch sizes; those of one batch size in the order in which they run.
        encoder: the graph that makes tokens of one picture of this size, where the bundle has one.
        configs: the exporter's, where they are not the manifest's own.
    """

    name: str
    image_height: int
    image_width: int
    schedule: tuple[tuple[int, int], ...]
    plan: PruningPlan
    graphs: tuple[GraphSpec, ...]
    encoder: GraphSpec | None = None
    configs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> str:
        """Of the pictures, width x height in pixels: `1024x576`."""
        return f"{self.image_width}x{self.image_height}"

    @property
    def h_div_w(self) -> float:
        """Height over width of the pictures."""
        return self.image_height / self.image_width

    def resolve(self, model: ModelSpec, plan: PruningPlan | None = None) -> ResolvedPlan:
        """A plan for the model at this size; default: the variant's own.

        Raises:
            PlanError: it does not fit.
        """
        return (plan or self.plan).resolve(self.schedule, model.depth, model.context_tokens, model.drafted)

    @functools.cached_property
    def computed_scales(self) -> tuple[int, ...]:
        """The scales that have a step, in order."""
        return tuple(dict.fromkeys(g.scale for g in self.graphs if g.kind == STEP and g.scale is not None))

    @property
    def preview_scales(self) -> tuple[int, ...]:
        """The scales after which there is something to look at besides the result: computed ones before the last."""
        return self.computed_scales[:-1]

    def chain(self, batch: int) -> tuple[GraphSpec, ...]:
        """The graphs of one batch size, in the order in which they run."""
        return tuple(graph for graph in self.graphs if graph.batch == batch)

    def steps(self, batch: int) -> tuple[GraphSpec, ...]:
        """Those of the chain that draw tokens."""
        return tuple(graph for graph in self.chain(batch) if graph.kind == STEP)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "name": self.name,
            "image_height": self.image_height,
            "image_width": self.image_width,
            "schedule": [list(size) for size in self.schedule],
            "plan": self.plan.to_json(),
            "graphs": [graph.to_json() for graph in self.graphs],
            "encoder": None if self.encoder is None else self.encoder.to_json(),
            "configs": dict(self.configs),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Variant:
        """Read a JSON object.

        Raises:
            KeyError, TypeError, ValueError, PlanError: not such an object.
        """
        variant = cls(
            name=str(data["name"]),
            image_height=int(data["image_height"]),
            image_width=int(data["image_width"]),
            schedule=tuple((int(h), int(w)) for h, w in data["schedule"]),
            plan=PruningPlan.from_json(data["plan"]),
            graphs=tuple(map(GraphSpec.from_json, data["graphs"])),
            encoder=None if data.get("encoder") is None else GraphSpec.from_json(data["encoder"]),
            configs=dict(data.get("configs", {})),
        )
        if variant.image_height < 1 or variant.image_width < 1:
            raise ValueError(f"image: got {variant.image_width}x{variant.image_height}")
        return variant

    def check(self, model: ModelSpec, batches: tuple[int, ...]) -> None:
        """That graphs, schedule and plan fit together, so that nothing later has to doubt it.

        Raises:
            ValueError: what does not.
            PlanError: the plan does not fit the schedule.
        """
        plan = self.resolve(model)
        of_one_batch = [(CONDITION_GRAPH, None), *((STEP, k) for k in plan.steps), (DECODER, None)]
        known = {kind for kind, _ in of_one_batch}
        for batch in {*batches, *(graph.batch for graph in self.graphs)}:
            expected = of_one_batch if batch in batches else []
            found = [(graph.kind, graph.scale) for graph in self.chain(batch) if graph.kind in known]
            for kind, scale in dict.fromkeys([*expected, *found]):
                got, wanted = found.count((kind, scale)), expected.count((kind, scale))
                if got != wanted:
                    raise ValueError(
                        f"graphs: got {got} of {graph_name(kind, scale)} for batch {batch}, expected {wanted}"
                    )
            if found != expected:
                raise ValueError(f"graphs: those of batch {batch} are not in the order in which they run")
            self._check_chain(batch, plan)
        self._check_given(plan)

    @property
    def takes_pictures(self) -> bool:
        """Whether parts of a picture can be given in place of being drawn."""
        return self.encoder is not None

    def _check_given(self, plan: ResolvedPlan) -> None:
        """That steps and decoder take what the encoder gives, and nothing where there is none."""
        tensors = {} if self.encoder is None else {spec.name: spec for spec in self.encoder.outputs}
        if self.encoder is not None:
            pixels = (self.encoder.input(Role.PIXELS), (1, self.image_height, self.image_width, 3))
            expected = {given(scale) for scale in range(len(self.schedule))} | {DETAIL}
            if pixels[0] is None or pixels[0].shape != pixels[1] or not expected <= set(tensors):
                raise ValueError(f"{self.encoder.file}: got other tensors than an image encoder of this size has")
        for graph in self.graphs:
            taken = {spec.name: spec for spec in graph.inputs if spec.role is Role.GIVEN}
            wanted: tuple[str, ...] = ()
            if self.encoder is not None and graph.kind == DECODER:
                wanted = (DETAIL,)
            elif self.encoder is not None and graph.kind == STEP and graph.scale is not None:
                wanted = (given(graph.scale), is_given(graph.scale))
            if set(taken) != set(wanted):
                raise ValueError(f"{graph.file}: got {', '.join(taken) or 'nothing'} to be given, expected {wanted}")
            for name, spec in taken.items():
                if name in tensors and (spec.shape[1:], spec.dtype) != (tensors[name].shape[1:], tensors[name].dtype):
                    raise ValueError(f"{graph.file}: {name}: not what {self.encoder and self.encoder.file} gives")
                if name not in tensors and graph.scale is not None:
                    _check_axis(graph, spec, 1, plan.num_tokens(graph.scale))

    def _check_chain(self, batch: int, plan: ResolvedPlan) -> None:
        """That tokens, keys and values are as many as schedule and plan say: buffers are sized by these."""
        num_keys: dict[tuple[Role, int | None, int], int] = defaultdict(int)
        written: set[tuple[Role, str]] = set()
        for graph in self.chain(batch):
            _check_roles(graph)
            for spec in graph.inputs:
                if spec.role in _PER_LAYER:
                    _check_axis(graph, spec, 0, num_keys[spec.role, spec.layer, spec.shape[1]])
                if spec.role in _HANDED_ON and _handed_on(spec) not in written:
                    raise ValueError(f"{graph.file}: {spec.name}: no graph before writes this {spec.role}")
            written |= {_handed_on(spec) for spec in graph.outputs if spec.role in _HANDED_ON}
            for spec in (*graph.inputs, *graph.outputs):
                if spec.role in _OF_BATCH:
                    _check_axis(graph, spec, 0, batch)
                if spec.scale is not None and not 0 <= spec.scale < len(self.schedule):
                    raise ValueError(f"{graph.file}: {spec.name}: there is no scale {spec.scale}")
                if spec.role in (Role.NOISE, Role.TOKENS) and spec.scale is not None:
                    _check_axis(graph, spec, 1, plan.num_tokens(spec.scale))
            for spec in graph.outputs:
                if spec.role in _PER_LAYER:
                    if graph.kind == STEP and graph.scale is not None and spec.layer is not None:
                        _check_axis(graph, spec, 0, plan.kept(graph.scale, spec.layer))
                    num_keys[spec.role, spec.layer, spec.shape[1]] += spec.shape[0]


def _handed_on(spec: TensorSpec) -> tuple[Role, str]:
    """What makes an output and a later input the same; there is one f_hat, whatever its tensors are called."""
    return spec.role, "" if spec.role is Role.F_HAT else spec.name


def _check_roles(graph: GraphSpec) -> None:
    """That a step and a decoder have what the runtime gives them and takes from them."""
    f_hat, scale = (Role.F_HAT, None), graph.scale
    needed: dict[str, tuple[list[Any], list[Any]]] = {
        STEP: ([(Role.NOISE, scale)], [f_hat, *((role, scale) for role in (Role.TOKENS, Role.LOGITS, Role.FINITE))]),
        DECODER: ([f_hat], [(Role.PIXELS, None), (Role.IMAGE, None)]),
    }
    for specs, expected in zip((graph.inputs, graph.outputs), needed.get(graph.kind, ((), ())), strict=True):
        found = [(spec.role, spec.scale) for spec in specs]
        for role, own in expected:
            if found.count((role, own)) != 1:
                where = "" if own is None else f" of scale {own}"
                raise ValueError(f"{graph.file}: got {found.count((role, own))} tensors {role}{where}, expected one")


def _check_axis(graph: GraphSpec, spec: TensorSpec, axis: int, expected: int) -> None:
    if spec.shape[axis : axis + 1] != (expected,):
        raise ValueError(f"{graph.file}: {spec.name}: got {spec.shape}, expected {expected} in axis {axis}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that is known of a bundle without opening another file."""

    model: ModelSpec
    precision: str
    batches: tuple[int, ...]
    sampling: SamplingSpec
    variants: tuple[Variant, ...]  # the first is the default
    auxiliary: tuple[GraphSpec, ...]  # graphs outside of the chains: a text encoder
    files: Mapping[str, FileSpec]
    operators: Mapping[str, int]
    tools: Mapping[str, str]
    configs: Mapping[str, Any]  # the exporter's: what it needs to trace these weights again
    matrices: tuple[tuple[str, str], ...] = ()  # exceptions from the precision's format: see `Precision.matrices`
    integer_kv: bool = False  # whether keys and values are kept in 8 bits
    calibration: tuple[int | str, ...] = ()  # classes or prompts that scales of activations were found with
    examples: tuple[str, ...] = ()  # of prompts, or names of classes in order

    @property
    def default(self) -> Variant:
        """The variant that is drawn with where none is asked for."""
        return self.variants[0]

    @property
    def own_precision(self) -> Precision:
        """The precision, with what is this bundle's own."""
        precision = dataclasses.replace(PRECISIONS[self.precision], matrices=self.matrices)
        return precision.with_integer_kv() if self.integer_kv else precision

    @functools.cached_property
    def sizes(self) -> Mapping[str, Variant]:
        """The first variant of every size of pictures: `1024x576` -> variant."""
        found: dict[str, Variant] = {}
        for variant in self.variants:
            found.setdefault(variant.size, variant)
        return found

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of what it says, the hashes of all files among it, as hex."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def resolved_plan(self) -> ResolvedPlan:
        """The default variant's plan in absolute terms."""
        return self.default.resolve(self.model)

    @functools.cached_property
    def graphs(self) -> tuple[GraphSpec, ...]:
        """Every graph, once; variants may share some."""
        encoders = [variant.encoder for variant in self.variants if variant.encoder is not None]
        graphs = [*self.auxiliary, *encoders, *(graph for variant in self.variants for graph in variant.graphs)]
        return tuple({graph.file: graph for graph in graphs}.values())

    @property
    def preview_scales(self) -> tuple[int, ...]:
        """Those of the default variant."""
        return self.default.preview_scales

    @property
    def text_encoder(self) -> GraphSpec | None:
        """The graph that encodes one prompt, of text models that were exported with their encoder."""
        return next((graph for graph in self.auxiliary if graph.kind == TEXT_ENCODER), None)

    def _check(self) -> None:
        """That the fields fit together, so that nothing later has to doubt it.

        Raises:
            ValueError: what does not.
            PlanError: a plan does not fit its schedule.
        """
        self.sampling.check(self.model.vocab_size)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        formats = {PLAIN, *(precision.stored for precision in PRECISIONS.values())}
        if not all(isinstance(pattern, str) and name in formats for pattern, name in self.matrices):
            raise ValueError(f"matrices: got {list(self.matrices)}, expected pairs of a pattern and a known format")
        if not isinstance(self.integer_kv, bool):
            raise ValueError(f"integer_kv: got {self.integer_kv!r}, expected true or false")
        if not all(type(subject) in (int, str) for subject in self.calibration):
            raise ValueError(f"calibration: got {list(self.calibration)}, expected classes or prompts")
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) != len(self.batches):
            raise ValueError(f"batches: got {list(self.batches)}, expected one or more different sizes of 1 or more")
        if not self.variants or len({variant.name for variant in self.variants}) != len(self.variants):
            raise ValueError("variants: expected one or more, each with a name of its own")
        for variant in self.variants:
            variant.check(self.model, self.batches)
        tokenizer = () if self.text_encoder is None else (TOKENIZER_FILE,)
        for name in (WEIGHTS_FILE, *tokenizer, *(graph.file for graph in self.graphs)):
            if name not in self.files:
                raise ValueError(f"files: {name} is missing")
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"files: {name!r} is no plain file name")

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return {
            "format_version": FORMAT_VERSION,
            "model": dataclasses.asdict(self.model),
            "precision": self.precision,
            "matrices": [list(rule) for rule in self.matrices],
            "integer_kv": self.integer_kv,
            "calibration": list(self.calibration),
            "examples": list(self.examples),
            "batches": list(self.batches),
            "sampling": dataclasses.asdict(self.sampling),
            "variants": [variant.to_json() for variant in self.variants],
            "auxiliary": [graph.to_json() for graph in self.auxiliary],
            "files": {name: dataclasses.asdict(spec) for name, spec in self.files.items()},
            "operators": dict(self.operators),
            "tools": dict(self.tools),
            "configs": dict(self.configs),
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> Manifest:
        """A manifest from its JSON object; `where` names the file in errors.

        Raises:
            BundleError: another format version, or a field that is missing or of the wrong type.
        """
        if not isinstance(data, dict):
            raise BundleError(f"{where}: got a JSON {type(data).__name__}, expected an object; export again")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{where}: format version: got {version!r}, this release reads {FORMAT_VERSION}; export the bundle "
                f"again{_how_to_export(data, where)}"
            )
        try:
            manifest = cls(
                model=ModelSpec.from_json(data["model"]),
                precision=str(data["precision"]),
                batches=tuple(map(int, data["batches"])),
                sampling=SamplingSpec(**data["sampling"]),
                variants=tuple(map(Variant.from_json, data["variants"])),
                auxiliary=tuple(map(GraphSpec.from_json, data["auxiliary"])),
                files={str(name): FileSpec(**spec) for name, spec in data["files"].items()},
                operators={str(name): int(version) for name, version in data["operators"].items()},
                tools={str(name): str(version) for name, version in data["tools"].items()},
                configs=dict(data["configs"]),
                matrices=tuple((pattern, name) for pattern, name in data.get("matrices", ())),
                integer_kv=data.get("integer_kv", False),
                calibration=tuple(data.get("calibration", ())),
                examples=tuple(map(str, data.get("examples", ()))),
            )
            manifest._check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, PlanError) as error:
            raise BundleError(f"{where}: damaged ({type(error).__name__}: {error}); export the bundle again") from error
        return manifest


def _how_to_export(data: Mapping[str, Any], where: str) -> str:
    """The command that makes a bundle of format 1 anew, as far as its manifest tells."""
    if data.get("format_version") != 1:
        return " with fastvar-export of this release"
    try:
        batches = ",".join(str(int(batch)) for batch in data["batches"])
        family, plan, precision = (str(v) for v in (data["model"]["family"], data["plan"]["name"], data["precision"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return " with fastvar-export of this release"
    return (
        f": fastvar-export {family} --checkpoint FILE --vae FILE --prune {plan} --precision {precision} --batch "
        f"{batches} --out {Path(where).parent} --force"
    )


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of the bundle in that folder.

    Raises:
        BundleError: no such folder, no manifest in it, or one that cannot be read.
    """
    path = bundle / MANIFEST_FILE
    if not bundle.is_dir():
        raise BundleError(f"bundle {bundle}: no such folder; make one with fastvar-export")
    if not path.is_file():
        raise BundleError(f"bundle {bundle}: no {MANIFEST_FILE} in it: not a bundle, or an incomplete copy")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error}); export the bundle again") from error
    return Manifest.from_json(data, str(path))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(bundle: Path, manifest: Manifest, *, hashes: bool) -> None:
    """That every file of the manifest is there with its size and, where `hashes`, its content.

    Raises:
        BundleError: naming the first file that is missing, truncated or changed.
    """
    for name, spec in manifest.files.items():
        problem = spec.problem(bundle / name, check_hash=hashes)
        if problem:
            raise BundleError(f"bundle {bundle}: {problem}; copy the bundle again, or export it again")
