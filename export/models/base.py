"""What all next-scale models share: a step, its transformer blocks, and what passes from step to step.

A model is a set of stateless functions: condition, one step per scale, decoder. What the official codes keep between
steps (KV cache, token map, f_hat) is passed in and out here, so that each function is one graph.

In half precision the matrix products, the attention, keys, values and token caches are in half; fp32 stay the residual
stream (real checkpoints exceed 65504 in it), normalisation, q/k normalisation, token selection, guidance,
sampling and f_hat.

Dimension letters: B images, B2 = 2B rows (conditional first), L tokens, K kept tokens, S past keys, T cached
tokens, H heads, D head dim, C channels, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models import matrix
from fastvar_trt.export.models.matrix import INPUT_SCALE, torch_dtype
from fastvar_trt.plugins.torch_ops import Selector, gather_tokens, pivotal_tokens, restore_tokens
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.manifest import ModelSpec, SamplingSpec, TensorSpec
from fastvar_trt.runtime.plan import PruningPlan, ResolvedPlan
from fastvar_trt.runtime.precision import Precision

BLOCK_DOMAIN = "fastvar.block"  # only inside the exporter: block functions are inlined before a graph is written
KEPT = ("attn.k", "attn.v")  # whose scales lie beside those of the linear layers
MASKED = -3e4  # of scores: in every precision finite, and low enough that exp() gives 0
MAX_Q_SCALE = 100.0  # `max_scale_mul` of VAR's and Infinity's SelfAttention


@dataclasses.dataclass(frozen=True)
class BlockSpec(abc.ABC):
    """Everything static about one layer of one step; equal specs share one trace."""

    rows: int  # B2, or B without guidance
    height: int
    width: int
    past: tuple[tuple[int, int], ...]  # pieces (S, rows): of guided steps, and of those after
    scale_tokens: tuple[int, ...]  # of a step over several scales, whose tokens see no later one, those of each; or ()
    keep: int | None  # K, or None where all tokens are computed
    cached_height: int  # of the cache scale; 0 unless `keep` is set
    cached_width: int
    writes_cache: bool
    emits_kv: bool
    channels: int
    num_heads: int
    attn_scale: float
    norm_eps: float
    precision: Precision

    sublayers: ClassVar[tuple[str, ...]]

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products and attention."""
        return torch_dtype(self.precision.computed)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values, as they are kept."""
        return torch_dtype(self.precision.kv)

    @property
    def kv_scales(self) -> tuple[str, ...]:
        """Names of the scales of keys and values, where they are kept as integers."""
        return tuple(f"{kept}{INPUT_SCALE}" for kept in KEPT) if self.precision.rounds_kv else ()

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.height * self.width

    @property
    def num_computed(self) -> int:
        """K, or L where all tokens are computed."""
        return self.num_tokens if self.keep is None else self.keep

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """[K, B2, H, D]."""
        return self.num_computed, self.rows, self.num_heads, self.channels // self.num_heads

    @property
    def past_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """[S, B2, H, D] of every piece of the past."""
        return tuple((*piece, *self.kv_shape[2:]) for piece in self.past)

    @property
    def activations(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what the block takes besides weights."""
        inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "x": ((self.rows, self.num_tokens, self.channels), torch.float32),
            "modulation": ((self.rows, 6, self.channels), torch.float32),
        }
        for i, shape in enumerate(self.past_shapes):
            inputs |= {f"past_k.{i}": (shape, self.kv_dtype), f"past_v.{i}": (shape, self.kv_dtype)}
        if self.keep is not None:
            cached = (self.rows, self.cached_height * self.cached_width, self.channels)
            inputs |= {f"cached_{sublayer}": (cached, self.dtype) for sublayer in self.sublayers}
        return inputs

    @property
    def shared_weights(self) -> tuple[str, ...]:
        """Names of the weights that are not the layer's own."""
        return ("norm.weight",)

    @property
    @abc.abstractmethod
    def weight_names(self) -> tuple[str, ...]:
        """Names of the layer's weights, below `blocks.<layer>.`."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of `run`, in order."""
        return (*self.activations, *self.shared_weights, *self.weight_names, *self.kv_scales)

    @property
    def num_cached(self) -> int:
        """Tokens whose sublayer outputs are cached: those of the step's last scale."""
        return self.scale_tokens[-1] if self.scale_tokens else self.num_tokens

    @property
    def outputs(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """Name, shape and dtype of the outputs of `run`, in order."""
        full = (self.rows, self.num_tokens, self.channels)
        cached = (self.rows, self.num_cached, self.channels)
        outputs: list[tuple[str, tuple[int, ...], torch.dtype]] = [("y", full, torch.float32)]
        if self.emits_kv:
            outputs += [("new_k", self.kv_shape, self.kv_dtype), ("new_v", self.kv_shape, self.kv_dtype)]
        if self.writes_cache:
            outputs += [(f"cache_{sublayer}", cached, self.dtype) for sublayer in self.sublayers]
        return tuple(outputs)

    @abc.abstractmethod
    def run(self, tensors: Mapping[str, Tensor], select: Selector) -> tuple[Tensor, ...]:
        """One transformer layer, pruned where `keep` says so.

        Args:
            tensors: `input_names`: x fp32 [B2, L, C]; modulation fp32 [B2, 6, C] (gamma1, gamma2, 1 + scale1,
                1 + scale2, shift1, shift2); past_k.i, past_v.i `past_shapes`; cached_* [B2, T, C]; norm.weight,
                fp32 ones [C]; weights as `models.matrix` writes them.
            select: which tokens a pruned sublayer computes.

        Returns:
            `outputs`.
        """

    def linear(self, tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        """A linear layer of the block: [M, in] -> [M, out]."""
        return matrix.linear(self.precision, tensors, name, x)

    def selected(self, x: Tensor, select: Selector) -> tuple[Tensor, Tensor | None]:
        """The rows that a sublayer computes [B2, K, C], and their positions; all of x where nothing is pruned."""
        if self.keep is None:
            return x, None
        indices = select(x, self.keep)
        return gather_tokens(x, indices), indices

    def modulated(self, x: Tensor, ones: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Adaptive layer norm of [B2, K, C] by scale and shift [B2, 1, C]: [B2*K, C] in the compute dtype."""
        normed = F.layer_norm(x, (self.channels,), ones, eps=self.norm_eps) * scale + shift
        return normed.flatten(0, 1).to(self.dtype)

    def restored(self, y: Tensor, indices: Tensor | None, cached: Tensor | None) -> Tensor:
        """A sublayer's output over all tokens [B2, L, C] from that of the computed ones [B2, K, C]."""
        if indices is None or cached is None:
            return y
        return restore_tokens(
            y,
            indices,
            cached.to(self.dtype),
            h=self.height,
            w=self.width,
            cached_h=self.cached_height,
            cached_w=self.cached_width,
        )

    def attend(self, tensors: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Self-attention of q, k, v [B2, K, H, D] over past and new keys.

        Where keys and values are kept as integers, a step attends to its own as they were before they were rounded.

        Returns:
            the result [B2*K, C], new keys and values [K, B2, H, D].
        """
        keys, values = (x.transpose(0, 1).to(self.dtype) for x in (k, v))  # [K, B2, H, D]
        new_k, new_v = keys, values
        if self.emits_kv and self.precision.rounds_kv:
            new_k, new_v = (
                matrix.rounded_by(tensors, name, x, self.precision.kv)
                for name, x in zip(KEPT, (keys, values), strict=True)
            )
        if self.past:
            keys = torch.cat([*self._past(tensors, "past_k", KEPT[0]), keys])  # [S + K, B2, H, D]
            values = torch.cat([*self._past(tensors, "past_v", KEPT[1]), values])
        keys, values = (x.permute(1, 2, 0, 3) for x in (keys, values))
        q = q.transpose(1, 2)
        if self.scale_tokens:
            attended = self._attend_by_scale(q, keys, values)
        else:
            attended = F.scaled_dot_product_attention(q, keys, values, scale=self.attn_scale)
        return attended.transpose(1, 2).reshape(self.rows * self.num_computed, self.channels), new_k, new_v

    def _attend_by_scale(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of [B2, H, T, D] to one's own scale and those before it: one for each, in place of a mask."""
        parts, end = [], 0
        for own in q.split(list(self.scale_tokens), dim=2):
            end += own.shape[2]
            seen = keys[:, :, :end], values[:, :, :end]
            parts.append(F.scaled_dot_product_attention(own, *seen, scale=self.attn_scale))
        return torch.cat(parts, dim=2)

    def _past(self, tensors: Mapping[str, Tensor], name: str, kept: str) -> Iterator[Tensor]:
        """The pieces of the past [S, B2, H, D], of guided steps the conditional half where this one has no guidance."""
        for i, (_, rows) in enumerate(self.past):
            piece = tensors[f"{name}.{i}"]
            piece = piece if rows == self.rows else piece[:, : self.rows]
            if self.precision.rounds_kv and not piece.is_floating_point():  # as they are while scales are found
                piece = matrix.restored_by(tensors, kept, piece, self.precision.kv)
            yield piece.to(self.dtype)

    def collect(self, x: Tensor, new_k: Tensor, new_v: Tensor, by_sublayer: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`outputs` of those that the step needs."""
        outputs: tuple[Tensor, ...] = (x,)
        if self.emits_kv:
            outputs += (new_k, new_v)
        if self.writes_cache:
            own = by_sublayer if not self.scale_tokens else [y[:, -self.num_cached :] for y in by_sublayer]
            outputs += tuple(y.to(self.dtype) for y in own)
        return outputs


def block_geometry(plan: ResolvedPlan, scale: int, layer: int, batch: int) -> dict[str, Any]:
    """The fields of `BlockSpec` that follow from the plan."""
    height, width = plan.schedule[scale]
    scale_tokens = plan.scale_tokens(scale) if scale == plan.switch else ()
    if scale_tokens:
        height, width = 1, sum(scale_tokens)
    pruned = plan.prunes(scale, layer)
    cached = plan.schedule[plan.cache_scale] if pruned and plan.cache_scale is not None else (0, 0)
    return {
        "rows": plan.rows(scale, batch),
        "height": height,
        "width": width,
        "past": plan.past(scale, layer, batch),
        "scale_tokens": scale_tokens,
        "keep": plan.kept(scale, layer) if pruned else None,
        "cached_height": cached[0],
        "cached_width": cached[1],
        "writes_cache": plan.writes_cache(scale, layer),
        "emits_kv": plan.emits_keys(scale),
    }


def l2_normalised(x: Tensor) -> Tensor:
    """x / ||x|| over the last axis in fp32, the norm clamped as in `F.normalize` (which exports an Expand)."""
    x = x.float()
    return x / (x * x).sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`LlamaRMSNorm`, and T5's, in fp32 over the last axis."""
    x = x.float()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


@dataclasses.dataclass(frozen=True)
class Request:
    """Run-time values of one batch: `runtime.request.GRAPH_INPUTS`, per image, so that one batch can serve different
    requests."""

    cfg: Tensor  # fp32 [B]
    temperature: Tensor  # fp32 [B]
    top_k: Tensor  # int64 [B], 1..max_top_k; for models that draw from a vocabulary
    top_p: Tensor  # fp32 [B]
    greedy: Tensor  # bool [B]


@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """What one step computes. Keys and values are absent (empty) where the step emits none."""

    tokens: Tensor  # `token_shape`
    f_hat: Tensor  # fp32 [B, C_vae, h_K, w_K]
    logits: Tensor  # fp32, `logits_shape`
    finite: Tensor  # bool [B], whether all logits of an image are
    new_kv: dict[int, tuple[Tensor, Tensor]]  # layer -> [K, B2, H, D], or [K, B, H, D] without guidance
    caches: dict[int, tuple[Tensor, ...]]  # layer -> per sublayer [B2, T, C]
    handed_on: dict[str, Tensor]  # `handed_on_specs`


Config = TypeVar("Config")


def config_from_json(kind: type[Config], data: Mapping[str, Any]) -> Config:
    """A configuration from what `dataclasses.asdict` made of it, whose tuples JSON keeps as lists.

    Raises:
        TypeError: it is not complete.
    """

    def value(found: Any) -> Any:
        return tuple(map(value, found)) if isinstance(found, list) else found

    return kind(**{name: value(found) for name, found in data.items()})


class NextScaleModel(nn.Module, abc.ABC):
    """A next-scale model with its decoder, over the deployment tensors of a bundle.

    Parameters carry the tensors' names; they are created by `load_tensors`, without a copy.
    """

    sublayers: ClassVar[tuple[str, ...]]

    def __init__(
        self, schedule: tuple[tuple[int, int], ...], depth: int, precision: Precision, context_tokens: int = 0
    ) -> None:
        super().__init__()
        self.schedule = schedule  # (height, width) of the token map per scale
        self.context_tokens = context_tokens  # of the text, where it is a prefix in place of the first map
        self.depth = depth
        self.precision = precision
        self.image_decoder: nn.Module
        self.image_encoder: nn.Module | None

    def resolve(self, plan: PruningPlan) -> ResolvedPlan:
        """A plan for this model.

        Raises:
            PlanError: it does not fit.
        """
        return plan.resolve(self.schedule, self.depth, self.context_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products, attention and convolutions."""
        return torch_dtype(self.precision.computed)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> NextScaleModel:
        """Take the tensors as parameters, by name; nothing is copied."""
        with torch.device("meta"):
            self.image_decoder, self.image_encoder = self.new_decoder(), self.new_encoder()
        parts = [part for part in (self.image_decoder, self.image_encoder) if part is not None]
        expected = {key for part in parts for key in part.state_dict()}
        for convolutions in parts:
            convolutions.load_state_dict({key: tensors[key] for key in convolutions.state_dict()}, assign=True)
        for key, tensor in tensors.items():
            if key in expected:
                continue
            *path, leaf = key.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        return self.requires_grad_(False).eval()

    def weight(self, name: str) -> Tensor:
        """The parameter of that name, or what takes its place while a graph is traced."""
        found: Tensor = operator.attrgetter(name)(self)
        return found

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer in the compute dtype: [M, in] -> [M, out]."""
        return matrix.linear(self.precision, _Weights(self), name, x)

    def project(self, name: str, x: Tensor) -> Tensor:
        """A linear layer whose bias is added in fp32, where it carries the 1 of 1 + scale: [M, in] -> fp32 [M, out]."""
        return matrix.product(self.precision, _Weights(self), name, x).float() + self.weight(f"{name}.bias")

    # What the graphs take and give, apart from keys, values and caches.

    @abc.abstractmethod
    def model_spec(self) -> ModelSpec:
        """What the model takes and draws, and its sizes, for the manifest."""

    @abc.abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures."""

    @abc.abstractmethod
    def sampling_spec(self) -> SamplingSpec:
        """Sampling limits and defaults for the manifest."""

    @abc.abstractmethod
    def configs(self) -> dict[str, Any]:
        """What the exporter needs to make this model again, as JSON."""

    @property
    def has_encoder(self) -> bool:
        """Whether pictures can be encoded, and tokens be given."""
        with torch.device("meta"):
            return self.new_encoder() is not None

    def load_transformer(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """The official state dict of another checkpoint of the same sizes.

        Raises:
            CheckpointError: it is of others, or cannot be read.
        """
        raise CheckpointError(f"--checkpoint {checkpoint}: no other can be taken into this family; export it again")

    def transformer_tensors(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors of such a state dict that do not depend on the size of the pictures."""
        raise NotImplementedError

    def size_tensors(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Those that do; equal ones of several sizes have equal names."""
        return iter(())

    def text_specs(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] | None:
        """Inputs and outputs of the text encoder, of models that have one."""
        return None

    def example_text(self) -> dict[str, Tensor]:
        """Inputs of the text encoder to compare its graph with."""
        raise NotImplementedError

    def text_vocabulary(self) -> int:
        """Tokens that the text encoder knows."""
        raise NotImplementedError

    def encode_text(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The text encoder: tokens to features."""
        raise NotImplementedError

    @abc.abstractmethod
    def condition_inputs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Inputs of the condition graph, of the role `CONDITION`."""

    @abc.abstractmethod
    def condition_outputs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Outputs of the condition graph, all of which the steps take; `START` only the first."""

    @abc.abstractmethod
    def example_condition(self, batch: int) -> dict[str, Tensor]:
        """Inputs of the condition graph to compare graphs with, the same in every run."""

    def gumbel_shape(self, scale: int) -> tuple[int, ...] | None:
        """Shape per image of the noise `GUMBEL` that a step takes, of models that blend codes."""
        return None

    def step_condition_specs(self, plan: ResolvedPlan, scale: int, batch: int) -> tuple[TensorSpec, ...]:
        """What a step takes of `condition_outputs`, and of what steps before have handed on, with all of its rows."""
        outputs = self.condition_outputs(batch)
        return outputs if scale == plan.steps[0] else tuple(spec for spec in outputs if spec.name != names.START)

    def handed_on_specs(self, plan: ResolvedPlan, scale: int, batch: int) -> tuple[TensorSpec, ...]:
        """What a step leaves for later graphs, besides f_hat."""
        return ()

    def residual_specs(self, plan: ResolvedPlan, batch: int) -> tuple[TensorSpec, ...] | None:
        """Inputs of the graph after the last step besides f_hat, of models that have one."""
        return None

    @abc.abstractmethod
    def f_hat_shape(self) -> tuple[int, int, int]:
        """[C_vae, h_K, w_K]."""

    @abc.abstractmethod
    def token_spec(self, scale: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape per image, and dtype, of what a step draws."""

    @abc.abstractmethod
    def logits_shape(self, scale: int) -> tuple[int, ...]:
        """Shape per image."""

    @abc.abstractmethod
    def request_inputs(self, scale: int) -> tuple[str, ...]:
        """Those of `runtime.request.GRAPH_INPUTS` that a step with guidance takes; without `cfg`, cfg does nothing."""

    def step_request_inputs(self, plan: ResolvedPlan, scale: int) -> tuple[str, ...]:
        """The same of a step under a plan, which may end guidance."""
        return tuple(name for name in self.request_inputs(scale) if name != "cfg" or plan.is_guided(scale))

    # What is computed.

    @abc.abstractmethod
    def new_decoder(self) -> nn.Module:
        """The decoder, its parameters in the names of the deployment tensors."""

    def new_encoder(self) -> nn.Module | None:
        """The image encoder, likewise: uint8 [B, H, W, 3] -> features fp32 [B, C_vae, h_K, w_K]; None where there is
        none."""
        return None

    @abc.abstractmethod
    def condition(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything that depends on the condition only: `condition_inputs` -> `condition_outputs`."""

    @abc.abstractmethod
    def block_spec(self, plan: ResolvedPlan, scale: int, layer: int, batch: int) -> BlockSpec:
        """The static part of one layer of one step."""

    def blend(
        self,
        drawn: Tensor,
        logits: Tensor,
        gumbel: Tensor,
        f_hat: Tensor | None,
        scale: int,
        request: Request,
        is_given: Tensor | None,
    ) -> Tensor:
        """f_hat with a blend of codes added in place of the drawn ones, but not of given ones (bool [B, L]); of models
        with a `gumbel_shape`."""
        raise NotImplementedError

    def block_weights(self, spec: BlockSpec, layer: int) -> dict[str, Tensor]:
        """The weights of a block by their names in it, in the order of `input_names`."""
        shared = {name: self.weight(name) for name in spec.shared_weights}
        own = (*spec.weight_names, *spec.kv_scales)
        return shared | {name: self.weight(f"blocks.{layer}.{name}") for name in own}

    def step_condition(self, condition: Mapping[str, Tensor], scale: int) -> Mapping[str, Tensor]:
        """The condition with what all blocks of a step need of it."""
        return condition

    def block_condition(self, condition: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
        """What a block takes of the condition."""
        return {"modulation": condition[names.modulation(layer)]}

    @abc.abstractmethod
    def embed(self, condition: Mapping[str, Tensor], f_hat: Tensor | None, scale: int) -> Tensor:
        """The tokens that a step starts from, fp32: [B2, L, C] where the halves differ, as at the first, else
        [B, L, C]."""

    @abc.abstractmethod
    def logits(self, x: Tensor, condition: Mapping[str, Tensor], scale: int, cfg: Tensor | None) -> Tensor:
        """Logits fp32 [B, *logits_shape]: guided ones of [B2, L, C], or those of [B, L, C], where cfg is None.

        The condition has as many rows.
        """

    @abc.abstractmethod
    def draw(self, logits: Tensor, uniform: Tensor, request: Request, scale: int) -> Tensor:
        """One draw per position, in any dtype."""

    @abc.abstractmethod
    def accumulate(self, drawn: Tensor, f_hat: Tensor | None, scale: int) -> Tensor:
        """f_hat with this scale's codes added."""

    def nearest(self, left: Tensor, scale: int) -> Tensor:
        """The tokens of a scale that come nearest to fp32 [B, C_vae, h_K, w_K]; of models that have an encoder."""
        raise NotImplementedError

    def handed_on(self, x: Tensor, drawn: Tensor, f_hat: Tensor, scale: int) -> dict[str, Tensor]:
        """`handed_on_specs`, of the last block's output [B2, L, C] and the new f_hat."""
        return {}

    def residual(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """f_hat with what no code says added: f_hat and `residual_specs` -> fp32 [B, C_vae, h_K, w_K]."""
        raise NotImplementedError

    def step(
        self,
        plan: ResolvedPlan,
        scale: int,
        *,
        condition: Mapping[str, Tensor],
        f_hat: Tensor | None,
        past: Mapping[int, Sequence[tuple[Tensor, Tensor]]],
        caches: Mapping[int, tuple[Tensor, ...]],
        uniform: Tensor,
        request: Request,
        gumbel: Tensor | None = None,
        given: tuple[Tensor, Tensor] | None = None,
        select: Selector = pivotal_tokens,
        block_names: Mapping[BlockSpec, str] | None = None,
    ) -> StepOutputs:
        """One scale.

        Args:
            plan: the pruning plan, resolved for this model.
            scale: which one.
            condition: the outputs of the condition graph, and what steps before have handed on.
            f_hat: fp32 [B, C_vae, h_K, w_K]; None at the first scale.
            past: layer -> the pieces of keys and values, each [S, B2, H, D]; without those that have none yet.
            caches: per pruned layer the sublayers' outputs at the cache scale [B2, T, C]; pruned scales only. (Of a
                scale without guidance, B2 is B in all of these but the first piece of the past.)
            uniform: fp32 [B, *token shape].
            request: guidance and sampling.
            gumbel: fp32 [B, *gumbel_shape]; None where that is.
            given: tokens [B, *token shape], and bool [B, L] of which of them are taken in place of what is drawn.
            select: which tokens a pruned sublayer computes.
            block_names: while tracing, the name of the custom node that stands for each block.
        """
        batch = uniform.shape[0]
        x = self.embed(condition, f_hat, scale)
        if len(x) < plan.rows(scale, batch):
            x = x.repeat(2, 1, 1)
        condition = self.step_condition(condition, scale)
        new_kv: dict[int, tuple[Tensor, Tensor]] = {}
        new_caches: dict[int, tuple[Tensor, ...]] = {}
        for layer in plan.layers(scale):
            spec = self.block_spec(plan, scale, layer, batch)
            tensors = {"x": x, **self.block_condition(condition, layer), **self.block_weights(spec, layer)}
            if spec.past:
                for i, (k, v) in enumerate(past[layer]):
                    tensors |= {f"past_k.{i}": k, f"past_v.{i}": v}
            if spec.keep is not None:
                tensors |= {f"cached_{name}": t for name, t in zip(spec.sublayers, caches[layer], strict=True)}
            if block_names is None:
                outputs = self.run_block(spec, tensors, select)
            else:
                outputs = _custom_node(spec, tensors, block_names[spec])
            x = outputs[0]
            if spec.emits_kv:
                new_kv[layer] = outputs[1], outputs[2]
            if spec.writes_cache:
                new_caches[layer] = outputs[-len(spec.sublayers) :]

        hidden = x
        cfg: Tensor | None = request.cfg
        if "cfg" not in self.step_request_inputs(plan, scale):
            hidden, cfg = x[:batch], None
            condition = {name: tensor[:batch] for name, tensor in condition.items()}
        logits = self.logits(hidden, condition, scale, cfg)
        drawn = self.draw(logits, uniform, request, scale)
        if given is not None:
            drawn = torch.where(_per_token(given[1], drawn), given[0].to(drawn.dtype), drawn)
        if gumbel is None:
            f_hat = self.accumulate(drawn, f_hat, scale)
        else:
            is_given = None if given is None else given[1]
            f_hat = self.blend(drawn, logits, gumbel, f_hat, scale, request, is_given)
        # A token looks sound whatever it was drawn from. One sum tells: it is not finite where a logit is not.
        finite = logits.flatten(1).sum(dim=1).abs() <= torch.finfo(torch.float32).max
        return StepOutputs(
            tokens=drawn.to(self.token_spec(scale)[1]),
            f_hat=f_hat,
            logits=logits,
            finite=finite,
            new_kv=new_kv,
            caches=new_caches,
            handed_on=self.handed_on(x, drawn, f_hat, scale),
        )

    def run_block(self, spec: BlockSpec, tensors: Mapping[str, Tensor], select: Selector) -> tuple[Tensor, ...]:
        """`BlockSpec.run`; in eager mode a place to compile."""
        return spec.run(tensors, select)

    def encode(self, pixels: Tensor, plan: ResolvedPlan) -> tuple[list[Tensor], Tensor, Tensor]:
        """Pictures as tokens (`img_to_idxBl`, `MultiScaleBSQ`): each scale has those nearest to what is left.

        Args:
            pixels: uint8 [B, H, W, 3], RGB.
            plan: which scales it computes.

        Returns:
            tokens per scale [B, *token_shape], skipped ones included, and what `accumulated` makes of them.
        """
        assert self.image_encoder is not None
        features = self._convolved(self.image_encoder, pixels)
        tokens: list[Tensor] = []
        codes: list[Tensor] = []
        left = features
        for scale in range(len(self.schedule)):
            tokens.append(self.nearest(left, scale).to(self.token_spec(scale)[1]))
            codes.append(self.accumulate(tokens[-1], None, scale))
            left = left - codes[-1]
        return tokens, *_sums(codes, plan)

    def accumulated(self, tokens: Sequence[Tensor], plan: ResolvedPlan) -> tuple[Tensor, Tensor]:
        """f_hat of the tokens of all scales, and of those that a plan skips alone: fp32 [B, C_vae, h_K, w_K]."""
        return _sums([self.accumulate(own, None, scale) for scale, own in enumerate(tokens)], plan)

    def decode(self, f_hat: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [B, C_vae, h_K, w_K] -> image fp32 [B, 3, H, W] in [0, 1], pixels uint8 [B, H, W, 3]."""
        image, pixels = self._convolved(self.image_decoder, f_hat)
        return image, pixels

    def _convolved(self, module: nn.Module, x: Tensor) -> Any:
        """Decoder or encoder, in fp32 where they are in half precision on the CPU: PyTorch's convolutions are a hundred
        times as fast then."""
        if self.dtype == torch.float32 or x.device.type != "cpu" or torch.onnx.is_in_onnx_export():
            return module(x)
        weights = {name: parameter.float() for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, weights, (x,))


def _sums(codes: Sequence[Tensor], plan: ResolvedPlan) -> tuple[Tensor, Tensor]:
    """The sum of the codes of all scales, each fp32 [B, C_vae, h_K, w_K], and of those that a plan skips."""
    skipped = [own for scale, own in enumerate(codes) if scale not in plan.steps]
    return functools.reduce(torch.add, codes), functools.reduce(torch.add, skipped, 0 * codes[-1])


def _per_token(mask: Tensor, tokens: Tensor) -> Tensor:
    """bool [B, L] for tokens [B, L] or [B, L, bits]."""
    return mask if tokens.ndim == 2 else mask.unsqueeze(-1)


class _Weights(Mapping[str, Tensor]):
    """The parameters of a model by name."""

    def __init__(self, model: NextScaleModel) -> None:
        self._model = model

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._model.weight(name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._model.named_parameters())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _custom_node(spec: BlockSpec, tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """The block's outputs as those of one custom node, while a step is traced."""
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{BLOCK_DOMAIN}::{name}",
            [tensors[name] for name in spec.input_names],
            dtypes=[dtype for _, _, dtype in spec.outputs],
            shapes=[shape for _, shape, _ in spec.outputs],
            version=1,
        )
    )
