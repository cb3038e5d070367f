"""Typed errors. Each message says what, got against expected, and the fix; the command line shows it as is."""

from __future__ import annotations


class FastVARError(Exception):
    """Base of every error that a user can cause or mend; `exit_code` is what the commands return."""

    exit_code = 1


class PlanError(FastVARError):
    """A pruning plan that is malformed, or that does not fit the model's schedule."""


class BundleError(FastVARError):
    """A bundle that is incomplete, damaged, or of another format version."""


class RequestError(FastVARError):
    """A generation request that the bundle cannot serve (class, batch, top-k, ...)."""


class OverloadedError(FastVARError):
    """A service whose queue is full, or that is draining; the same request may succeed later."""


class CancelledError(FastVARError):
    """A request that was given up, or whose deadline has passed, before its picture was there."""


class BackendError(FastVARError):
    """A backend that is not installed, or that cannot run what the bundle holds."""


class UnavailableError(BackendError):
    """What was asked for is not on this machine: a package that is not installed, a GPU, its driver."""


class OutOfMemoryError(BackendError):
    """A device that has not so much memory free."""


class CheckpointError(FastVARError):
    """A checkpoint that cannot be read, or that is not of the model that was asked for."""


class ExportError(FastVARError):
    """An export that failed: a graph that does not match PyTorch, an output that cannot be written."""
