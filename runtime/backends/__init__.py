"""Backends: one class each behind `Backend`, picked by name; their packages are imported on use only."""

from __future__ import annotations

from fastvar_trt.runtime.backends.base import Backend, BoundGraph, Buffer, View
from fastvar_trt.runtime.errors import BackendError

BACKENDS = ("onnxruntime",)

__all__ = ["BACKENDS", "Backend", "BoundGraph", "Buffer", "View", "create_backend"]


def create_backend(name: str, device: str, num_threads: int | None, engines: str) -> Backend:
    """The backend of that name, not yet opened.

    Raises:
        BackendError: an unknown backend, or a device that it does not run on.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    from fastvar_trt.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(device=device, num_threads=num_threads, engines=engines)
