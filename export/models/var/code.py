"""CoDe, collaborative decoding (arXiv 2411.17787, github.com/czg1225/CoDe): a large VAR draws the first scales, a small
one the rest.

Both share the VQVAE, and so f_hat, and nothing else. At the switch the refiner computes the tokens of all scales so far
in one step, its prefill: from its own start token, and from what the drafter's steps started from (the token hub),
embedded by itself. No scale sees a later one (`attn_bias_for_masking` in the public code; here an attention per scale).

Sampling is VAR's: top-k and top-p see the logits after the temperature, in the public code of CoDe before.

The layers of the two are numbered on, those of the drafter first; so every key, value and cache has a buffer of its
own. Other tensors carry a prefix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvar_trt.export.models.base import BlockSpec, config_from_json
from fastvar_trt.export.models.checkpoint import load_state_dict
from fastvar_trt.export.models.codebook import CodeBookModel
from fastvar_trt.export.models.source import Source, to_meta
from fastvar_trt.export.models.var.checkpoint import NESTED, check_checkpoints, shared_tensors, transformer_tensors
from fastvar_trt.export.models.var.config import VARConfig
from fastvar_trt.export.models.var.model import VAR, VARBlockSpec
from fastvar_trt.export.models.var.source import NESTED_VAE, check_overrides
from fastvar_trt.export.models.vqvae import VQVAEConfig
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.manifest import ModelSpec, SamplingSpec, TensorSpec
from fastvar_trt.runtime.plan import Drafted, PruningPlan, ResolvedPlan
from fastvar_trt.runtime.precision import Precision

DRAFTER, REFINER = "drafter", "refiner"
_SHARED = ("quantize.", "phi.", "resize.", "sampling.")  # tensors that are not the transformer's
_SAME = ("patch_nums", "vocab_size", "code_channels", "num_classes")  # in both configurations


@dataclasses.dataclass(frozen=True)
class CoDeConfig:
    """A pair of VARs."""

    drafter: VARConfig
    refiner: VARConfig
    switch: int  # N: the drafter draws scales 0 .. N-1

    @property
    def drafted(self) -> Drafted:
        """What plans have to know of the drafter."""
        return Drafted(self.switch, self.drafter.depth)

    def first_layer(self, part: str) -> int:
        """The number of a part's first layer."""
        return 0 if part == DRAFTER else self.drafter.depth

    def renamed(self, part: str, name: str) -> str:
        """A tensor of a VAR in the names of the pair."""
        if name.startswith(_SHARED):
            return name
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            return f"blocks.{self.first_layer(part) + int(layer)}.{rest}"
        return f"{part}.{name}"


class _Part(VAR):
    """Drafter or refiner, as a VAR over the tensors of the pair."""

    def __init__(
        self,
        config: VARConfig,
        vae_config: VQVAEConfig,
        precision: Precision,
        weight_of: Callable[[str], Tensor],
    ) -> None:
        super().__init__(config, vae_config, precision)
        self._weight_of = weight_of

    def weight(self, name: str) -> Tensor:
        """The pair's tensor."""
        return self._weight_of(name)


class CoDe(CodeBookModel):
    """A drafter and a refiner with their decoder, over the deployment tensors of `CoDeSource`."""

    sublayers = VARBlockSpec.sublayers

    def __init__(self, config: CoDeConfig, vae_config: VQVAEConfig, precision: Precision) -> None:
        depth = config.drafter.depth + config.refiner.depth
        super().__init__(config.refiner.patch_nums, depth, vae_config, precision)
        self.config = config
        # Of a plain attribute's dict torch takes no notice: the parts have no parameters of their own.
        self._parts = {
            name: _Part(own, vae_config, precision, functools.partial(self._weight_of, name))
            for name, own in ((DRAFTER, config.drafter), (REFINER, config.refiner))
        }

    def _weight_of(self, part: str, name: str) -> Tensor:
        return self.weight(self.config.renamed(part, name))

    def _at(self, scale: int) -> str:
        return DRAFTER if scale < self.config.switch else REFINER

    def resolve(self, plan: PruningPlan) -> ResolvedPlan:
        """A plan of the refiner.

        Raises:
            PlanError: it does not fit.
        """
        return plan.resolve(self.schedule, self.config.refiner.depth, drafted=self.config.drafted)

    def load_transformer(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """None: there are two."""
        raise CheckpointError(f"--checkpoint {checkpoint}: this model is made of more than one; export it again")

    def model_spec(self) -> ModelSpec:
        """The refiner's, with the drafter's inside."""
        drafter, refiner = (self._parts[name].model_spec() for name in (DRAFTER, REFINER))
        return dataclasses.replace(refiner, drafter=drafter, num_drafted=self.config.switch)

    def sampling_spec(self) -> SamplingSpec:
        """A VAR's."""
        return self._parts[REFINER].sampling_spec()

    def configs(self) -> dict[str, Any]:
        """The configurations of both transformers and of the VQVAE."""
        return {"code": dataclasses.asdict(self.config), "vae": dataclasses.asdict(self.vae_config)}

    @classmethod
    def from_configs(cls, configs: Mapping[str, Any], precision: Precision) -> CoDe:
        """The model of `configs`, without weights.

        Raises:
            KeyError, TypeError: they are not complete.
        """
        drafter, refiner = (config_from_json(VARConfig, configs["code"][part]) for part in (DRAFTER, REFINER))
        config = CoDeConfig(drafter, refiner, int(configs["code"]["switch"]))
        return cls(config, config_from_json(VQVAEConfig, configs["vae"]), precision)

    def condition_inputs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Class indices, for both."""
        return self._parts[REFINER].condition_inputs(batch)

    def _condition_outputs(self, part: str, batch: int) -> tuple[TensorSpec, ...]:
        first = self.config.first_layer(part)
        return tuple(
            dataclasses.replace(
                spec,
                name=f"{part}_{spec.name}" if spec.layer is None else names.modulation(first + spec.layer),
                layer=None if spec.layer is None else first + spec.layer,
            )
            for spec in self._parts[part].condition_outputs(batch)
        )

    def condition_outputs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Start tokens and modulations of both."""
        return tuple(spec for part in self._parts for spec in self._condition_outputs(part, batch))

    def example_condition(self, batch: int) -> dict[str, Tensor]:
        """The first classes."""
        return self._parts[REFINER].example_condition(batch)

    def request_inputs(self, scale: int) -> tuple[str, ...]:
        """A VAR's: the ramp of guidance goes over all scales."""
        return self._parts[REFINER].request_inputs(scale)

    def step_condition_specs(self, plan: ResolvedPlan, scale: int, batch: int) -> tuple[TensorSpec, ...]:
        """What the part takes of the condition; at the switch the token hub, too."""
        part = self._at(scale)
        starts = scale in (0, self.config.switch)
        own = tuple(
            spec for spec in self._condition_outputs(part, batch) if starts or spec.name != f"{part}_{names.START}"
        )
        if scale != self.config.switch:
            return own
        return (*own, *(self._hub_spec(before, batch) for before in range(1, scale)))

    def _hub_spec(self, scale: int, batch: int) -> TensorSpec:
        return TensorSpec(names.hub(scale), (batch, self.vae_config.code_channels, *self.schedule[scale]), "float32")

    def handed_on_specs(self, plan: ResolvedPlan, scale: int, batch: int) -> tuple[TensorSpec, ...]:
        """What the drafter's next step starts from; the last of them is f_hat itself, resized."""
        return (self._hub_spec(scale + 1, batch),) if scale + 1 < self.config.switch else ()

    def handed_on(self, x: Tensor, drawn: Tensor, f_hat: Tensor, scale: int) -> dict[str, Tensor]:
        """See `handed_on_specs`."""
        if scale + 1 >= self.config.switch:
            return {}
        return {names.hub(scale + 1): self.at_scale(f_hat, scale + 1)}

    def condition(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """labels int64 [B] -> `VAR.condition` of both."""
        by_name: dict[str, Tensor] = {}
        for part, model in self._parts.items():
            own = model.condition(inputs)
            own_specs, specs = model.condition_outputs(1), self._condition_outputs(part, 1)
            by_name |= {spec.name: own[of_part.name] for of_part, spec in zip(own_specs, specs, strict=True)}
        return by_name

    def _of_part(self, condition: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
        """What is not per layer, in the names of a VAR."""
        return {
            name: condition[f"{part}_{name}"]
            for name in (names.START, names.HEAD_MODULATION)
            if f"{part}_{name}" in condition
        }

    def block_spec(self, plan: ResolvedPlan, scale: int, layer: int, batch: int) -> VARBlockSpec:
        """The static part of one layer of one step."""
        return self._parts[self._at(scale)].block_spec(plan, scale, layer, batch)

    def block_weights(self, spec: BlockSpec, layer: int) -> dict[str, Tensor]:
        """The weights of a block of either part."""
        part = DRAFTER if layer < self.config.drafter.depth else REFINER
        return self._parts[part].block_weights(spec, layer - self.config.first_layer(part))

    def embed(self, condition: Mapping[str, Tensor], f_hat: Tensor | None, scale: int) -> Tensor:
        """A VAR's; at the switch the tokens of all scales so far, [B2, T, C]."""
        part = self._at(scale)
        model, own = self._parts[part], self._of_part(condition, part)
        if scale != self.config.switch:
            return model.embed(own, f_hat, scale)
        start = model.embed(own, None, 0)
        assert f_hat is not None
        maps = [model.embed_map(condition[names.hub(before)], before) for before in range(1, scale)]
        rest = torch.cat([*maps, model.embed(own, f_hat, scale)], dim=1)
        return torch.cat([start, rest.repeat(len(start) // len(rest), 1, 1)], dim=1)

    def logits(self, x: Tensor, condition: Mapping[str, Tensor], scale: int, cfg: Tensor | None) -> Tensor:
        """A VAR's, of the scale's own tokens: fp32 [B, L, V]."""
        part = self._at(scale)
        if scale == self.config.switch:
            x = x[:, -self.logits_shape(scale)[0] :]
        return self._parts[part].logits(x, self._of_part(condition, part), scale, cfg)


@dataclasses.dataclass(frozen=True)
class CoDeSource(Source):
    """A pair of VARs to export, from their official files."""

    config: CoDeConfig
    vae_config: VQVAEConfig
    states: Mapping[str, Mapping[str, Tensor]]  # of drafter and refiner
    vae_state: Mapping[str, Tensor]

    def with_lora(self, lora: Path, scale: float) -> CoDeSource:
        """It has two transformers.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"--lora {lora}: a pair has two transformers; merge it into one of the files before")

    @classmethod
    def from_files(
        cls, drafter: Path, refiner: Path, vae: Path, switch: int, overrides: Mapping[str, Any] | None = None
    ) -> CoDeSource:
        """The official files, memory-mapped and checked.

        Raises:
            CheckpointError: a file that is missing, damaged, or not of this model, or two that do not fit together.
        """
        states = {DRAFTER: load_state_dict(drafter, NESTED), REFINER: load_state_dict(refiner, NESTED)}
        return cls.from_states(states, load_state_dict(vae, NESTED_VAE), switch, overrides)

    @classmethod
    def from_states(
        cls,
        states: Mapping[str, Mapping[str, Tensor]],
        vae_state: Mapping[str, Tensor],
        switch: int,
        overrides: Mapping[str, Any] | None = None,
    ) -> CoDeSource:
        """State dicts in the official keys, checked.

        Args:
            states: drafter's and refiner's.
            vae_state: the VQVAE's.
            switch: N, how many scales the drafter draws.
            overrides: what state dicts do not tell, of both: see `VARSource.from_state`.

        Raises:
            CheckpointError: keys, shapes or sizes that do not belong together.
        """
        check_overrides(overrides)
        vae_config = VQVAEConfig.from_state_dict(vae_state, (overrides or {}).get("quant_resi", 0.5))
        configs = {}
        for part in (DRAFTER, REFINER):
            try:
                configs[part] = VARConfig.from_state_dict(states[part], overrides)
            except CheckpointError as error:
                raise CheckpointError(f"--{part}: {error}") from error
            check_checkpoints(configs[part], vae_config, states[part], vae_state, f"--{part}")
        for name in _SAME:
            of_drafter, of_refiner = (getattr(configs[part], name) for part in (DRAFTER, REFINER))
            if of_drafter != of_refiner:
                raise CheckpointError(
                    f"--drafter and --refiner: {name}: got {of_drafter} and {of_refiner}, expected the same: give two "
                    "models that were trained for one task"
                )
        num_scales = len(configs[REFINER].patch_nums)
        if not 0 < switch < num_scales:
            raise CheckpointError(
                f"--switch {switch}: expected 1 to {num_scales - 1}, so that either model draws some of the "
                f"{num_scales} scales"
            )
        return cls(CoDeConfig(configs[DRAFTER], configs[REFINER], switch), vae_config, states, vae_state)

    def new_model(self, precision: Precision) -> CoDe:
        """The model, without weights."""
        return CoDe(self.config, self.vae_config, precision)

    def tensors(self, precision: Precision, max_top_k: int) -> Iterator[tuple[str, Tensor]]:
        """The deployment tensors, one at a time."""
        for part, config in ((DRAFTER, self.config.drafter), (REFINER, self.config.refiner)):
            for name, tensor in transformer_tensors(config, self.states[part], precision):
                yield self.config.renamed(part, name), tensor
        yield from shared_tensors(self.config.refiner, self.vae_config, self.vae_state, precision, max_top_k)

    def on_meta(self) -> CoDeSource:
        """The same without data."""
        states = {part: to_meta(state) for part, state in self.states.items()}
        return dataclasses.replace(self, states=states, vae_state=to_meta(self.vae_state))
