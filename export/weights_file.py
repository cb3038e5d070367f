"""The one weights file of a bundle: written tensor by tensor, referenced by every graph."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvar_trt.export.models.matrix import dtype_name
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import WEIGHTS_FILE
from fastvar_trt.runtime.precision import DTYPES
from fastvar_trt.runtime.weights import TensorPlace, plan_layout


def check_readable(folder: Path) -> None:
    """That onnx_ir reads the weights file in that folder: it refuses one of which there are several links.

    Raises:
        ExportError: there are.
    """
    if (folder / WEIGHTS_FILE).stat().st_nlink > 1:
        raise ExportError(
            f"{folder / WEIGHTS_FILE}: has several links (a model repository made by --triton?), and onnx_ir reads no "
            f"such file; build a copy of the bundle (cp -r {folder} COPY)"
        )


def external_tensor(place: TensorPlace, name: str, folder: Path) -> ir.ExternalTensor:
    """A tensor of the file in that folder, as an ONNX initializer that points into it."""
    return ir.ExternalTensor(
        WEIGHTS_FILE,
        place.offset,
        place.num_bytes,
        ir.DataType(DTYPES[place.dtype].onnx),
        shape=ir.Shape(place.shape),
        name=name,
        base_dir=folder,
    )


def write_weights(
    folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]], tensors: Iterator[tuple[str, Tensor]]
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
    header, places = plan_layout(shapes)
    missing = set(places)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            place = places[name]
            assert (tuple(tensor.shape), dtype_name(tensor.dtype)) == (place.shape, place.dtype), (name, tensor, place)
            missing.remove(name)
            if place.num_bytes:
                file.seek(place.offset)
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    assert not missing, missing
    return places


def overwrite_scalars(folder: Path, places: Mapping[str, TensorPlace], values: Mapping[str, float]) -> None:
    """Write fp32 scalars over those that the weights file has."""
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        for name, value in values.items():
            assert (places[name].shape, places[name].dtype) == ((), "float32"), (name, places[name])
            file.seek(places[name].offset)
            file.write(struct.pack("<f", value))


def map_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of `weights.safetensors`, memory-mapped."""
    return load_file(folder / WEIGHTS_FILE)
