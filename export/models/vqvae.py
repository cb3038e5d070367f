"""VAR's multi-scale VQVAE, of VAR and of HART: sizes, official keys, decoder and encoder.

The official state dicts load as they are (`vqvae.py`, `quant.py` of VAR).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fastvar_trt.export.models.checkpoint import check_keys, count_indices, key_problems, tensor_of
from fastvar_trt.export.models.decoder import NORM_GROUPS, Decoder, to_image
from fastvar_trt.export.models.encoder import Encoder, from_pixels
from fastvar_trt.export.models.matrix import torch_dtype
from fastvar_trt.export.models.resize import area_matrix, bicubic_matrix
from fastvar_trt.runtime.errors import CheckpointError
from fastvar_trt.runtime.precision import Precision

_UNUSED = "quantize.ema_vocab_hit_SV"
_OF_ENCODER = ("encoder.", "quant_conv.")


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """VAR's multi-scale VQVAE, with its encoder or without."""

    vocab_size: int  # V
    code_channels: int  # C_vae
    level_channels: tuple[int, ...]  # `ch * ch_mult`, finest level first
    num_blocks: int  # residual blocks per decoder level (`num_res_blocks + 1`)
    phi: str  # `shared`, `partially_shared` or `non_shared`: how scales share the residual convolutions
    num_phi: int
    phi_ratio: float = 0.5  # `quant_resi`: share of the convolution in phi; not in the state dict
    has_encoder: bool = False  # whether pictures are encoded, too

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], phi_ratio: float = 0.5) -> VQVAEConfig:
        """Sizes from `vae_ch160v4096z32.pth` or a checkpoint of the same keys.

        Args:
            state: the flat state dict.
            phi_ratio: `quant_resi`, which the state dict does not tell; 0.5 in the official files.

        Raises:
            CheckpointError: keys that name no VQVAE of VAR.
        """
        kind = "a VAR VQVAE"
        embedding = tensor_of(state, "quantize.embedding.weight", kind, num_axes=2)
        if "quantize.quant_resi.qresi.weight" in state:
            phi, num_phi = "shared", 1
        elif any(key.startswith("quantize.quant_resi.qresi_ls.") for key in state):
            phi, num_phi = "partially_shared", count_indices(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
        else:
            phi, num_phi = "non_shared", count_indices(state, r"quantize\.quant_resi\.(\d+)\.")
            if num_phi == 0:
                raise CheckpointError(f"not {kind}: key quantize.quant_resi.* is missing")
        level_channels = []
        for level in range(count_indices(state, r"decoder\.up\.(\d+)\.")):
            channels = tensor_of(state, f"decoder.up.{level}.block.0.norm2.weight", kind, num_axes=1).shape[0]
            if channels == 0 or channels % NORM_GROUPS:
                raise CheckpointError(
                    f"decoder.up.{level}.block.0.norm2.weight: got {channels} channels, expected a multiple of "
                    f"{NORM_GROUPS}, the groups of VAR's GroupNorm"
                )
            level_channels.append(channels)
        if not level_channels:
            raise CheckpointError(f"not {kind}: key decoder.up.* is missing")
        if not isinstance(phi_ratio, int | float) or isinstance(phi_ratio, bool) or not 0 <= phi_ratio <= 1:
            raise CheckpointError(f"quant_resi: got {phi_ratio!r}, expected a number from 0 to 1 (--config)")
        return cls(
            vocab_size=embedding.shape[0],
            code_channels=embedding.shape[1],
            level_channels=tuple(level_channels),
            num_blocks=count_indices(state, r"decoder\.up\.0\.block\.(\d+)\."),
            phi=phi,
            num_phi=num_phi,
            phi_ratio=float(phi_ratio),
        )

    def with_encoder(self, state: Mapping[str, Tensor]) -> VQVAEConfig:
        """The same with the encoder of the state dict.

        Raises:
            CheckpointError: it has none, or one of other sizes.
        """
        config = dataclasses.replace(self, has_encoder=True)
        check_keys({"--with-encoder: --vae": vae_problems(config, state)})
        return config

    @property
    def pixels_per_token(self) -> int:
        """Side of the image patch behind one token of the last scale."""
        return int(2 ** (len(self.level_channels) - 1))

    def phi_index(self, scale: int, num_scales: int) -> int:
        """Which residual convolution a scale uses (`PhiPartiallyShared.ticks`)."""
        if self.phi == "shared":
            return 0
        n = self.num_phi
        margin = 1 / 3 / n if n == 4 else 1 / 2 / n
        # Two ticks can be equally far but for rounding (scale 2 of 10), so the reference's own arithmetic decides.
        ticks = np.linspace(margin, 1 - margin, n)
        return int(np.argmin(np.abs(ticks - scale / max(num_scales - 1, 1))))


class ImageDecoder(nn.Module):
    """`VQVAE.fhat_to_img`: token features to an image."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.code_channels, 3, padding=1)
        self.decoder = Decoder(config.code_channels, config.level_channels, config.num_blocks, attention=True)

    def forward(self, f_hat: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [B, C_vae, h, w] -> image fp32 [B, 3, 16h, 16w] in [0, 1], pixels uint8 [B, 16h, 16w, 3]."""
        return to_image(self.decoder(self.post_quant_conv(f_hat.to(self.post_quant_conv.weight.dtype))))


class ImageEncoder(nn.Module):
    """`VQVAE.quant_conv(VQVAE.encoder(...))`: an image to features, before they are quantised."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        # The decoder has a residual block more per level.
        self.encoder = Encoder(config.code_channels, config.level_channels, config.num_blocks - 1, attention=True)
        self.quant_conv = nn.Conv2d(config.code_channels, config.code_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 16h, 16w, 3], RGB -> fp32 [B, C_vae, h, w]."""
        return self.quant_conv(self.encoder(from_pixels(pixels).to(self.quant_conv.weight.dtype))).float()


def phi_key(config: VQVAEConfig, index: int) -> str:
    """Official key prefix of one residual convolution of the quantizer."""
    middle = {"shared": "qresi.", "partially_shared": f"qresi_ls.{index}.", "non_shared": f"{index}."}[config.phi]
    return f"quantize.quant_resi.{middle}"


def expected_vae_keys(config: VQVAEConfig) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of a VQVAE, without what it leaves out."""
    with torch.device("meta"):
        parts: list[nn.Module] = [ImageDecoder(config)]
        if config.has_encoder:
            parts.append(ImageEncoder(config))
    keys = {key: tuple(tensor.shape) for part in parts for key, tensor in part.state_dict().items()}
    c = config.code_channels
    keys["quantize.embedding.weight"] = (config.vocab_size, c)
    for index in range(config.num_phi):
        keys[phi_key(config, index) + "weight"] = (c, c, 3, 3)
        keys[phi_key(config, index) + "bias"] = (c,)
    return keys


def vae_problems(config: VQVAEConfig, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from being that of such a VQVAE: `key_problems`."""
    unused = (_UNUSED,) if config.has_encoder else (_UNUSED, *_OF_ENCODER)
    return key_problems(state, expected_vae_keys(config), unused)


def check_book(config: VQVAEConfig, vocab_size: int, code_channels: int) -> None:
    """That the VQVAE's code book is that of a transformer.

    Raises:
        CheckpointError: the size in which they differ.
    """
    for what, ours in (("vocab_size", vocab_size), ("code_channels", code_channels)):
        vae = getattr(config, what)
        if ours != vae:
            raise CheckpointError(
                f"--vae: {what}: the VAE has {vae}, the transformer {ours}; give the VAE that it was trained with"
            )


def vqvae_tensors(
    vae_config: VQVAEConfig, patch_nums: tuple[int, ...], vae_state: Mapping[str, Tensor], precision: Precision
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bundle that come from the VQVAE, in the names of `models.codebook`.

    Of the precision are the convolutions of decoder and encoder. fp32 stay the code book and its convolutions (they
    accumulate in f_hat), normalisation parameters, and the interpolation matrices.
    """
    dtype = torch_dtype(precision.computed)
    yield "quantize.embedding.weight", vae_state["quantize.embedding.weight"].float()
    if vae_config.has_encoder:
        yield "quantize.closeness.bias", -0.5 * vae_state["quantize.embedding.weight"].float().square().sum(-1)
    ratio = vae_config.phi_ratio
    channels = torch.arange(vae_config.code_channels)
    for index in range(vae_config.num_phi):
        # phi(x) = (1 - r) x + r conv(x) is itself a convolution: the identity joins the kernel's centre.
        weight = vae_state[phi_key(vae_config, index) + "weight"].float() * ratio
        weight[channels, channels, 1, 1] += 1.0 - ratio
        yield f"phi.{index}.weight", weight
        yield f"phi.{index}.bias", vae_state[phi_key(vae_config, index) + "bias"].float() * ratio
    last = patch_nums[-1]
    resizes = {f"resize.bicubic_{last}_{side}": bicubic_matrix(last, side) for side in patch_nums[:-1]}
    # Scale 0 embeds the condition, not f_hat; only an encoder has a map for it.
    resized = patch_nums[0 if vae_config.has_encoder else 1 : -1]
    resizes |= {f"resize.area_{side}_{last}": area_matrix(side, last) for side in resized}
    for name, resize in resizes.items():
        yield name, resize
        yield f"{name}_t", resize.T.contiguous()
    for key in expected_vae_keys(vae_config):
        if not key.startswith("quantize."):
            is_norm = ".norm" in key
            yield key, vae_state[key].to(torch.float32 if is_norm else dtype)
