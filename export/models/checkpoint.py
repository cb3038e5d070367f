"""Official checkpoint files of any family: reading them, and checking their keys."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvar_trt.runtime.errors import CheckpointError

_MAX_NAMED = 100  # keys of a kind in one error
_INDEX = "*.safetensors.index.json"


def load_state_dict(path: Path, nested: Sequence[str] = ()) -> dict[str, Tensor]:
    """A flat state dict from a `.pth` or `.safetensors` file or shards, memory-mapped: nothing is read until used.

    Args:
        path: the file, or a folder of safetensors shards with their index. Pickles load with `weights_only=True`, so
            they cannot run code.
        nested: the keys under which a training checkpoint keeps the model, from the outside in; one that has not the
            first of them is taken for the state dict itself.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no state dict.
    """
    if path.is_dir():
        return _load_shards(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path}: holds more than tensors, or is damaged, and is not loaded: {_first_line(error)}"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: not a readable PyTorch file: {_first_line(error)}") from error
    if nested and isinstance(state, Mapping) and isinstance(state.get(nested[0]), Mapping):
        for key in nested:
            state = state.get(key) if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"checkpoint {path}: got no flat state dict, expected tensors by name (or the official training checkpoint)"
        )
    return dict(state)


def read_config(folder: Path, option: str, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of a Hugging Face folder.

    Args:
        folder: the folder.
        option: that named it, for errors.
        name: of the file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{option} {folder}: {name} is missing; give the folder as it was published")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{option} {folder}: {name} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{option} {folder}: {name}: got a JSON {type(data).__name__}, expected an object")
    return data


def load_folder(folder: Path) -> dict[str, Tensor]:
    """The state dict of a Hugging Face folder: safetensors, shards or not, or `pytorch_model.bin`.

    Raises:
        CheckpointError: none of them, or damaged.
    """
    has_safetensors = any(folder.glob("*.safetensors"))
    return load_state_dict(folder if has_safetensors else folder / "pytorch_model.bin", ("state_dict",))


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: not a readable safetensors file: {error}") from error


def _load_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of safetensors files, by its index where there is one."""
    indices = sorted(folder.glob(_INDEX))
    if len(indices) > 1:
        raise CheckpointError(f"checkpoint {folder}: got {len(indices)} files {_INDEX}, expected one")
    if indices:
        try:
            weight_map = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {indices[0]}: not a readable index of shards: {error}") from error
    else:
        weight_map, files = None, sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"checkpoint {folder}: no safetensors files in it")
    state: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder}: the shard {name} of its index is missing; copy it again")
        state |= _load_safetensors(folder / name)
    missing = [key for key in weight_map or () if key not in state]
    if missing:
        raise CheckpointError(f"checkpoint {folder}: {missing[0]} of its index is in no shard; copy it again")
    return state


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def key_problems(
    state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], unused: Sequence[str]
) -> list[str]:
    """What keeps the state dict from having exactly the expected keys and shapes, `unused` ones aside; keys by name."""
    missing = [key for key in expected if key not in state]
    ignored = {key for key in state if any(u in key if u[0] == "." else key.startswith(u) for u in unused)}
    unexpected = [key for key in state if key not in expected and key not in ignored]
    wrong = [
        f"{key} (got {list(state[key].shape)}, expected {list(shape)})"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    return [
        f"{len(keys)} {what}: {', '.join(keys[:_MAX_NAMED])}{', ...' if len(keys) > _MAX_NAMED else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", wrong))
        if keys
    ]


def tensor_of(state: Mapping[str, Tensor], key: str, kind: str, *, num_axes: int) -> Tensor:
    """A tensor that sizes are read from."""
    if key not in state:
        some = ", ".join(list(state)[:3])
        raise CheckpointError(f"not {kind}: key {key} is missing (the file has {some}, ...)")
    if state[key].ndim != num_axes:
        raise CheckpointError(f"not {kind}: {key}: got shape {list(state[key].shape)}, expected {num_axes} axes")
    return state[key]


def count_indices(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest index that the pattern finds at the start of a key; 0 where it finds none."""
    found = (re.match(pattern, key) for key in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def check_keys(
    problems_by_option: Mapping[str, Sequence[str]],
) -> None:
    """That nothing was found at fault in any of the state dicts.

    Args:
        problems_by_option: the option that named the file -> its `key_problems`.

    Raises:
        CheckpointError: one error that names the keys at fault in all of them.
    """
    found = {option: problems for option, problems in problems_by_option.items() if problems}
    if found:
        raise CheckpointError(
            "the keys are not those of the model; "
            + "; ".join(f"{option}: {'; '.join(problems)}" for option, problems in found.items())
        )
