"""The target `cpu`: graphs optimised and weights prepacked once for this processor.

ONNX Runtime packs the matrices of every session into the layout of its kernels: ten sessions would hold ten packed
copies. Here each graph is optimised and packed in turn, and the packed blobs of all graphs are merged by content into
one file, which all sessions then map.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from fastvar_trt.export.build.base import Builder, Built
from fastvar_trt.export.passes.flash_attention import FlashAttention
from fastvar_trt.export.passes.integer_products import IntegerProducts
from fastvar_trt.export.passes.widen_bfloat16 import WidenBFloat16
from fastvar_trt.export.progress import Progress
from fastvar_trt.export.weights_file import check_readable
from fastvar_trt.runtime.backends.onnxruntime import CPU_TARGET, cpu_built_with, cpu_has_vnni, import_onnxruntime
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import GraphSpec

PACKED_FILE = "weights.prepacked"
_MIN_EXTERNAL_BYTES = 256  # smaller initializers stay in the graph
# Bytes. ONNX Runtime 1.32 maps packed blobs at multiples of 256 bytes and copies those at multiples of 128, once per
# session (1.23 maps all). A page is a multiple of whatever alignment follows.
_ALIGNMENT = 4096


class CpuBuilder(Builder):
    """Prepacked graphs over one file of weights."""

    folder = CPU_TARGET
    target_names = (CPU_TARGET,)
    description = "ONNX Runtime on this processor"
    shares_files = True

    def __init__(self, targets: Sequence[str] = target_names) -> None:
        super().__init__(targets)
        self._ort: Any = None
        self._offsets: dict[bytes, int] = {}  # of the packed file's blobs, by their hash

    def open(self) -> None:
        """See `Builder.open`."""
        self._ort = import_onnxruntime()
        self._offsets.clear()

    def built_with(self) -> dict[str, str]:
        """Packed weights belong to one processor and one version of ONNX Runtime."""
        return cpu_built_with(self._ort)

    def build(
        self, bundle: Path, graph: GraphSpec, targets: tuple[str, ...], scratch: Path, progress: Progress
    ) -> Built:
        """Optimise and prepack one graph; its external data goes into the merged file."""
        path = scratch / graph.file
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            packed, data = Path(folder) / "graph.onnx", "data.bin"
            self._prepack(bundle, graph, packed, data)
            model = onnx.load(packed, load_external_data=False)
            blobs = Path(folder) / data
            with (
                blobs.open("rb") if blobs.is_file() else open(os.devnull, "rb") as file,  # noqa: PTH123
                (scratch / PACKED_FILE).open("ab") as merged,
            ):
                for initializer in model.graph.initializer:
                    if initializer.data_location == onnx.TensorProto.EXTERNAL:
                        self._move_external(initializer, file, merged)
        onnx.save(model, path)
        return Built(path, (), graph.inputs, graph.outputs)

    def _prepack(self, bundle: Path, graph: GraphSpec, packed: Path, data: str) -> None:
        ort = self._ort
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(packed)
        for key, value in {
            "session.optimized_model_external_initializers_file_name": data,
            "session.optimized_model_external_initializers_min_size_in_bytes": str(_MIN_EXTERNAL_BYTES),
            "session.save_external_prepacked_constant_initializers": "1",
            "session.model_external_initializers_file_folder_path": str(bundle),
        }.items():
            options.add_session_config_entry(key, value)
        model = ir.load(bundle / graph.file)
        source: Any = str(bundle / graph.file)
        if any(node.op_type == "DequantizeLinear" for node in model.graph):  # whose matrices are written anew
            check_readable(bundle)
        # The provider has no bfloat16 kernels, would hold the scores of attention, and dequantise whole matrices.
        rewrites = (WidenBFloat16(), FlashAttention(), IntegerProducts(has_vnni=cpu_has_vnni()))
        modified = [rewrite(model).modified for rewrite in rewrites]
        if any(modified):
            written = _taken_out(model)
            options.add_external_initializers(
                list(written), [ort.OrtValue.ortvalue_from_numpy(a) for a in written.values()]
            )
            source = ir.serde.serialize_model(model).SerializeToString()
        try:
            ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"{graph.file}: ONNX Runtime could not optimise it: {error}") from error

    def _move_external(self, initializer: onnx.TensorProto, file: BinaryIO, merged: BinaryIO) -> None:
        """Copy an initializer's data and packed blobs into the merged file, and rewrite where they lie.

        ONNX Runtime writes packed data as `prepacked_<n>` = `<kernel>+<hash>|<offset>;<length>;<checksum>|...`.
        """

        def moved(offset: str, length: str) -> str:
            file.seek(int(offset))
            return str(self._append(file.read(int(length)), merged))

        entries = {entry.key: entry for entry in initializer.external_data}
        entries["offset"].value = moved(entries["offset"].value, entries["length"].value)
        entries["location"].value = PACKED_FILE
        for key, entry in entries.items():
            if key.startswith("prepacked_"):
                kernel, *places = entry.value.split("|")
                rewritten = []
                for place in places:
                    offset, length, *rest = place.split(";")
                    rewritten.append(";".join([moved(offset, length), length, *rest]))
                entry.value = "|".join([kernel, *rewritten])

    def _append(self, blob: bytes, merged: BinaryIO) -> int:
        """The blob's offset in the merged file, in which every content lies once."""
        digest = hashlib.sha256(blob).digest()
        if digest not in self._offsets:
            merged.write(b"\0" * (-merged.tell() % _ALIGNMENT))
            self._offsets[digest] = merged.tell()
            merged.write(blob)
        return self._offsets[digest]


def _taken_out(model: ir.Model) -> dict[str, NDArray[Any]]:
    """Large initializers that rewrites made, in the graph named only: protobuf holds no more than 2 GiB."""
    taken = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < _MIN_EXTERNAL_BYTES:
            continue
        taken[name] = array = tensor.numpy()
        value.const_value = ir.ExternalTensor(
            "given", 0, array.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name
        )
    return taken
