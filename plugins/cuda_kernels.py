"""The CUDA kernels of the cache operator: their source, compiled by NVRTC, which needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvar_trt.runtime.errors import BackendError

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
        BackendError: NVRTC is not installed or refuses the source; with its log.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BackendError(
            f"NVRTC cannot be imported ({error}); pip install 'cuda-bindings' 'nvidia-cuda-nvrtc'"
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
