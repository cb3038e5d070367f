"""The arithmetic of a bundle's steps, counted: what a plan saves before anything is measured."""

from __future__ import annotations

from fastvar_trt.runtime.manifest import Manifest, ModelSpec, Role
from fastvar_trt.runtime.plan import DENSE, ResolvedPlan
from fastvar_trt.runtime.precision import DTYPES


def output_bytes(manifest: Manifest, batch: int, role: Role) -> int:
    """Bytes of the outputs of a role, over all graphs of a chain: of caches, modulations, ...; not of keys and values,
    which share memory (`runtime.layout.kv_bytes`)."""
    return sum(t.num_bytes for g in manifest.default.chain(batch) for t in g.outputs if t.role is role)


def layer_weights(model: ModelSpec) -> int:
    """Elements of the matrices of a layer, without those of cross-attention."""
    return 4 * model.width**2 + (3 if model.is_gated else 2) * model.width * model.mlp_width


def has_cross_attention(model: ModelSpec) -> bool:
    """Whether layers look text up; it may be a prefix instead."""
    return model.text_length > 0 and not model.context_tokens


def step_multiply_adds(model: ModelSpec, plan: ResolvedPlan, scale: int) -> int:
    """Multiply-adds of one step for one image.

    Counts the matrix products of the transformer. Per kept token, of both rows where there is guidance: q, k, v and
    output projections (4 C^2), the feed-forward layers (2 C * mlp_width, 3 with a gate), attention (2 C per query and
    key) and, where text is looked up, cross-attention (2 C^2, and 2 C per query and token of the text). Once per token,
    as guidance is applied before the head: embedding and head.

    Args:
        model: sizes.
        plan: which tokens are computed.
        scale: the step; one that the plan skips costs nothing.
    """
    length = plan.num_tokens(scale)
    if scale not in plan.steps:
        return 0
    rows = plan.rows(scale)
    model = model.at(scale)
    embedded = sum(plan.scale_tokens(scale))
    total = length * model.width * model.vocab_size + embedded * model.code_channels * model.width
    for layer in plan.layers(scale):
        kept = plan.kept(scale, layer)
        total += rows * (kept * layer_weights(model) + 2 * model.width * plan.num_pairs(scale, layer))
        if has_cross_attention(model):
            total += rows * kept * (2 * model.width**2 + 2 * model.width * model.text_length)
    return total


def chain_multiply_adds(model: ModelSpec, plan: ResolvedPlan) -> int:
    """Multiply-adds of all steps for one image."""
    return sum(step_multiply_adds(model, plan, scale) for scale in plan.steps)


def relative_work(manifest: Manifest, plan: ResolvedPlan) -> float:
    """The transformer's arithmetic under a plan as a share of the dense chain's."""
    dense = manifest.default.resolve(manifest.model, DENSE)
    return chain_multiply_adds(manifest.model, plan) / chain_multiply_adds(manifest.model, dense)


def activation_bytes(manifest: Manifest, batch: int) -> int:
    """What the largest graph holds besides buffers and weights, estimated for fused attention.

    A step: the residual stream twice in fp32, and the larger of the feed-forward layer's hidden state and q, k, v with
    the repacked keys and values; its logits. The decoder: three fp32 copies of its largest map, since normalisation is
    in fp32 (a doubled map still has the channels of the level before). What a backend really takes depends on its
    kernels; of engines, `EngineRecord.activation_bytes` says it.
    """
    plan = manifest.resolved_plan
    size = DTYPES[manifest.own_precision.computed].num_bytes
    largest = 0
    for scale in plan.steps:
        model = manifest.model.at(scale)
        rows = plan.rows(scale, batch)
        length = plan.num_tokens(scale)
        stream = 2 * rows * sum(plan.scale_tokens(scale)) * model.width * 4
        inside = 0
        for layer in plan.layers(scale):
            kept = plan.kept(scale, layer)
            keys = plan.num_past(scale, layer) + kept
            feed_forward = rows * kept * (model.mlp_width + model.width) * size
            attention = rows * (4 * kept + 2 * keys) * model.width * size
            inside = max(inside, feed_forward, attention)
        largest = max(largest, stream + inside + batch * length * model.vocab_size * 4)
    pixels = batch * manifest.default.image_height * manifest.default.image_width
    channels = manifest.configs.get("vae", {}).get("level_channels", ())
    before = (*channels[1:], *channels[-1:])
    maps = (pixels // 4**level * width * 4 * 3 for level, width in enumerate(before))
    return max(largest, *maps, 0)
