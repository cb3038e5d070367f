"""The CUDA kernels of the cache operator: their source, compiled by NVRTC, which needs no GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from fastvar_trt.runtime.errors import BackendError, UnavailableError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
_DTYPES = ("float32", "float16", "bfloat16")
KERNELS = (
    "select_tokens",
    *(
        f"{name}_{dtype}"
        for name in ("token_mean", "token_score", "gather_tokens", "restore_tokens", "restore_tokens_add")
        for dtype in _DTYPES
    ),
)
_FOLDER = Path(__file__).parent / "cuda"


def kernel_source(*, element_types: bool = True) -> str:
    """The CUDA C++ source.

    Args:
        element_types: with the conversions between element types; without, whoever compiles it brings them.
    """
    files = ["element_types.cu"] * element_types + ["cache_operator.cu"]
    return "\n".join((_FOLDER / file).read_text(encoding="utf-8") for file in files)


def compile_kernels(architecture: str, *, ptx: bool = False) -> bytes:
    """Compile all kernels.

    Args:
        architecture: one of `ARCHITECTURES`.
        ptx: PTX, which later architectures load as well, instead of a cubin.

    Returns:
        the cubin or the PTX.

    Raises:
        UnavailableError: NVRTC is not installed.
        BackendError: it refuses the source; with its log.
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the bindings look for the library when it is first used
    except (ImportError, RuntimeError) as error:
        raise UnavailableError(
            f"NVRTC cannot be loaded ({error}); pip install 'cuda-bindings' 'nvidia-cuda-nvrtc'"
        ) from error

    def call(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BackendError(f"NVRTC: {status.name} for {architecture}")
        return values[0] if values else None

    virtual = architecture.replace("sm_", "compute_")
    options = [b"--std=c++17", f"--gpu-architecture={virtual if ptx else architecture}".encode()]
    program = call(nvrtc.nvrtcCreateProgram(kernel_source().encode(), b"cache_operator.cu", 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(call(nvrtc.nvrtcGetProgramLogSize(program)))
        call(nvrtc.nvrtcGetProgramLog(program, log))
        raise BackendError(f"NVRTC refused the kernels for {architecture}: {log.decode(errors='replace')}")
    size, read = (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if ptx else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    data = bytearray(call(size(program)))
    # The bindings fill a `bytes` object in place.
    result = bytes(data)
    call(read(program, result))
    call(nvrtc.nvrtcDestroyProgram(program))
    return result.rstrip(b"\0") if ptx else result


class CacheKernels:
    """The kernels, loaded on a GPU; pointers are device addresses, layouts as in `plugins.oracle`.

    Args:
        architecture: of the GPU, one of `ARCHITECTURES`.
        stream: that the kernels are queued on; the CUDA context must be current.

    Raises:
        UnavailableError: NVRTC is not installed, or there is no driver.
        BackendError: the driver refuses the kernels.
    """

    def __init__(self, architecture: str, stream: int) -> None:
        from cuda.bindings import driver

        self._driver: Any = driver
        self._stream = stream
        self._functions: dict[str, Any] = {}
        image = compile_kernels(architecture)
        try:
            self._module = self._call(driver.cuModuleLoadData(image))
        except RuntimeError as error:  # the bindings look for the library when it is first used
            raise UnavailableError(f"no NVIDIA driver ({error})") from error

    def close(self) -> None:
        """Unload the kernels."""
        self._call(self._driver.cuModuleUnload(self._module))

    def pivotal_tokens(
        self,
        dtype: str,
        x: int,
        indices: int,
        mean: int,
        score: int,
        *,
        batch: int,
        length: int,
        channels: int,
        keep: int,
    ) -> None:
        """x [B, L, C] -> indices int64 [B, K]; mean fp32 [B, C] and score fp32 [B, L] are scratch."""
        self._launch(f"token_mean_{dtype}", (-(-channels // 32), batch), (32, 16), (x,), (length, channels), mean)
        self._launch(
            f"token_score_{dtype}", (-(-batch * length // 8), 1), (32, 8), (x, mean), (batch, length, channels), score
        )
        self._launch("select_tokens", (batch, 1), (1024, 1), (score,), (length, keep), indices)

    def gather_tokens(
        self, dtype: str, x: int, indices: int, out: int, *, batch: int, length: int, keep: int, channels: int
    ) -> None:
        """Rows of x [B, L, C] at indices [B, K] -> out [B, K, C]."""
        self._launch(f"gather_tokens_{dtype}", (keep, batch), (128, 1), (x, indices), (length, keep, channels), out)

    def restore_tokens(
        self,
        dtype: str,
        computed: int,
        indices: int,
        cached: int,
        out: int,
        *,
        batch: int,
        keep: int,
        channels: int,
        h: int,
        w: int,
        cached_h: int,
        cached_w: int,
        residual: int | None = None,
    ) -> None:
        """Computed [B, K, C] over the area-interpolated cache -> out [B, h*w, C].

        With a residual, fp32 [B, h*w, C], `out` is fp32 and has it added.
        """
        sizes = (keep, channels, h, w, cached_h, cached_w)
        if residual is None:
            self._launch(f"restore_tokens_{dtype}", (h * w, batch), (128, 1), (computed, indices, cached), sizes, out)
        else:
            inputs = (computed, indices, cached, residual)
            self._launch(f"restore_tokens_add_{dtype}", (h * w, batch), (128, 1), inputs, sizes, out)

    def _launch(
        self,
        name: str,
        grid: tuple[int, int],
        block: tuple[int, int],
        inputs: tuple[int, ...],
        sizes: tuple[int, ...],
        output: int,
    ) -> None:
        if name not in self._functions:
            self._functions[name] = self._call(self._driver.cuModuleGetFunction(self._module, name.encode()))
        values = (*inputs, *sizes, output)
        types = (*(ctypes.c_void_p for _ in inputs), *(ctypes.c_int for _ in sizes), ctypes.c_void_p)
        self._call(
            self._driver.cuLaunchKernel(self._functions[name], *grid, 1, *block, 1, 0, self._stream, (values, types), 0)
        )

    def _call(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"CUDA driver: {status.name}")
        return values[0] if values else None
