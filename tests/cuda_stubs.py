"""CUDA libraries that compute nothing, so that the real onnxruntime-gpu loads and runs on a machine without a GPU.

    python cuda_stubs.py SITE OUT

writes them into OUT for the wheel that lies in SITE, with the headers of nvidia-cuda-runtime beside it. Needs g++ and
binutils. Which libraries and functions there must be is read from the wheel; `stubs/cuda.cpp` has those that do
something, all others return 0 and are counted.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parent / "stubs" / "cuda.cpp"
_LIBRARY = re.compile(r"\[(lib(cudart|cublas|cublasLt|curand|cuda)\.so\.\d+)\]")
_UNDEFINED = re.compile(r"^\s+U (\w+)(?:@(\S+))?$", re.MULTILINE)
_DRIVER_FUNCTION = re.compile(r"^cu[A-Z]")  # of libcuda, whose symbols have no version


def provider(site: Path) -> Path:
    """The CUDA provider of an installed onnxruntime-gpu."""
    return site / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"


def needed_functions(library: Path) -> dict[str, set[str]]:
    """Library -> functions that the provider takes from it; cuDNN's it looks up by name when it is loaded."""
    libraries = {found[0] for found in _LIBRARY.findall(_run("readelf", "-d", str(library)))}
    functions: dict[str, set[str]] = {name: set() for name in libraries}
    for name, version in _UNDEFINED.findall(_run("nm", "-D", "--undefined-only", str(library))):
        if version in libraries:
            functions[version].add(name)
        elif _DRIVER_FUNCTION.match(name):
            functions["libcuda.so.1"].add(name)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cudnn = {name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", data)}
    return {**functions, "libcudnn.so.9": cudnn}


def build(site: Path, out: Path) -> None:
    """Write the libraries."""
    include = next(site.glob("nvidia/**/cuda_runtime_api.h")).parent
    out.mkdir(parents=True, exist_ok=True)
    functions = needed_functions(provider(site))
    by_hand = set(re.findall(r"^(?:\w[\w* ]* \*{0,2}|CREATE(?:_KIND)?\()(\w+)\(?", SOURCE.read_text(), re.MULTILINE))
    cudart = next(name for name in functions if name.startswith("libcudart"))
    for name in sorted(functions, key=lambda name: name != cudart):  # which the others count with
        source = out / f"{name}.cpp"
        rest = sorted(functions[name] - by_hand)
        lines = [f'extern "C" long {function}() {{ return stub_count("{function}"), 0; }}' for function in rest]
        source.write_text("\n".join(['extern "C" void stub_count(const char* name);', *lines]) + "\n")
        versions = out / f"{name}.map"
        versions.write_text(f"{name} {{ global: *; }};\n")
        kind = name.removeprefix("lib").partition(".")[0].upper()
        options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{include}", f"-DLIB_{kind}"]
        linked = [] if name == cudart else [str(out / cudart)]
        _run("g++", *options, "-o", str(out / name), str(SOURCE), str(source), f"-Wl,-soname,{name}",
             f"-Wl,--version-script={versions}", *linked)  # fmt: skip


class Stubs:
    """The libraries, loaded in this process; before onnxruntime is imported."""

    def __init__(self, folder: Path) -> None:
        libraries = sorted(folder.glob("lib*.so.*[0-9]"), key=lambda path: not path.name.startswith("libcudart"))
        loaded = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in libraries]
        self._cudart = loaded[0]
        self._cudart.stub_stop.restype = ctypes.c_char_p

    def start(self) -> None:
        """Count from here on."""
        self._cudart.stub_start()

    def stop(self) -> dict[str, int]:
        """What was counted."""
        counts: dict[str, int] = defaultdict(int)
        for line in self._cudart.stub_stop().decode().splitlines():
            count, _, name = line.partition(" ")
            counts[name] += int(count)
        return counts


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
