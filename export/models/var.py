"""VAR as stateless functions: condition, one step per scale, decoder.

What the official code keeps between steps (KV cache, token map, f_hat) is passed in and out here, so that
each function is one graph. Differences from the reference, all exact up to rounding: adaptive-norm modulations
are computed once per image instead of once per scale; guidance is applied to the hidden state before the head,
which is linear, instead of to the logits; interpolations are constant matrices; sampling is by inverse CDF from
one uniform number per token.

In half precision the matrix products, the attention, keys, values and token caches are in half; fp32 stay the residual
stream (real checkpoints exceed 65504 in it), normalisation, q/k normalisation, token selection, guidance,
sampling and f_hat.

Dimension letters: B images, B2 = 2B rows (conditional first), L tokens, K kept tokens, S past keys, T cached
tokens, H heads, D head dim, C channels, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.config import VARConfig, VQVAEConfig
from fastvar_trt.export.models.resize import resize_map
from fastvar_trt.export.models.vqvae import ImageDecoder
from fastvar_trt.plugins.torch_ops import gather_tokens, pivotal_tokens, restore_tokens
from fastvar_trt.runtime.plan import ResolvedPlan

BLOCK_DOMAIN = "fastvar.block"  # only inside the exporter: block functions are inlined before a graph is written


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Everything static about one layer of one step; equal specs share one trace."""

    rows: int  # B2
    height: int
    width: int
    num_past: int  # S
    keep: int | None  # K, or None where all tokens are computed
    cached_height: int  # of the cache scale; 0 unless `keep` is set
    cached_width: int
    writes_cache: bool
    emits_kv: bool
    channels: int
    num_heads: int
    attn_scale: float
    attn_l2_norm: bool
    norm_eps: float
    dtype: torch.dtype

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
    def weight_names(self) -> tuple[str, ...]:
        """Names of the layer's weights, below `blocks.<layer>.`."""
        q_scale = ("attn.q_scale",) if self.attn_l2_norm else ()
        linears = ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2")
        return (*q_scale, *(f"{linear}.{part}" for linear in linears for part in ("weight", "bias")))

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of `run_block`, in order."""
        past = ("past_k", "past_v") if self.num_past else ()
        cached = ("cached_attn", "cached_ffn") if self.keep is not None else ()
        return ("x", "modulation", "norm.weight", *past, *cached, *self.weight_names)

    @property
    def outputs(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """Name, shape and dtype of the outputs of `run_block`, in order."""
        full = (self.rows, self.num_tokens, self.channels)
        outputs: list[tuple[str, tuple[int, ...], torch.dtype]] = [("y", full, torch.float32)]
        if self.emits_kv:
            outputs += [("new_k", self.kv_shape, self.dtype), ("new_v", self.kv_shape, self.dtype)]
        if self.writes_cache:
            outputs += [("cache_attn", full, self.dtype), ("cache_ffn", full, self.dtype)]
        return tuple(outputs)


def run_block(spec: BlockSpec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """One transformer layer (`AdaLNSelfAttn`), pruned where `spec.keep` says so.

    Args:
        spec: the static part.
        tensors: `spec.input_names`: x fp32 [B2, L, C]; modulation fp32 [B2, 6, C]; norm.weight, fp32 ones [C];
            past_k, past_v [S, B2, H, D]; cached_attn, cached_ffn [B2, T, C]; weights in torch's [out, in] layout.

    Returns:
        `spec.outputs`.
    """
    x, modulation = tensors["x"], tensors["modulation"]
    gamma1, gamma2, scale1, scale2, shift1, shift2 = (modulation[:, i : i + 1] for i in range(6))  # [B2, 1, C]

    def sublayer_input(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised, modulated input as [B2*K, C] in the compute dtype, and the kept positions."""
        indices = None
        if spec.keep is not None:
            indices = pivotal_tokens(x, spec.keep)
            x = gather_tokens(x, indices)
        normed = F.layer_norm(x, (spec.channels,), tensors["norm.weight"], eps=spec.norm_eps) * scale + shift
        return normed.flatten(0, 1).to(spec.dtype), indices

    def sublayer_output(y: Tensor, gamma: Tensor, indices: Tensor | None, cached: str) -> Tensor:
        """[B2*K, C] -> the sublayer's output over all tokens: [B2, L, C] in the compute dtype."""
        y = (y.view(spec.rows, spec.num_computed, spec.channels).float() * gamma).to(spec.dtype)
        if indices is None:
            return y
        return restore_tokens(
            y,
            indices,
            tensors[cached],
            h=spec.height,
            w=spec.width,
            cached_h=spec.cached_height,
            cached_w=spec.cached_width,
        )

    hidden, indices = sublayer_input(x, scale1, shift1)
    attended, new_k, new_v = _attention(spec, tensors, hidden)
    y_attn = sublayer_output(
        F.linear(attended, tensors["attn.proj.weight"], tensors["attn.proj.bias"]), gamma1, indices, "cached_attn"
    )
    x = x + y_attn.float()

    hidden, indices = sublayer_input(x, scale2, shift2)
    hidden = F.gelu(F.linear(hidden, tensors["ffn.fc1.weight"], tensors["ffn.fc1.bias"]), approximate="tanh")
    y_ffn = sublayer_output(
        F.linear(hidden, tensors["ffn.fc2.weight"], tensors["ffn.fc2.bias"]), gamma2, indices, "cached_ffn"
    )
    x = x + y_ffn.float()

    outputs: tuple[Tensor, ...] = (x,)
    if spec.emits_kv:
        outputs += (new_k, new_v)
    if spec.writes_cache:
        outputs += (y_attn, y_ffn)
    return outputs


def _attention(spec: BlockSpec, tensors: Mapping[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention of [B2*K, C] over past and new keys: the result [B2*K, C], new keys and values [K, B2, H, D]."""
    rows, computed, channels = spec.rows, spec.num_computed, spec.channels
    qkv = F.linear(hidden, tensors["attn.mat_qkv.weight"], tensors["attn.mat_qkv.bias"])  # [B2*K, 3C]
    q, k, v = qkv.view(rows, computed, 3, spec.num_heads, channels // spec.num_heads).unbind(2)  # [B2, K, H, D]
    if spec.attn_l2_norm:
        q = (_normalise(q) * tensors["attn.q_scale"]).to(spec.dtype)
        k = _normalise(k).to(spec.dtype)
    new_k, new_v = k.transpose(0, 1), v.transpose(0, 1)  # [K, B2, H, D]
    keys, values = new_k, new_v
    if spec.num_past:
        keys = torch.cat([tensors["past_k"], keys])  # [S + K, B2, H, D]
        values = torch.cat([tensors["past_v"], values])
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3), scale=spec.attn_scale
    )  # [B2, H, K, D]
    return attended.transpose(1, 2).reshape(rows * computed, channels), new_k, new_v


def _normalise(x: Tensor) -> Tensor:
    """x / ||x|| over the last axis in fp32, the norm clamped as in `F.normalize` (which exports an Expand)."""
    x = x.float()
    return x / (x * x).sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


@dataclasses.dataclass(frozen=True)
class Request:
    """Run-time values of one batch: per image, so that one batch can serve different requests."""

    cfg: Tensor  # fp32 [B]
    temperature: Tensor  # fp32 [B]
    top_k: Tensor  # int64 [B], 1..max_top_k
    top_p: Tensor  # fp32 [B]
    greedy: Tensor  # bool [B]


@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """What one step computes. Lists are per layer; keys are absent (empty) where the step emits none."""

    tokens: Tensor  # int32 [B, L]
    f_hat: Tensor  # fp32 [B, C_vae, h_K, w_K]
    logits: Tensor  # fp32 [B, L, V]
    new_kv: list[tuple[Tensor, Tensor]]  # [K, B2, H, D]
    caches: dict[int, tuple[Tensor, Tensor]]  # layer -> attn, ffn: [B2, T, C]


def sample(logits: Tensor, uniform: Tensor, request: Request, rank: Tensor) -> Tensor:
    """Draw one token per position: top-k, then top-p, then the inverse CDF over the sorted candidates.

    The distribution is that of `sample_with_top_k_top_p_` of VAR, but for exact ties at the k-th value, which
    the reference keeps all.

    Args:
        logits: fp32 [B, L, V].
        uniform: fp32 [B, L], U[0, 1).
        rank: int64 [max_top_k], 0, 1, ...; its length bounds `request.top_k`.

    Returns:
        int32 [B, L].
    """
    values, order = _top_k(logits, len(rank))  # [B, L, max_top_k], descending
    values = values / request.temperature[:, None, None]
    among_top_k = rank < request.top_k[:, None, None]
    probabilities = values.masked_fill(~among_top_k, float("-inf")).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # A candidate stays while those before it have less than top_p: always the first one, and a prefix.
    kept = ((cumulative - probabilities) < request.top_p[:, None, None]) & among_top_k
    mass = (probabilities * kept).sum(dim=-1, keepdim=True)
    below = (cumulative <= uniform.unsqueeze(-1) * mass) & kept
    # Rounding may put the draw at the very end of the mass: the last kept candidate then.
    last = (kept.long().sum(dim=-1, keepdim=True) - 1).clamp_min(0)  # where logits are not finite nothing is kept
    drawn = torch.minimum(below.long().sum(dim=-1, keepdim=True), last)
    drawn = drawn.masked_fill(request.greedy[:, None, None], 0)
    return order.gather(-1, drawn).squeeze(-1).to(torch.int32)


def _top_k(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if torch.onnx.is_in_onnx_export():
        values, order = torch.topk(logits, count, dim=-1)
        return values, order
    # ONNX prefers the lower index among equal values; torch.topk promises no order.
    values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[..., :count], order[..., :count]


class VAR(nn.Module):
    """A class-conditional VAR with its decoder, over the deployment tensors of `export.models.checkpoint`.

    Parameters carry the tensors' names; they are created by `load_tensors`, without a copy.
    """

    def __init__(self, config: VARConfig, vae_config: VQVAEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.vae_config = vae_config
        self.dtype = dtype

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> VAR:
        """Take the tensors as parameters, by name; nothing is copied."""
        decoder_prefixes = ("decoder.", "post_quant_conv.")
        with torch.device("meta"):
            self.image_decoder = ImageDecoder(self.vae_config)
        decoder = {key: tensor for key, tensor in tensors.items() if key.startswith(decoder_prefixes)}
        self.image_decoder.load_state_dict(decoder, assign=True)
        for key, tensor in tensors.items():
            if key in decoder:
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
        """The parameter of that name."""
        return self.get_parameter(name)

    def condition(self, labels: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Everything that depends on the class only.

        Args:
            labels: int64 [B].

        Returns:
            start fp32 [B2, C]; per layer the modulation fp32 [B2, 6, C]; head modulation fp32 [B2, 2, C].
        """
        width = self.config.width
        unconditional = torch.full_like(labels, self.config.num_classes)
        start = F.embedding(torch.cat([labels, unconditional]), self.weight("class_emb.weight"))  # [B2, C]
        activated = F.silu(start).to(self.dtype)

        def project(name: str) -> Tensor:
            # The bias is added in fp32: it carries the 1 of 1 + scale.
            return F.linear(activated, self.weight(f"{name}.weight")).float() + self.weight(f"{name}.bias")

        if self.config.shared_aln:
            shared = project("shared_modulation").view(-1, 6, width)
            modulations = [shared + self.weight(f"blocks.{i}.modulation.bias") for i in range(self.config.depth)]
        else:
            modulations = [project(f"blocks.{i}.modulation").view(-1, 6, width) for i in range(self.config.depth)]
        return start, modulations, project("head_modulation").view(-1, 2, width)

    def block_spec(self, plan: ResolvedPlan, scale: int, layer: int, rows: int) -> BlockSpec:
        """The static part of one layer of one step."""
        config = self.config
        height, width = config.schedule[scale]
        pruned = plan.prunes(scale, layer)
        cached = config.schedule[plan.cache_scale] if pruned and plan.cache_scale is not None else (0, 0)
        return BlockSpec(
            rows=rows,
            height=height,
            width=width,
            num_past=plan.num_past(scale, layer),
            keep=plan.kept(scale, layer) if pruned else None,
            cached_height=cached[0],
            cached_width=cached[1],
            writes_cache=plan.writes_cache(scale, layer),
            emits_kv=scale != plan.steps[-1],
            channels=config.width,
            num_heads=config.num_heads,
            attn_scale=config.attn_scale,
            attn_l2_norm=config.attn_l2_norm,
            norm_eps=config.norm_eps,
            dtype=self.dtype,
        )

    def step(
        self,
        plan: ResolvedPlan,
        scale: int,
        *,
        start: Tensor | None,
        f_hat: Tensor | None,
        modulations: Sequence[Tensor],
        head_modulation: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
        caches: Mapping[int, tuple[Tensor, Tensor]],
        uniform: Tensor,
        request: Request,
        block_names: Mapping[BlockSpec, str] | None = None,
    ) -> StepOutputs:
        """One scale.

        Args:
            plan: the pruning plan, resolved for this model.
            scale: which one.
            start: [B2, C], at the first scale only.
            f_hat: fp32 [B, C_vae, h_K, w_K], at every other scale.
            modulations: per layer [B2, 6, C].
            head_modulation: [B2, 2, C].
            past: per layer keys and values [S, B2, H, D]; empty at the first scale.
            caches: per pruned layer the sublayers' outputs at the cache scale [B2, T, C]; pruned scales only.
            uniform: fp32 [B, L].
            request: guidance and sampling.
            block_names: while tracing, the name of the custom node that stands for each block.
        """
        config = self.config
        batch = uniform.shape[0]
        if start is not None:
            x = start.unsqueeze(1) + self.weight("pos.0")  # [B2, L, C]
        else:
            assert f_hat is not None
            x = self._embed(f_hat, scale).repeat(2, 1, 1)
        new_kv: list[tuple[Tensor, Tensor]] = []
        new_caches: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in range(config.depth):
            spec = self.block_spec(plan, scale, layer, 2 * batch)
            tensors = {"x": x, "modulation": modulations[layer], "norm.weight": self.weight("norm.weight")}
            if spec.num_past:
                tensors["past_k"], tensors["past_v"] = past[layer]
            if spec.keep is not None:
                tensors["cached_attn"], tensors["cached_ffn"] = caches[layer]
            tensors |= {name: self.weight(f"blocks.{layer}.{name}") for name in spec.weight_names}
            outputs = _call_block(spec, tensors, block_names)
            x = outputs[0]
            if spec.emits_kv:
                new_kv.append((outputs[1], outputs[2]))
            if spec.writes_cache:
                new_caches[layer] = (outputs[-2], outputs[-1])

        logits = self._logits(x, head_modulation, scale, request.cfg)
        tokens = sample(logits, uniform, request, self.weight("sampling.rank"))
        f_hat = self._accumulate(tokens, f_hat, scale)
        # A token is an index and looks sound whatever it was drawn from: what is not finite is carried on in f_hat.
        f_hat = f_hat + logits.sum(dim=(1, 2))[:, None, None, None] * 0.0
        return StepOutputs(tokens, f_hat, logits, new_kv, new_caches)

    def decode(self, f_hat: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [B, C_vae, h_K, w_K] -> image fp32 [B, 3, H, W] in [0, 1], pixels uint8 [B, H, W, 3]."""
        image, pixels = self.image_decoder(f_hat)
        return image, pixels

    def _embed(self, f_hat: Tensor, scale: int) -> Tensor:
        """f_hat, area-resized to the scale's map and embedded: [B, L, C]."""
        side, last = self.config.patch_nums[scale], self.config.patch_nums[-1]
        if side != last:
            area = f"resize.area_{side}_{last}"
            f_hat = resize_map(f_hat, self.weight(area), self.weight(f"{area}_t"))
        batch, channels = f_hat.shape[:2]
        tokens = f_hat.view(batch, channels, side * side).transpose(1, 2).reshape(-1, channels)  # [B*L, C_vae]
        embedded = F.linear(tokens, self.weight("word_embed.weight"), self.weight("word_embed.bias"))
        return embedded.view(batch, side * side, self.config.width) + self.weight(f"pos.{scale}")

    def _logits(self, x: Tensor, head_modulation: Tensor, scale: int, cfg: Tensor) -> Tensor:
        """Guided logits fp32 [B, L, V]: `(1 + t) cond - t uncond` with t = cfg * scale / (K - 1).

        The head is affine and the two factors sum to 1, so the guidance is applied to its input: half the
        rows go through the head.
        """
        rows, length, channels = x.shape
        batch = rows // 2
        ramp = scale / max(len(self.config.patch_nums) - 1, 1)
        if ramp == 0:
            x, head_modulation = x[:batch], head_modulation[:batch]
        hidden = F.layer_norm(x, (channels,), self.weight("norm.weight"), eps=self.config.norm_eps)
        hidden = hidden * head_modulation[:, 0:1] + head_modulation[:, 1:2]
        if ramp != 0:
            t = (cfg * ramp)[:, None, None]
            hidden = (1 + t) * hidden[:batch] - t * hidden[batch:]
        hidden = hidden.reshape(-1, channels).to(self.dtype)
        logits = F.linear(hidden, self.weight("head.weight"), self.weight("head.bias"))
        return logits.float().view(batch, length, self.config.vocab_size)

    def _accumulate(self, tokens: Tensor, f_hat: Tensor | None, scale: int) -> Tensor:
        """f_hat with this scale's codes added (`get_next_autoregressive_input`)."""
        config = self.config
        side, last = config.patch_nums[scale], config.patch_nums[-1]
        codes = F.embedding(tokens.long(), self.weight("quantize.embedding.weight"))  # [B, L, C_vae]
        codes = codes.transpose(1, 2).reshape(tokens.shape[0], config.code_channels, side, side)
        if side != last:
            bicubic = f"resize.bicubic_{last}_{side}"
            codes = resize_map(codes, self.weight(bicubic), self.weight(f"{bicubic}_t"))
        phi = self.vae_config.phi_index(scale, len(config.patch_nums))
        codes = F.conv2d(codes, self.weight(f"phi.{phi}.weight"), self.weight(f"phi.{phi}.bias"), padding=1)
        return codes if f_hat is None else f_hat + codes


def _call_block(
    spec: BlockSpec, tensors: Mapping[str, Tensor], block_names: Mapping[BlockSpec, str] | None
) -> tuple[Tensor, ...]:
    """The block's outputs; while tracing a step, one custom node in its place."""
    if block_names is None:
        return run_block(spec, tensors)
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{BLOCK_DOMAIN}::{block_names[spec]}",
            [tensors[name] for name in spec.input_names],
            dtypes=[dtype for _, _, dtype in spec.outputs],
            shapes=[shape for _, shape, _ in spec.outputs],
            version=1,
        )
    )
