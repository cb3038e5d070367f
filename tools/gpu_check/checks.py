"""What is right or wrong on a GPU: the kernels against the oracle, the backends against PyTorch and the CPU."""

from __future__ import annotations

import importlib.metadata
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.build.tensorrt.flavour import RTX_TARGETS
from fastvar_trt.export.exporter import add_reference
from fastvar_trt.plugins import oracle
from fastvar_trt.plugins.cuda_kernels import CacheKernels
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.backends.cuda import CudaDevice
from fastvar_trt.runtime.chain import compare_tokens
from fastvar_trt.runtime.errors import UnavailableError
from fastvar_trt.runtime.request import example_requests
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.tools.gpu_check.sections import Results
from fastvar_trt.tools.gpu_check.speed import check_built, torch_device

_TIMINGS = 20
_REPEATS = 20  # between two events, so that they queue up behind each other
# Dtype -> largest error of what is restored.
_ERRORS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}
_PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt-rtx", "tensorrt", "cuda-bindings", "onnx")
_CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
# Backend, and what `fastvar build --target` calls its targets; this GPU where empty. Engines of the last one stay.
BACKENDS = {
    "onnxruntime": ("cuda",),
    "tensorrt_rtx": ("",),
    "tensorrt": ("current+plugins", "current"),
}


def check_gpu() -> Results:
    """The GPU, its clocks now, and the versions of what runs on it."""
    device = CudaDevice()
    try:
        row = {
            "gpu": device.name,
            "target": device.target,
            "free MiB": device.free_bytes() >> 20,
            "CUDA": device.driver,
        }
    finally:
        device.close()
    for package in _PACKAGES:
        try:
            row[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            row[package] = "-"
    return [row | clocks()]


def clocks() -> dict[str, str]:
    """What `nvidia-smi` says of clocks, power and temperature; nothing where it is not installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    values = [value.strip() for value in (done.stdout.splitlines() or [""])[0].split(",")]
    return dict(zip(_CLOCKS, values, strict=True)) if len(values) == len(_CLOCKS) else {}


def check_kernels() -> Results:
    """The CUDA kernels of the cache operator against the numpy oracle, and their times."""
    device = CudaDevice()
    kernels = CacheKernels(device.target.replace("sm", "sm_"), device.stream)
    maps = (
        ((13, 13), (10, 10), 256),
        ((16, 16), (10, 10), 1024),
        ((32, 32), (18, 18), 1024),
        ((64, 64), (40, 40), 2048),
        ((27, 48), (18, 32), 2048),
    )
    try:
        return [
            _check_kernels_once(device, kernels, size, cached, channels, dtype)
            for size, cached, channels in maps
            for dtype in _ERRORS
        ]
    finally:
        kernels.close()
        device.close()


def _check_kernels_once(
    device: CudaDevice,
    kernels: CacheKernels,
    size: tuple[int, int],
    cached_size: tuple[int, int],
    channels: int,
    dtype: str,
) -> dict[str, Any]:
    """Selection, then gather and restore on the oracle's own indices: near-ties in the scores cannot hide them."""
    rng = np.random.default_rng(0)
    batch, length, num_cached = 2, size[0] * size[1], cached_size[0] * cached_size[1]
    keep = length // 2
    sides = {"h": size[0], "w": size[1], "cached_h": cached_size[0], "cached_w": cached_size[1]}
    x, cached = (_rounded(rng.standard_normal((batch, n, channels)), dtype) for n in (length, num_cached))
    residual = rng.standard_normal((batch, length, channels)).astype(np.float32)
    indices = oracle.pivotal_tokens(x, keep)
    computed = oracle.gather_tokens(x, indices)
    restored = oracle.restore_tokens(computed, indices, cached, **sides)

    def of_dtype(values: NDArray[Any]) -> NDArray[Any]:
        return _to_device(values, dtype)

    inputs = [of_dtype(x), of_dtype(cached), residual, indices]
    scratch = [np.zeros((batch, channels), np.float32), np.zeros((batch, length), np.float32)]
    results = [
        np.zeros_like(indices),
        *(of_dtype(np.zeros_like(y)) for y in (computed, restored)),
        np.zeros_like(residual),
    ]
    arrays = [*inputs, *scratch, *results]
    pointers = [device.allocate(array.nbytes) for array in arrays]
    p_x, p_cached, p_residual, p_oracle, p_mean, p_score, p_indices, p_computed, p_restored, p_sum = pointers
    for array, pointer in zip(inputs, pointers, strict=False):
        device.upload(pointer, np.ascontiguousarray(array))
    counts = {"batch": batch, "keep": keep, "channels": channels}

    def run() -> None:
        kernels.pivotal_tokens(dtype, p_x, p_indices, p_mean, p_score, length=length, **counts)
        kernels.gather_tokens(dtype, p_x, p_oracle, p_computed, length=length, **counts)
        kernels.restore_tokens(dtype, p_computed, p_oracle, p_cached, p_restored, **counts, **sides)
        kernels.restore_tokens(dtype, p_computed, p_oracle, p_cached, p_sum, **counts, **sides, residual=p_residual)

    run()
    times = []
    for _ in range(_TIMINGS):
        start = device.record()
        for _ in range(_REPEATS):
            run()
        times.append(device.elapsed_ms(start, device.record()) / _REPEATS)
    for array, pointer in zip(results, pointers[-4:], strict=True):
        device.download(array, pointer)
    for pointer in pointers:
        device.free(pointer)
    # Scores within rounding of each other may change places at the cut.
    same = float((results[0] == indices).mean())
    got = [from_device(values, dtype) for values in results[1:3]]
    error = float(np.abs(got[1] - restored.astype(np.float32)).max())
    error = max(error, float(np.abs(results[3] - (residual + restored.astype(np.float32))).max()))
    gathered = np.array_equal(got[0], computed.astype(np.float32))
    return {
        "map": f"{size[0]}x{size[1]} from {cached_size[0]}x{cached_size[1]}",
        "channels": channels,
        "dtype": dtype,
        "indices equal": same,
        "max error": error,
        "ms, launches included": round(statistics.median(times), 4),
        "ok": same > 0.999 and gathered and error <= _ERRORS[dtype],
    }


def _rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values that the dtype can hold; of bfloat16, which numpy does not know, as float32."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    return from_device(_to_device(values.astype(np.float32), dtype), dtype)


def _to_device(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """As they lie in device memory; bfloat16 as its bits, cut off."""
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values


def from_device(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def build(bundle: Path, backend: str, target: str) -> Results:
    """What a backend loads of a bundle."""
    device = CudaDevice()
    gpu = device.target
    device.close()
    if backend == "tensorrt_rtx" and gpu not in RTX_TARGETS:
        raise UnavailableError(f"TensorRT for RTX does not build for {gpu}")
    (report,) = build_targets(bundle, target or gpu)
    return [{"bundle": bundle.name, "target": target or gpu, "graphs": len(report.built), "s": report.seconds}]


def check_backend(bundle: Path, backend: str) -> Results:
    """A GPU backend on a bundle that holds PyTorch's pictures, captured and not.

    The tokens of drawn pictures against those of the CPU, on the same noise; the logits of every step against
    PyTorch's, each step given PyTorch's tokens; a second run against the first.
    """
    check_built(bundle, backend)
    build_targets(bundle, "cpu")
    with Pipeline.load(bundle) as cpu:
        requests = example_requests(cpu.manifest, 2)
        expected = cpu.draw(requests)
        tolerance = cpu.manifest.own_precision.tolerance
    results = []
    for capture in (False, True):
        device = CudaDevice()
        try:
            free = device.free_bytes()
            with Pipeline.load(bundle, backend=backend, device="cuda", capture=capture) as pipe:
                first, second = pipe.draw(requests), pipe.draw(requests)
                verified = verify_bundle(pipe)
                problems = pipe.capture_problems
                used = free - device.free_bytes()
        finally:
            device.close()
        off_cpu, _ = compare_tokens(first.tokens, expected.tokens, tolerance)
        off_first, same = compare_tokens(second.tokens, first.tokens, tolerance)
        errors = [step.relative_error for step in verified.steps if step.relative_error is not None]
        results.append(
            {
                "bundle": bundle.name,
                "captured": "; ".join(problems) or ("yes" if capture else "no"),
                "logits off, of the largest": max(errors, default=float("nan")),
                "verify": "; ".join(verified.failures) or "holds",
                "tokens, CPU": off_cpu or "as there, up to rounding",
                "tokens, second run": off_first or ("the same" if same else "the same up to rounding"),
                "device MiB": used >> 20,
                "ok": not (verified.failures or off_cpu or off_first or problems),
            }
        )
    return results


def draw_known_answers(bundle: Path) -> Results:
    """Let PyTorch on the GPU draw what a bundle's graphs are compared with."""
    add_reference(bundle, torch_device())
    return [{"bundle": bundle.name}]


def check_logits(bundle: Path, backend: str) -> Results:
    """The logits of every step against PyTorch's on this GPU, each step given PyTorch's tokens."""
    check_built(bundle, backend)
    with Pipeline.load(bundle, backend=backend, device="cuda", check="size") as pipe:
        verified = verify_bundle(pipe)
    return [
        {
            "backend": backend,
            "step": step.scale,
            "logits off": step.logits_error,
            "of the largest": step.relative_error,
            "tokens equal": step.token_agreement,
            "ok": not verified.failures,
        }
        for step in verified.steps
    ]
