"""Backends: one class each behind `Backend`, picked by name; their packages are imported on use only."""

from __future__ import annotations

from fastvar_trt.runtime.backends.base import Backend, BoundGraph, Buffer, CapturedChain, View
from fastvar_trt.runtime.errors import BackendError

BACKENDS = ("onnxruntime", "tensorrt_rtx", "tensorrt")

__all__ = ["BACKENDS", "Backend", "BoundGraph", "Buffer", "CapturedChain", "View", "create_backend"]


def create_backend(
    name: str, device: str | None, num_threads: int | None, engines: str, capture: bool | None = None
) -> Backend:
    """The backend of that name, not yet opened.

    Raises:
        BackendError: an unknown backend, or a device that it does not run on.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if name != "onnxruntime":
        from fastvar_trt.runtime.backends.tensorrt import TensorRTBackend

        if num_threads is not None or engines == "off":
            raise BackendError(f"backend {name}: takes neither num_threads nor engines='off'; leave them out")
        return TensorRTBackend(name, device=device or "cuda", capture=capture is not False)
    if device is not None and device.startswith("cuda"):
        from fastvar_trt.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        if num_threads is not None or engines == "off":
            raise BackendError(
                f"backend {name} on {device}: takes neither num_threads nor engines='off'; leave them out"
            )
        return OnnxRuntimeCudaBackend(device=device, capture=capture is True)
    from fastvar_trt.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(device=device or "cpu", num_threads=num_threads, engines=engines)
