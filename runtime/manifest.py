"""The manifest: the one contract between the exporter and the runtime. Standard library only.

Tensor names that both sides use are defined here and nowhere else. Dimension letters: B images, B2 = 2B
rows with classifier-free guidance (conditional rows first), L tokens, K kept tokens, S keys seen so far,
T cached tokens, H heads, D head dim, C channels, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.errors import BundleError, PlanError
from fastvar_trt.runtime.plan import PruningPlan, ResolvedPlan

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
REFERENCE_FILE = "reference.npz"  # what PyTorch computed at export; `fastvar verify` compares with it
TOKENIZER_FILE = "tokenizer.json"  # of the text encoder
ENGINES_FOLDER = "engines"
ENGINES_FILE = "engines.json"

# Graph inputs and outputs.
LABELS = "labels"  # int64 [B], class indices
TEXT_FEATURES = "text_features"  # fp32 [B2, T, C_text], the text encoder's last hidden state; padding is not read
TEXT_LENGTHS = "text_lengths"  # int64 [B2], how many of the T are tokens
NEGATIVE = "negative"  # bool [B], whether the unconditional row has text of its own, or the model's learnt one
TEXT_MASK = "text_mask"  # [B2, 1, 1, T], added to the attention scores: 0, or very low at padding
START = "start"  # [B2, C], condition embedding: the first token map before positions
HEAD_MODULATION = "head_modulation"  # [B2, 2, C]
F_HAT = "f_hat"  # fp32 [B, C_vae, h_K, w_K], accumulated token features
F_HAT_OUT = "f_hat_out"  # the same after this step (a graph's input and output cannot share one name)
TOKEN_IDS = "token_ids"  # int64 [1, T], of one prompt, padded
TOKEN_COUNT = "token_count"  # int64 [1], how many of them are tokens
ENCODED = "encoded"  # fp32 [1, T, C_text], what the text encoder makes of them
UNIFORM = "uniform"  # fp32 [B, L] or [B, L, bits], U(0, 1), one per draw
CFG = "cfg"  # fp32 [B]
TEMPERATURE = "temperature"  # fp32 [B]
TOP_K = "top_k"  # int64 [B], 1..max_top_k
TOP_P = "top_p"  # fp32 [B]; at least 1 keeps everything
GREEDY = "greedy"  # bool [B]
TOKENS = "tokens"  # int32 [B, L], or bits uint8 [B, L, bits]
LOGITS = "logits"  # fp32 [B, L, V] or [B, L, bits, 2], after guidance, before temperature; bound on request only
IMAGE = "image"  # fp32 [B, 3, H, W] in [0, 1], RGB; bound on request only
PIXELS = "pixels"  # uint8 [B, H, W, 3], RGB

REQUEST_DTYPES: Mapping[str, str] = {
    CFG: "float32",
    TEMPERATURE: "float32",
    TOP_K: "int64",
    TOP_P: "float32",
    GREEDY: "bool",
}
REQUEST_INPUTS = tuple(REQUEST_DTYPES)
PER_SCALE_REQUEST = (CFG, TEMPERATURE)  # each step has its own
OPTIONAL_OUTPUTS = (LOGITS, IMAGE)

FAMILIES = ("var", "infinity")
_OF_FAMILY = {"num_classes": "var", "text_width": "infinity", "text_length": "infinity"}

DTYPE_BYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "int32": 4,
    "int64": 8,
}


def modulation(layer: int) -> str:
    """Adaptive-norm modulations of a layer: fp32 [B2, 6, C] (gamma1, gamma2, 1+scale1, 1+scale2, shift1, shift2)."""
    return f"modulation_{layer}"


def past_k(layer: int) -> str:
    """Keys kept so far in a layer: [S, B2, H, D]."""
    return f"past_k_{layer}"


def past_v(layer: int) -> str:
    """Values kept so far in a layer: [S, B2, H, D]."""
    return f"past_v_{layer}"


def new_k(layer: int) -> str:
    """Keys of this step's kept tokens: [K, B2, H, D]."""
    return f"new_k_{layer}"


def new_v(layer: int) -> str:
    """Values of this step's kept tokens: [K, B2, H, D]."""
    return f"new_v_{layer}"


def text_k(layer: int) -> str:
    """Cross-attention keys of a layer: [B2, H, T, D]."""
    return f"text_k_{layer}"


def text_v(layer: int) -> str:
    """Cross-attention values of a layer: [B2, H, T, D]."""
    return f"text_v_{layer}"


def cache(layer: int, sublayer: str) -> str:
    """A sublayer's output at the cache scale: [B2, T, C]."""
    return f"cache_{layer}_{sublayer}"


def graph_file(kind: str, batch: int, scale: int | None = None) -> str:
    """File name of a graph; only batch sizes other than 1 are part of the name."""
    stem = kind if scale is None else f"{kind}_{scale:02d}"
    return f"{stem}.onnx" if batch == 1 else f"{stem}_b{batch}.onnx"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, static shape and dtype (a numpy name, or `bfloat16`) of a graph's input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of the dense tensor in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph of the bundle: `kind` is text_encoder, condition, step or decoder; `scale` is set for steps."""

    file: str
    kind: str
    batch: int
    scale: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """`condition`, `step_00`, ..., `decoder`: the graph's name in timings and messages."""
        return self.kind if self.scale is None else f"{self.kind}_{self.scale:02d}"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes of the exported model."""

    family: str  # var or infinity
    depth: int
    width: int
    num_heads: int
    mlp_width: int
    vocab_size: int  # outputs of the head per token: V, or 2 per bit
    code_channels: int  # inputs of the embedding per token
    image_height: int
    image_width: int
    num_classes: int = 0  # var
    text_width: int = 0  # infinity: C_text
    text_length: int = 0  # infinity: T, the longest prompt in tokens


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """Sampling limits and defaults; `max_top_k` is fixed in the graphs, the rest are run-time values."""

    max_top_k: int
    cfg: float
    top_k: int
    top_p: float
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class FileSpec:
    """Size and SHA-256 of one file of the bundle."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileSpec:
        """The file as it lies there."""
        return cls(path.stat().st_size, file_sha256(path))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that is known of a bundle without opening another file."""

    model: ModelSpec
    schedule: tuple[tuple[int, int], ...]
    plan: PruningPlan
    precision: str
    batches: tuple[int, ...]
    sampling: SamplingSpec
    graphs: tuple[GraphSpec, ...]
    files: Mapping[str, FileSpec]
    operators: Mapping[str, int]
    tools: Mapping[str, str]
    configs: Mapping[str, Any]  # the exporter's: what it needs to trace these weights again

    @property
    def resolved_plan(self) -> ResolvedPlan:
        """The pruning plan in absolute terms."""
        return self.plan.resolve(self.schedule, self.model.depth)

    @property
    def preview_scales(self) -> tuple[int, ...]:
        """The scales after which there is something to look at besides the result: computed ones before the last."""
        return self.resolved_plan.steps[:-1]

    @property
    def text_encoder(self) -> GraphSpec | None:
        """The graph that encodes one prompt, of text models that were exported with their encoder."""
        return next((g for g in self.graphs if g.kind == "text_encoder"), None)

    def chain(self, batch: int) -> tuple[GraphSpec, ...]:
        """Condition, steps in order, decoder, for one batch size."""
        graphs = [g for g in self.graphs if g.batch == batch]
        steps = sorted((g for g in graphs if g.kind == "step"), key=lambda g: g.scale or 0)
        condition = next(g for g in graphs if g.kind == "condition")
        decoder = next(g for g in graphs if g.kind == "decoder")
        return (condition, *steps, decoder)

    def _check(self) -> None:
        """That the fields fit together, so that nothing later has to doubt it.

        Raises:
            ValueError: what does not.
            PlanError: the plan does not fit the schedule.
        """
        if self.model.family not in FAMILIES:
            raise ValueError(f"model.family: got {self.model.family!r}, expected one of {', '.join(FAMILIES)}")
        for field in dataclasses.fields(self.model):
            value = getattr(self.model, field.name)
            if field.name == "family" or (field.name in _OF_FAMILY and self.model.family != _OF_FAMILY[field.name]):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.{field.name}: got {value!r}, expected a positive whole number")
        sampling = self.sampling
        if not isinstance(sampling.max_top_k, int) or not 1 <= sampling.max_top_k <= self.model.vocab_size:
            raise ValueError(f"sampling.max_top_k: got {sampling.max_top_k!r}, expected 1 to {self.model.vocab_size}")
        if self.precision not in ("fp32", "fp16", "bf16"):
            raise ValueError(f"precision: got {self.precision!r}")
        if not self.batches:
            raise ValueError("batches: got none")
        plan = self.resolved_plan
        steps = plan.steps
        of_one_batch = [("condition", None), *(("step", k) for k in steps), ("decoder", None)]
        expected = [(batch, kind, scale) for batch in self.batches for kind, scale in of_one_batch]
        if self.text_encoder is not None:
            expected.append((1, "text_encoder", None))
        found = [(g.batch, g.kind, g.scale) for g in self.graphs]
        for graph in [*expected, *found]:
            if found.count(graph) != expected.count(graph):
                raise ValueError(f"graphs: got {found.count(graph)} of {graph}, expected {expected.count(graph)}")
        for step in self.graphs:
            if step.scale is not None:
                self._check_step(step, step.scale, plan)
        tokenizer = () if self.text_encoder is None else (TOKENIZER_FILE,)
        for name in (WEIGHTS_FILE, REFERENCE_FILE, *tokenizer, *(g.file for g in self.graphs)):
            if name not in self.files:
                raise ValueError(f"files: {name} is missing")

    @staticmethod
    def _check_step(graph: GraphSpec, scale: int, plan: ResolvedPlan) -> None:
        """That a step's tokens, keys and values are as many as schedule and plan say: buffers are sized by these."""
        for spec in (*graph.inputs, *graph.outputs):
            kind, _, layer = spec.name.rpartition("_")
            if spec.name in (UNIFORM, TOKENS):
                axis, expected = 1, plan.num_tokens(scale)
            elif kind in ("past_k", "past_v"):
                axis, expected = 0, plan.num_past(scale, int(layer))
            elif kind in ("new_k", "new_v"):
                axis, expected = 0, plan.kept(scale, int(layer))
            else:
                continue
            if spec.shape[axis : axis + 1] != (expected,):
                raise ValueError(f"{graph.file}: {spec.name}: got {spec.shape}, expected {expected} in axis {axis}")

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return {
            "format_version": FORMAT_VERSION,
            "model": dataclasses.asdict(self.model),
            "schedule": [list(size) for size in self.schedule],
            "plan": self.plan.to_json(),
            "precision": self.precision,
            "batches": list(self.batches),
            "sampling": dataclasses.asdict(self.sampling),
            "graphs": [dataclasses.asdict(graph) for graph in self.graphs],
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
                "again with fastvar-export of this release"
            )

        def tensors(entries: Any) -> tuple[TensorSpec, ...]:
            specs = tuple(TensorSpec(str(e["name"]), tuple(map(int, e["shape"])), str(e["dtype"])) for e in entries)
            for spec in specs:
                if spec.dtype not in DTYPE_BYTES:
                    raise ValueError(f"tensor {spec.name}: unknown dtype {spec.dtype!r}")
            return specs

        try:
            manifest = cls(
                model=ModelSpec(**data["model"]),
                schedule=tuple((int(h), int(w)) for h, w in data["schedule"]),
                plan=PruningPlan.from_json(data["plan"]),
                precision=str(data["precision"]),
                batches=tuple(map(int, data["batches"])),
                sampling=SamplingSpec(**data["sampling"]),
                graphs=tuple(
                    GraphSpec(
                        file=str(g["file"]),
                        kind=str(g["kind"]),
                        batch=int(g["batch"]),
                        scale=None if g["scale"] is None else int(g["scale"]),
                        inputs=tensors(g["inputs"]),
                        outputs=tensors(g["outputs"]),
                    )
                    for g in data["graphs"]
                ),
                files={str(name): FileSpec(**spec) for name, spec in data["files"].items()},
                operators={str(name): int(version) for name, version in data["operators"].items()},
                tools={str(name): str(version) for name, version in data["tools"].items()},
                configs=dict(data["configs"]),
            )
            manifest._check()
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise BundleError(f"{where}: damaged ({type(error).__name__}: {error}); export the bundle again") from error
        return manifest


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
    except (OSError, ValueError) as error:
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
        path = bundle / name
        if not path.is_file():
            raise BundleError(f"bundle {bundle}: {name} is missing; copy the bundle again, or export it again")
        size = path.stat().st_size
        if size != spec.num_bytes:
            raise BundleError(
                f"bundle {bundle}: {name}: got {size} bytes, expected {spec.num_bytes} (an incomplete copy?); copy "
                "the bundle again, or export it again"
            )
        if hashes and file_sha256(path) != spec.sha256:
            raise BundleError(
                f"bundle {bundle}: {name}: its SHA-256 is not that of the manifest (damaged or changed); copy the "
                "bundle again, or export it again"
            )
