"""The layout of a safetensors file: where each tensor lies. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from fastvar_trt.runtime.errors import BundleError
from fastvar_trt.runtime.precision import DTYPES

_HEADER_ALIGNMENT = 64  # bytes
_NAMES: Mapping[str, str] = {dtype.safetensors: dtype.name for dtype in DTYPES.values() if dtype.safetensors}


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in the file: bytes from its start, shape, and dtype of `precision.DTYPES`."""

    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str


def plan_layout(shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[bytes, dict[str, TensorPlace]]:
    """The header of a file, and the place of each tensor in it.

    Wider dtypes come first, so that every tensor is aligned to its own element size.

    Args:
        shapes: shape and dtype of every tensor.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    spans = {}
    end = 0
    for name in sorted(shapes, key=lambda name: -DTYPES[shapes[name][1]].num_bits):
        shape, dtype = shapes[name]
        num_bytes = DTYPES[dtype].bytes_of(math.prod(shape))
        entries[name] = {
            "dtype": DTYPES[dtype].safetensors,
            "shape": list(shape),
            "data_offsets": [end, end + num_bytes],
        }
        spans[name] = (end, num_bytes)
        end += num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places = {
        name: TensorPlace(len(header) + start, num_bytes, *shapes[name]) for name, (start, num_bytes) in spans.items()
    }
    return header, places


def read_layout(path: Path) -> dict[str, TensorPlace]:
    """The place of every tensor of the file that is there.

    Raises:
        BundleError: it is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        return {
            name: TensorPlace(
                offset=8 + length + entry["data_offsets"][0],
                num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                shape=tuple(entry["shape"]),
                dtype=_NAMES[entry["dtype"]],
            )
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise BundleError(f"{path}: not a readable safetensors file ({error}); export the bundle again") from error
