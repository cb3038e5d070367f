"""The few calls of the CUDA runtime that backends need, over `cuda-python`; errors become `BackendError`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.runtime.errors import BackendError, OutOfMemoryError, UnavailableError
from fastvar_trt.runtime.precision import DTYPES

_streams: dict[int, int] = {}  # of the process, by GPU
_INSTALL = "pip install cuda-bindings (the extras gpu, rtx and tensorrt bring it)"


def gpu_name() -> str:
    """The first GPU: its name and target.

    Raises:
        UnavailableError: there is none that CUDA can use.
    """
    device = CudaDevice()
    try:
        return f"{device.name} ({device.target})"
    finally:
        device.close()


class CudaDevice:
    """One GPU and one stream on it; everything is queued on that stream.

    Args:
        ordinal: which GPU.
        one_stream: take the process's stream for this GPU, which stays, instead of one of its own.

    Attributes:
        name: as the driver says.
        target: `sm86`, ...
        driver: the CUDA version of the driver.
        stream: its address.

    Raises:
        UnavailableError: cuda-python is not installed, the driver is missing or too old, or there is no such GPU.
    """

    def __init__(self, ordinal: int = 0, *, one_stream: bool = False) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise UnavailableError(f"cuda-python cannot be imported ({error}); {_INSTALL}") from error
        self._cuda: Any = runtime
        status, count = runtime.cudaGetDeviceCount()
        if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
            driver = self._call(runtime.cudaDriverGetVersion())
            raise UnavailableError(
                f"no NVIDIA driver, or one too old: got CUDA version {driver} (thousands: the release), expected "
                f"{self._call(runtime.cudaRuntimeGetVersion())} or later; install a newer driver, or run with "
                "backend='onnxruntime'"
            )
        if status != runtime.cudaError_t.cudaSuccess:
            raise UnavailableError(f"no GPU that CUDA can use ({status.name}); run with backend='onnxruntime'")
        if not 0 <= ordinal < count:
            raise UnavailableError(f"device cuda:{ordinal}: this machine has {count} GPUs, numbered from 0")
        self._ordinal = ordinal
        self.activate()
        properties = self._call(runtime.cudaGetDeviceProperties(ordinal))
        name = properties.name
        self.name: str = name.decode() if isinstance(name, bytes) else str(name)
        self.target = f"sm{properties.major}{properties.minor}"
        self.driver = int(self._call(runtime.cudaDriverGetVersion()))
        self._owns_stream = not one_stream
        if one_stream and ordinal in _streams:
            self.stream = _streams[ordinal]
        else:
            self.stream = int(self._call(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
        if one_stream:
            _streams[ordinal] = self.stream
        self._capturing = False

    def activate(self) -> None:
        """Make this GPU the current one of the calling thread: CUDA keeps that per thread."""
        self._call(self._cuda.cudaSetDevice(self._ordinal))

    def close(self) -> None:
        """Destroy the stream; may be called twice."""
        if self.stream:
            self._cuda.cudaStreamSynchronize(self.stream)
            if self._owns_stream:
                self._cuda.cudaStreamDestroy(self.stream)
            self.stream = 0

    def free_bytes(self) -> int:
        """Free memory of the device."""
        free, _ = self._call(self._cuda.cudaMemGetInfo())
        return int(free)

    def allocate(self, num_bytes: int) -> int:
        """Zeroed memory; its address.

        Raises:
            OutOfMemoryError: there is not so much.
        """
        error, pointer = self._cuda.cudaMalloc(max(num_bytes, 1))
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemoryError(
                f"{self.name}: out of memory: {num_bytes / 2**20:.0f} MiB asked for, "
                f"{self.free_bytes() / 2**20:.0f} MiB free; use smaller batch sizes, or free the GPU"
            )
        self._call((error, pointer))
        self._call(self._cuda.cudaMemsetAsync(pointer, 0, max(num_bytes, 1), self.stream))
        return int(pointer)

    def free(self, pointer: int) -> None:
        """Give memory back."""
        self._cuda.cudaFree(pointer)

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        """Copy a C-contiguous host array to the device; returns when the array may be changed again."""
        assert array.flags.c_contiguous
        if array.nbytes:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            self._call(self._cuda.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, self.stream))
            self.synchronize()

    def download(self, array: NDArray[Any], pointer: int) -> None:
        """Fill a C-contiguous host array from the device, after all that was queued."""
        if array.nbytes:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._call(self._cuda.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, self.stream))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        self._call(self._cuda.cudaStreamSynchronize(self.stream))

    def record(self) -> Any:
        """An event at this point of the stream; inside a capture, one that every launch records anew."""
        event = self._call(self._cuda.cudaEventCreate())
        flags = self._cuda.cudaEventRecordExternal if self._capturing else self._cuda.cudaEventRecordDefault
        self._call(self._cuda.cudaEventRecordWithFlags(event, self.stream, flags))
        return event

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Milliseconds between two events; waits for the second."""
        self._call(self._cuda.cudaEventSynchronize(stop))
        return float(self._call(self._cuda.cudaEventElapsedTime(start, stop)))

    def release(self, event: Any) -> None:
        """Destroy an event."""
        self._cuda.cudaEventDestroy(event)

    def begin_capture(self) -> None:
        """What is queued from here on becomes a graph instead of running."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture(self.stream, mode))
        self._capturing = True

    def end_capture(self) -> Any:
        """The executable graph of what was queued since `begin_capture`."""
        self._capturing = False
        graph = self._call(self._cuda.cudaStreamEndCapture(self.stream))
        try:
            return self._call(self._cuda.cudaGraphInstantiate(graph, 0))
        finally:
            self._cuda.cudaGraphDestroy(graph)

    def abort_capture(self) -> None:
        """End a capture that failed, and drop what it holds; does nothing where it has ended."""
        if not self._capturing:
            return
        self._capturing = False
        _, graph = self._cuda.cudaStreamEndCapture(self.stream)
        if graph:
            self._cuda.cudaGraphDestroy(graph)

    def launch(self, graph: Any) -> None:
        """Queue a graph."""
        self._call(self._cuda.cudaGraphLaunch(graph, self.stream))

    def destroy_graph(self, graph: Any) -> None:
        """Drop an executable graph."""
        self._cuda.cudaGraphExecDestroy(graph)

    def _call(self, result: Any) -> Any:
        """The values of a call's result (error, values...).

        Raises:
            BackendError: the call failed.
        """
        error, *values = result
        if error != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(error)
            message = text.decode() if isinstance(text, bytes) else str(text)
            raise BackendError(f"CUDA: {getattr(error, 'name', error)}: {message}")
        return values[0] if len(values) == 1 else tuple(values)


def host_array(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """An array to download into; bfloat16 as its bits."""
    return np.empty(shape, dtype=DTYPES[dtype].host)
