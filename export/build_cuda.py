"""The target `cuda`: graphs for ONNX Runtime on an NVIDIA GPU, over one device copy of the weights.

An initializer would be copied to the device once per session, so the weights become inputs, as for TensorRT.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import onnx_ir as ir

from fastvar_trt.export.folders import replace_folder, temporary_folder
from fastvar_trt.export.promotion import promote_weights
from fastvar_trt.runtime.backends.onnxruntime_cuda import CUDA_TARGET, FLAVOUR, GRAPH_VERSION
from fastvar_trt.runtime.engines import EngineRecord, engines_folder, read_engines, write_records
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, FileSpec, TensorSpec, check_files, read_manifest


@dataclasses.dataclass(frozen=True)
class BuildCudaReport:
    """What a build did; `built` is False where everything was there and fresh."""

    built: bool
    num_graphs: int
    num_bytes: int
    seconds: float


def build_cuda(bundle: Path) -> BuildCudaReport:
    """Write the graphs of a bundle with their weights as inputs.

    Args:
        bundle: its folder.

    Raises:
        BundleError: a bundle that is incomplete or damaged.
        ExportError: they cannot be written.
    """
    begin = time.perf_counter()
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=True)
    folder = engines_folder(bundle, FLAVOUR)
    known = read_engines(bundle, FLAVOUR)
    fresh = set(known) == {graph.file for graph in manifest.graphs} and not any(
        record.version != GRAPH_VERSION or record.stale_reason(manifest, folder, check_hash=True)
        for record in known.values()
    )
    records = list(known.values())
    if not fresh:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with temporary_folder(folder) as scratch:
                records = []
                for graph in manifest.graphs:
                    started = time.perf_counter()
                    model, weights = promote_weights(bundle / graph.file)
                    ir.save(model, scratch / graph.file)
                    promoted = {str(value.name): value for value in model.graph.inputs if value.name in weights}
                    records.append(
                        EngineRecord(
                            graph=graph.file,
                            file=graph.file,
                            content=FileSpec.of(scratch / graph.file),
                            flavour=FLAVOUR,
                            version=GRAPH_VERSION,
                            targets=(CUDA_TARGET,),
                            graph_sha256=manifest.files[graph.file].sha256,
                            weights_sha256=manifest.files[WEIGHTS_FILE].sha256,
                            weights=weights,
                            inputs=(*graph.inputs, *(_spec(promoted[name]) for name in weights)),
                            outputs=graph.outputs,
                            kernels={},
                            seconds=round(time.perf_counter() - started, 3),
                        )
                    )
                write_records(scratch, records)
                replace_folder(scratch, folder)
        except OSError as error:
            raise ExportError(f"{folder}: cannot be written: {error}; nothing was kept") from error
    return BuildCudaReport(
        built=not fresh,
        num_graphs=len(records),
        num_bytes=sum(record.content.num_bytes for record in records),
        seconds=time.perf_counter() - begin,
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None and value.dtype is not None
    dtype = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
    return TensorSpec(value.name, tuple(value.shape.numpy()), dtype[value.dtype])
