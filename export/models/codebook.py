"""Models that draw tokens from a code book, over VAR's VQVAE: VAR and HART.

`models.vqvae` has the tensors' names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_trt.export.models.base import NextScaleModel, Request
from fastvar_trt.export.models.resize import resize_map
from fastvar_trt.export.models.vqvae import ImageDecoder, ImageEncoder, VQVAEConfig
from fastvar_trt.runtime.precision import Precision


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
    values, order = top_k(logits, len(rank))  # [B, L, max_top_k], descending
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


def top_k(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of [..., V] and where they are: [..., count], descending."""
    if torch.onnx.is_in_onnx_export():
        values, order = torch.topk(logits, count, dim=-1)
        return values, order
    # ONNX prefers the lower index among equal values; torch.topk promises no order.
    values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[..., :count], order[..., :count]


class CodeBookModel(NextScaleModel):
    """What its kind shares: square maps, an index per position, and f_hat from the code book."""

    def __init__(
        self,
        patch_nums: tuple[int, ...],
        depth: int,
        vae_config: VQVAEConfig,
        precision: Precision,
        context_tokens: int = 0,
    ) -> None:
        super().__init__(tuple((side, side) for side in patch_nums), depth, precision, context_tokens)
        self.patch_nums = patch_nums  # side of the token map per scale
        self.vae_config = vae_config

    def image_size(self) -> tuple[int, int]:
        """Square."""
        side = self.patch_nums[-1] * self.vae_config.pixels_per_token
        return side, side

    def f_hat_shape(self) -> tuple[int, int, int]:
        """[C_vae, h_K, w_K]."""
        return (self.vae_config.code_channels, *self.schedule[-1])

    def token_spec(self, scale: int) -> tuple[tuple[int, ...], torch.dtype]:
        """An index into the code book per position."""
        return (self.patch_nums[scale] ** 2,), torch.int32

    def logits_shape(self, scale: int) -> tuple[int, ...]:
        """[L, V]."""
        return self.patch_nums[scale] ** 2, self.vae_config.vocab_size

    def new_decoder(self) -> nn.Module:
        """`VQVAE.fhat_to_img`."""
        return ImageDecoder(self.vae_config)

    def new_encoder(self) -> nn.Module | None:
        """`VQVAE.img_to_idxBl` as far as the features, where it was asked for."""
        return ImageEncoder(self.vae_config) if self.vae_config.has_encoder else None

    def nearest(self, left: Tensor, scale: int) -> Tensor:
        """The nearest code by squared distance: int64 [B, L]."""
        rows = self.at_scale(left, scale).flatten(2).transpose(1, 2)  # [B, L, C_vae]
        book, bias = (self.weight(f"quantize.{name}") for name in ("embedding.weight", "closeness.bias"))
        closeness = F.linear(rows.flatten(0, 1), book, bias)
        return closeness.argmax(-1).view(len(left), -1)

    def at_scale(self, f_hat: Tensor, scale: int) -> Tensor:
        """f_hat area-resized to the scale's map: fp32 [B, C_vae, h, w]."""
        side, last = self.patch_nums[scale], self.patch_nums[-1]
        if side == last:
            return f_hat
        area = f"resize.area_{side}_{last}"
        return resize_map(f_hat, self.weight(area), self.weight(f"{area}_t"))

    def embedded(self, own: Tensor) -> Tensor:
        """f_hat at a scale's map [B, C_vae, h, w] embedded: fp32 [B, L, C]."""
        batch, channels = own.shape[:2]
        tokens = own.flatten(2).transpose(1, 2).reshape(-1, channels)  # [B*L, C_vae]
        embedded = F.linear(tokens, self.weight("word_embed.weight"), self.weight("word_embed.bias"))
        return embedded.view(batch, -1, embedded.shape[-1])

    def draw(self, logits: Tensor, uniform: Tensor, request: Request, scale: int) -> Tensor:
        """One code per position: int32 [B, L]."""
        return sample(logits, uniform, request, self.rank(scale))

    def rank(self, scale: int) -> Tensor:
        """int64 [M], 0, 1, ...: as long as top-k may be at a scale."""
        return self.weight("sampling.rank")

    def codes(self, drawn: Tensor) -> Tensor:
        """The code book's rows: int [B, L] -> fp32 [B, L, C_vae]."""
        return F.embedding(drawn.long(), self.weight("quantize.embedding.weight"))

    def accumulate(self, drawn: Tensor, f_hat: Tensor | None, scale: int) -> Tensor:
        """f_hat with this scale's codes added."""
        return self.add_codes(self.codes(drawn), f_hat, scale)

    def add_codes(self, codes: Tensor, f_hat: Tensor | None, scale: int) -> Tensor:
        """f_hat with codes fp32 [B, L, C_vae] added (`get_next_autoregressive_input`)."""
        side, last = self.patch_nums[scale], self.patch_nums[-1]
        codes = codes.transpose(1, 2).reshape(codes.shape[0], self.vae_config.code_channels, side, side)
        if side != last:
            bicubic = f"resize.bicubic_{last}_{side}"
            codes = resize_map(codes, self.weight(bicubic), self.weight(f"{bicubic}_t"))
        phi = self.vae_config.phi_index(scale, len(self.patch_nums))
        codes = F.conv2d(codes, self.weight(f"phi.{phi}.weight"), self.weight(f"phi.{phi}.bias"), padding=1)
        return codes if f_hat is None else f_hat + codes
