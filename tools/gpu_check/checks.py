"""What is right or wrong on a GPU: the kernels against the oracle, the backends against PyTorch and the CPU."""

from __future__ import annotations

import importlib.metadata
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.build.tensorrt.flavour import RTX_TARGETS
from fastvar_trt.export.exporter import add_reference
from fastvar_trt.plugins import oracle
from fastvar_trt.plugins.cuda_kernels import CacheKernels
from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.backends.cuda import CudaDevice
from fastvar_trt.runtime.errors import UnavailableError
from fastvar_trt.runtime.request import example_requests
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.tools.gpu_check.sections import Results
from fastvar_trt.tools.gpu_check.speed import check_built, torch_device

_TIMINGS = 20
_REPEATS = 20  # between two events, so that they queue up behind each other
_PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt-rtx", "tensorrt", "cuda-bindings", "onnx")
_CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
# Backend, and what `fastvar build --target` calls its target; a GPU's own where it is empty.
BACKENDS = {
    "onnxruntime": ("cuda",),
    "tensorrt_rtx": ("",),
    "tensorrt": ("current", "current+plugins"),
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
            for dtype in ("float32", "float16")
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
    x = rng.standard_normal((batch, length, channels)).astype(dtype)
    cached = rng.standard_normal((batch, num_cached, channels)).astype(dtype)
    indices = oracle.pivotal_tokens(x, keep)
    computed = oracle.gather_tokens(x, indices)
    restored = oracle.restore_tokens(computed, indices, cached, **sides)
    scratch = [np.zeros((batch, channels), np.float32), np.zeros((batch, length), np.float32)]
    results = [np.zeros_like(indices), np.zeros_like(computed), np.zeros_like(restored)]
    arrays = [x, cached, *scratch, *results]
    pointers = [device.allocate(array.nbytes) for array in arrays]
    p_x, p_cached, p_mean, p_score, p_indices, p_computed, p_restored = pointers
    device.upload(p_x, x)
    device.upload(p_cached, cached)
    p_oracle = device.allocate(indices.nbytes)
    device.upload(p_oracle, indices)
    counts = {"batch": batch, "keep": keep, "channels": channels}

    def run() -> None:
        kernels.pivotal_tokens(dtype, p_x, p_indices, p_mean, p_score, length=length, **counts)
        kernels.gather_tokens(dtype, p_x, p_oracle, p_computed, length=length, **counts)
        kernels.restore_tokens(dtype, p_computed, p_oracle, p_cached, p_restored, **counts, **sides)

    run()
    times = []
    for _ in range(_TIMINGS):
        start = device.record()
        for _ in range(_REPEATS):
            run()
        times.append(device.elapsed_ms(start, device.record()) / _REPEATS)
    for array, pointer in zip(results, pointers[-3:], strict=True):
        device.download(array, pointer)
    for pointer in (*pointers, p_oracle):
        device.free(pointer)
    # Scores within rounding of each other may change places at the cut.
    same = float((results[0] == indices).mean())
    error = float(np.abs(results[2].astype(np.float32) - restored).max())
    return {
        "map": f"{size[0]}x{size[1]} from {cached_size[0]}x{cached_size[1]}",
        "channels": channels,
        "dtype": dtype,
        "indices equal": same,
        "max error": error,
        "ms, launches included": round(statistics.median(times), 4),
        "ok": same > 0.999 and np.array_equal(results[1], computed) and error <= (1e-5 if dtype == "float32" else 4e-3),
    }


def check_backend(bundle: Path, backend: str, target: str) -> Results:
    """A GPU backend on a bundle that holds PyTorch's pictures.

    The tokens of drawn pictures against those of the CPU, on the same noise; the logits of every step against
    PyTorch's, each step given PyTorch's tokens; a second run against the first.
    """
    device = CudaDevice()
    try:
        gpu, free = device.target, device.free_bytes()
    finally:
        device.close()
    if backend == "tensorrt_rtx" and gpu not in RTX_TARGETS:
        raise UnavailableError(f"TensorRT for RTX does not build for {gpu}")
    build_targets(bundle, target or gpu)
    build_targets(bundle, "cpu")
    with Pipeline.load(bundle) as cpu:
        requests = example_requests(cpu.manifest, 2)
        expected = cpu.draw(requests)
    with Pipeline.load(bundle, backend=backend, device="cuda") as pipe:
        first, second = pipe.draw(requests), pipe.draw(requests)
        verified = verify_bundle(pipe)
        problems = pipe.capture_problems
        device = CudaDevice()
        try:
            used = free - device.free_bytes()
        finally:
            device.close()
    agreement = [float((a == b).mean()) for a, b in zip(first.tokens, expected.tokens, strict=True)]
    again = [float((a == b).mean()) for a, b in zip(first.tokens, second.tokens, strict=True)]
    errors = [step.relative_error for step in verified.steps if step.relative_error is not None]
    return [
        {
            "bundle": bundle.name,
            "target": target or gpu,
            "logits off, of the largest": max(errors, default=float("nan")),
            "tokens as on the CPU, first scales": min(agreement[:4]),
            "all scales": float(np.mean(agreement)),
            "tokens as in the first run": min(again),
            "captured": "; ".join(problems) or "yes",
            "device MiB": used >> 20,
            "verify": "; ".join(verified.failures) or "holds",
            # Kernels round differently: a near-tie may fall the other way, and later scales follow.
            "ok": not verified.failures and min(agreement[:4]) > 0.9 and min(again) == 1.0 and not problems,
        }
    ]


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
