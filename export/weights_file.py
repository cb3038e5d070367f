"""The one weights file of a bundle: written tensor by tensor, referenced by every graph."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvar_trt.runtime.manifest import WEIGHTS_FILE

_SAFETENSORS_DTYPE: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_IR_DTYPE: Mapping[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
}
_HEADER_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in the file."""

    offset: int  # bytes from the start of the file
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def external(self, name: str, folder: Path) -> ir.ExternalTensor:
        """The tensor as an ONNX initializer that points into the file."""
        return ir.ExternalTensor(
            WEIGHTS_FILE,
            self.offset,
            self.num_bytes,
            _IR_DTYPE[self.dtype],
            shape=ir.Shape(self.shape),
            name=name,
            base_dir=folder,
        )


def layout(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[bytes, dict[str, TensorPlace]]:
    """The header of a safetensors file and the place of each tensor in it.

    Wider dtypes come first, so that every tensor is aligned to its own element size.
    """
    ordered = sorted(shapes, key=lambda name: -shapes[name][1].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    spans = {}
    end = 0
    for name in ordered:
        shape, dtype = shapes[name]
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": _SAFETENSORS_DTYPE[dtype],
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


def write_weights(
    folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Iterator[tuple[str, Tensor]]
) -> dict[str, TensorPlace]:
    """Write `weights.safetensors` tensor by tensor, so that memory holds one of them at a time.

    `safetensors.torch.save_file` needs all of them at once: at a change of precision, a second checkpoint.

    Args:
        folder: where to write.
        shapes: shape and dtype of every tensor.
        tensors: the tensors, in any order.

    Returns:
        the place of each tensor.
    """
    header, places = layout(shapes)
    missing = set(places)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            place = places[name]
            assert tuple(tensor.shape) == place.shape and tensor.dtype == place.dtype, (name, tensor.shape, place)
            missing.remove(name)
            if place.num_bytes:
                file.seek(place.offset)
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    assert not missing, missing
    return places


def read_layout(folder: Path) -> dict[str, TensorPlace]:
    """The place of every tensor in the `weights.safetensors` that is there."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    dtypes = {name: dtype for dtype, name in _SAFETENSORS_DTYPE.items()}
    return {
        name: TensorPlace(
            offset=8 + length + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
            dtype=dtypes[entry["dtype"]],
        )
        for name, entry in entries.items()
    }


def map_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of `weights.safetensors`, memory-mapped."""
    return load_file(folder / WEIGHTS_FILE)
