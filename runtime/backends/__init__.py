"""Backends: a module and a line each, behind `Backend`; their packages are imported on use only."""

from __future__ import annotations

from typing import Any

from fastvar_trt.runtime.backends import onnxruntime, tensorrt
from fastvar_trt.runtime.backends.base import (
    Backend,
    BackendEntry,
    BackendOption,
    BoundGraph,
    BoundOnDemand,
    Buffer,
    CapturedChain,
    View,
)
from fastvar_trt.runtime.errors import BackendError
from fastvar_trt.runtime.registry import Registry

BACKENDS: Registry[BackendEntry] = Registry(onnxruntime.ENTRY, tensorrt.RTX, tensorrt.ENTERPRISE)
DEFAULT_BACKEND = onnxruntime.ENTRY.name

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKEND",
    "Backend",
    "BackendEntry",
    "BackendOption",
    "BoundGraph",
    "BoundOnDemand",
    "Buffer",
    "CapturedChain",
    "View",
    "create_backend",
]


def create_backend(name: str, device: str | None = None, *, profile: bool = False, **options: Any) -> Backend:
    """The backend of that name, not yet opened.

    Args:
        name: one of `BACKENDS`.
        device: where it runs; default: its own.
        profile: take the times of single operators, for `Backend.operator_times`.
        options: the backend's own; those that are None count as not given.

    Raises:
        BackendError: an unknown backend or option, or a device that it does not run on.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    entry = BACKENDS[name]
    given = {key: value for key, value in options.items() if value is not None}
    known = [option.name for option in entry.options]
    unknown = [key for key in given if key not in known]
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes no options"
        raise BackendError(f"backend {name}: takes no {unknown[0]}; {takes}")
    for option in entry.options:
        value = given.get(option.name)
        if option.choices and value is not None and value not in option.choices:
            raise BackendError(f"{option.name}: got {value!r}, expected one of {', '.join(option.choices)}")
    return entry.create(device, profile, **given)
