"""LoRA (arXiv 2106.09685): low-rank changes of a checkpoint's matrices, merged before it is exported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastvar_trt.export.models.checkpoint import load_state_dict, read_config
from fastvar_trt.runtime.errors import CheckpointError

_FOLDER_FILE = "adapter_model.safetensors"  # of PEFT, beside adapter_config.json
_PREFIXES = re.compile(r"^(base_model\.model\.|transformer\.|model\.)+")
# The names of the two factors in PEFT's files, and in others that keep the names of modules.
_FACTOR = re.compile(r"^(?P<matrix>.+?)\.(lora_|lora\.)(?P<factor>A|B|down|up)(\.default)?\.weight$")
_ALPHA = ".alpha"
# Of PEFT's configuration: what changes how factors are merged.
_NOT_PLAIN = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "fan_in_fan_out")


class MergedState(Mapping[str, Tensor]):
    """A state dict, `before`, with matrices changed: W + scale B A, computed when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor], changes: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
        self.before, self._changes = state, changes

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.before[key]
        if key not in self._changes:
            return tensor
        down, up, scale = self._changes[key]
        return (tensor.float() + scale * (up.float() @ down.float())).to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.before)

    def __len__(self) -> int:
        return len(self.before)


def merged(state: Mapping[str, Tensor], lora: Path, scale: float = 1.0) -> MergedState:
    """A state dict with a LoRA of it.

    Args:
        state: flat, in the official keys.
        lora: PEFT's folder, or a file: `<matrix>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], or down and up;
            `<matrix>.alpha`, or `lora_alpha` of the folder's adapter_config.json, divided by r, is a factor.
        scale: a further one.

    Raises:
        CheckpointError: a file that is none, or one of another model, by the names of its matrices.
    """
    alpha: float | None = None
    path = lora
    if lora.is_dir():
        config = read_config(lora, "--lora", "adapter_config.json")
        other = [name for name in _NOT_PLAIN if config.get(name)]
        if other:
            raise CheckpointError(f"--lora {lora}: has {other[0]}, expected plain LoRA of one rank; merge it yourself")
        alpha, path = config.get("lora_alpha"), lora / _FOLDER_FILE
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise CheckpointError(f"--lora {lora}: lora_alpha: got {alpha!r}, expected a number")
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in load_state_dict(path).items():
        found = _FACTOR.match(key)
        if found:
            part = "down" if found["factor"] in ("A", "down") else "up"
            factors.setdefault(_key(found["matrix"]), {})[part] = tensor
        elif key.endswith(_ALPHA) and tensor.numel() == 1:
            alphas[_key(key.removesuffix(_ALPHA))] = float(tensor)
        else:
            raise CheckpointError(f"--lora {lora}: key {key} is no factor of a matrix; expected plain LoRA")
    if not factors:
        raise CheckpointError(f"--lora {lora}: holds no matrix")
    changes = {}
    for key, own in factors.items():
        if set(own) != {"down", "up"} or key not in state:
            what = "one of its two factors is missing" if key in state else "this checkpoint has no such matrix"
            raise CheckpointError(f"--lora {lora}: {key}: {what}; is it of this model?")
        down, up = own["down"], own["up"]
        if down.ndim != 2 or up.ndim != 2 or 0 in down.shape:
            raise CheckpointError(f"--lora {lora}: {key}: got factors {list(up.shape)} and {list(down.shape)}")
        if (up.shape[0], down.shape[-1]) != tuple(state[key].shape) or up.shape[-1] != down.shape[0]:
            raise CheckpointError(
                f"--lora {lora}: {key}: got factors {list(up.shape)} and {list(down.shape)} of {list(state[key].shape)}"
            )
        rank = down.shape[0]
        own_alpha = alphas.get(key, rank if alpha is None else alpha)
        changes[key] = (down, up, scale * own_alpha / rank)
        if not all(torch.isfinite(factor).all() for factor in (down, up)):
            raise CheckpointError(f"--lora {lora}: {key}: has values that are not finite")
    return MergedState(state, changes)


def _key(matrix: str) -> str:
    return f"{_PREFIXES.sub('', matrix)}.weight"
