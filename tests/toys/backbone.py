"""A backbone that draws bits from classes, as no family of the package does; its weights are random."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.base import BlockSpec, NextScaleModel, Request, block_geometry
from fastvar_trt.export.models.decoder import to_image
from fastvar_trt.export.models.family import Family, SourceCommand
from fastvar_trt.export.models.matrix import linear_names, write_linear
from fastvar_trt.export.models.source import Source
from fastvar_trt.plugins.torch_ops import Selector
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.manifest import Condition, ModelSpec, Role, SamplingSpec, TensorSpec, Tokens
from fastvar_trt.runtime.plan import PruningPlan, ResolvedPlan
from fastvar_trt.runtime.precision import Precision

WIDTH, HEADS, BITS, CLASSES, PIXELS = 128, 2, 4, 3, 4  # PIXELS a side per token
_LINEARS = ("attn.qkv", "attn.proj")
_PLAN = PruningPlan("toy-half", ((-1, 0.5),), cache_scale=-2)


@dataclasses.dataclass(frozen=True)
class ToyBlock(BlockSpec):
    """Attention, and nothing else."""

    sublayers = ("attn",)

    @property
    def activations(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: value for name, value in super().activations.items() if name != "modulation"}

    @property
    def weight_names(self) -> tuple[str, ...]:
        return linear_names(self.precision, *_LINEARS)

    def run(self, tensors: Mapping[str, Tensor], select: Selector) -> tuple[Tensor, ...]:
        x = tensors["x"]
        computed, indices = self.selected(x, select)
        hidden = F.layer_norm(computed, (self.channels,), tensors["norm.weight"]).flatten(0, 1).to(self.dtype)
        qkv = self.linear(tensors, "attn.qkv", hidden)
        q, k, v = qkv.view(self.rows, self.num_computed, 3, self.num_heads, -1).unbind(2)
        attended, new_k, new_v = self.attend(tensors, q, k, v)
        y = self.linear(tensors, "attn.proj", attended).view(self.rows, self.num_computed, self.channels)
        y = self.restored(y, indices, tensors.get("cached_attn"))
        return self.collect(x + y.float(), new_k, new_v, (y,))


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_rgb = nn.Conv2d(BITS, 3, 1)

    def forward(self, f_hat: Tensor) -> tuple[Tensor, Tensor]:
        return to_image(F.interpolate(self.to_rgb(f_hat.to(self.to_rgb.weight.dtype)), scale_factor=float(PIXELS)))


class Toy(NextScaleModel):
    """See the module."""

    sublayers = ToyBlock.sublayers

    def __init__(self, sides: tuple[int, ...], precision: Precision) -> None:
        super().__init__(tuple((side, side) for side in sides), 1, precision)
        self._sides = sides

    def model_spec(self) -> ModelSpec:
        sizes = {"depth": 1, "width": WIDTH, "num_heads": HEADS, "mlp_width": WIDTH, "vocab_size": 2 * BITS}
        kinds = {"condition": Condition.CLASS, "tokens": Tokens.BITS}
        return ModelSpec("toy", **kinds, **sizes, code_channels=BITS, num_classes=CLASSES)  # type: ignore[arg-type]

    def image_size(self) -> tuple[int, int]:
        return self._sides[-1] * PIXELS, self._sides[-1] * PIXELS

    def sampling_spec(self) -> SamplingSpec:
        return SamplingSpec(2, 2.0, 2, 1.0)

    def configs(self) -> dict[str, Any]:
        return {"sides": list(self._sides)}

    def condition_inputs(self, batch: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec(names.LABELS, (batch,), "int64", Role.CONDITION),)

    def condition_outputs(self, batch: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec(names.START, (2 * batch, WIDTH), "float32"),)

    def example_condition(self, batch: int) -> dict[str, Tensor]:
        return {names.LABELS: torch.arange(batch) % CLASSES}

    def f_hat_shape(self) -> tuple[int, int, int]:
        return BITS, self._sides[-1], self._sides[-1]

    def token_spec(self, scale: int) -> tuple[tuple[int, ...], torch.dtype]:
        return (self._sides[scale] ** 2, BITS), torch.uint8

    def logits_shape(self, scale: int) -> tuple[int, ...]:
        return self._sides[scale] ** 2, BITS, 2

    def request_inputs(self, scale: int) -> tuple[str, ...]:
        return ("cfg", "greedy")

    def new_decoder(self) -> nn.Module:
        return _Decoder()

    def condition(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels = inputs[names.LABELS]
        rows = torch.cat([labels, torch.full_like(labels, CLASSES)])
        return {names.START: F.embedding(rows, self.weight("classes"))}

    def block_spec(self, plan: ResolvedPlan, scale: int, layer: int, batch: int) -> ToyBlock:
        sizes = {"channels": WIDTH, "num_heads": HEADS, "attn_scale": 0.2, "norm_eps": 1e-5}
        geometry = block_geometry(plan, scale, layer, batch)
        return ToyBlock(**geometry, **sizes, precision=self.precision)  # type: ignore[arg-type]  # sizes of mixed types

    def block_condition(self, condition: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
        return {}

    def embed(self, condition: Mapping[str, Tensor], f_hat: Tensor | None, scale: int) -> Tensor:
        if f_hat is None:
            return condition[names.START].unsqueeze(1)
        step = self._sides[-1] // self._sides[scale]
        codes = f_hat[:, :, ::step, ::step].flatten(2).transpose(1, 2)
        embedded = F.linear(codes.reshape(-1, BITS), self.weight("word_embed.weight"))
        return embedded.view(f_hat.shape[0], -1, WIDTH) + self.weight(f"pos.{scale}")

    def logits(self, x: Tensor, condition: Mapping[str, Tensor], scale: int, cfg: Tensor | None) -> Tensor:
        hidden = x
        if cfg is not None:
            batch, strength = x.shape[0] // 2, cfg[:, None, None]
            hidden = strength * x[:batch] + (1 - strength) * x[batch:]
        logits = self.linear("head", hidden.reshape(-1, WIDTH).to(self.dtype)).float()
        return logits.view(-1, *self.logits_shape(scale))

    def draw(self, logits: Tensor, uniform: Tensor, request: Request, scale: int) -> Tensor:
        margin = logits[..., 1] - logits[..., 0]
        likeliest = (margin > 0).float()
        drawn = (uniform >= torch.sigmoid(-margin)).float()
        return torch.where(request.greedy[:, None, None], likeliest, drawn)

    def accumulate(self, drawn: Tensor, f_hat: Tensor | None, scale: int) -> Tensor:
        side = self._sides[scale]
        codes = (2 * drawn.float() - 1).transpose(1, 2).reshape(-1, BITS, side, side)
        codes = F.interpolate(codes, size=self.f_hat_shape()[1:], mode="nearest")
        return codes if f_hat is None else f_hat + codes


@dataclasses.dataclass(frozen=True)
class ToySource(Source):
    """Random weights."""

    sides: tuple[int, ...] = (1, 2, 4)

    def new_model(self, precision: Precision) -> Toy:
        return Toy(self.sides, precision)

    def tensors(self, precision: Precision, max_top_k: int) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu") / shape[-1] ** 0.5

        yield "norm.weight", torch.ones(WIDTH)
        yield "classes", 4 * random(CLASSES + 1, WIDTH)
        yield "word_embed.weight", random(WIDTH, BITS)
        for scale, side in enumerate(self.sides[1:], 1):
            yield f"pos.{scale}", 4 * random(side * side, WIDTH)
        yield from write_linear(precision, "blocks.0.attn.qkv", random(3 * WIDTH, WIDTH), torch.zeros(3 * WIDTH))
        yield from write_linear(precision, "blocks.0.attn.proj", random(WIDTH, WIDTH), torch.zeros(WIDTH))
        yield from write_linear(precision, "head", 4 * random(2 * BITS, WIDTH), torch.zeros(2 * BITS))
        yield "to_rgb.weight", random(3, BITS).view(3, BITS, 1, 1)
        yield "to_rgb.bias", torch.zeros(3)

    def on_meta(self) -> ToySource:
        return self


def _sides(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


FAMILY = Family(
    name="toy",
    commands=(
        SourceCommand(
            name="toy",
            description="A toy.",
            examples=("fastvar-export toy --sides 1,2,4 --out out/toy",),
            options=(click.Option(["--sides"], type=_sides, default="1,2,4", help="Of the token maps."),),
            load=lambda sides: ToySource(sides),
            default_plan=lambda **_: _PLAN.name,
            top_k=0,
        ),
    ),
    from_configs=lambda configs, precision: Toy(tuple(configs["sides"]), precision),
    presets=(_PLAN,),
)
