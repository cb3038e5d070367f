"""The CUDA kernels of the cache operator: compiled for every architecture, and run on the CPU against the oracle."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastvar_trt.plugins import oracle
from fastvar_trt.plugins.cuda_kernels import ARCHITECTURES, KERNELS, compile_kernels, kernel_source

_HARNESS = """
extern "C" {{
void run_pivotal_{name}(const {type}* x, float* mean, float* score, long long* indices, int b, int l, int c, int k) {{
    host::launch({{(c + 31) / 32, b, 1}}, {{32, kMeanRows, 1}}, [&] {{ token_mean_{name}(x, l, c, mean); }});
    host::launch({{(b * l + 7) / 8, 1, 1}}, {{32, 8, 1}}, [&] {{ token_score_{name}(x, mean, b, l, c, score); }});
    host::launch({{b, 1, 1}}, {{64, 1, 1}}, [&] {{ select_tokens(score, l, k, indices); }});
}}
void run_gather_{name}(const {type}* x, const long long* indices, {type}* out, int b, int l, int k, int c) {{
    host::launch({{k, b, 1}}, {{32, 1, 1}}, [&] {{ gather_tokens_{name}(x, indices, l, k, c, out); }});
}}
void run_restore_{name}(const {type}* y, const long long* indices, const {type}* cached, const float* residual,
                        {type}* out, float* sum, int b, int k, int c, int h, int w, int ch, int cw) {{
    host::launch({{h * w, b, 1}}, {{32, 1, 1}},
                 [&] {{ restore_tokens_{name}(y, indices, cached, k, c, h, w, ch, cw, out); }});
    host::launch({{h * w, b, 1}}, {{32, 1, 1}},
                 [&] {{ restore_tokens_add_{name}(y, indices, cached, residual, k, c, h, w, ch, cw, sum); }});
}}
}}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels as a library for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "kernels.cpp"
    harness = _HARNESS.format(name="float32", type="float") + _HARNESS.format(name="float16", type="half_t")
    header = Path(__file__).with_name("cuda_on_host.h")
    source.write_text(f'#include "{header}"\n' + kernel_source(element_types=False) + harness)
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-pthread",
        "-o",
        str(folder / "kernels.so"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


def pointers(*arrays: NDArray[Any]) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


def pivotal(kernels: Any, x: NDArray[Any], keep: int) -> NDArray[Any]:
    batch, length, channels = x.shape
    mean, score = np.zeros((batch, channels), np.float32), np.zeros((batch, length), np.float32)
    indices = np.full((batch, keep), -1, np.int64)
    getattr(kernels, f"run_pivotal_{x.dtype}")(*pointers(x, mean, score, indices), batch, length, channels, keep)
    return indices


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_pivotal_tokens(kernels: Any, dtype: str, data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 150))
    channels, keep = data.draw(st.integers(1, 40)), data.draw(st.integers(1, length))
    # Whole numbers, and as many tokens again negated: the mean is exactly 0, so scores are exact and ties abound.
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    half = rng.integers(-3, 4, size=(batch, length, channels))
    x = np.concatenate([half, -half], axis=1).astype(dtype)
    np.testing.assert_array_equal(pivotal(kernels, x, keep), oracle.pivotal_tokens(x, keep))


def test_pivotal_tokens_of_equal_tokens_are_the_first(kernels: Any) -> None:
    x = np.ones((2, 200, 8), np.float32)
    np.testing.assert_array_equal(pivotal(kernels, x, 70), np.broadcast_to(np.arange(70), (2, 70)))
    np.testing.assert_array_equal(pivotal(kernels, x, 200), np.broadcast_to(np.arange(200), (2, 200)))


def test_pivotal_tokens_of_large_activations(kernels: Any, rng: np.random.Generator) -> None:
    x = (rng.standard_normal((2, 169, 64)) * 3e4).clip(-6e4, 6e4).astype(np.float16)  # whose squares overflow fp16
    np.testing.assert_array_equal(pivotal(kernels, x, 101), oracle.pivotal_tokens(x, 101))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(4, 4, 2, 2), (5, 3, 3, 2), (6, 6, 4, 4), (2, 7, 2, 7), (3, 3, 5, 4)])
def test_gather_and_restore(
    kernels: Any, dtype: str, shape: tuple[int, int, int, int], rng: np.random.Generator
) -> None:
    h, w, cached_h, cached_w = shape
    batch, channels, length = 2, 33, h * w
    keep = max(1, length // 2)
    indices = np.sort(np.stack([rng.permutation(length)[:keep] for _ in range(batch)]), axis=1)
    x = rng.standard_normal((batch, length, channels)).astype(dtype)
    gathered = np.zeros((batch, keep, channels), dtype)
    getattr(kernels, f"run_gather_{dtype}")(*pointers(x, indices, gathered), batch, length, keep, channels)
    np.testing.assert_array_equal(gathered, oracle.gather_tokens(x, indices))

    cached = rng.standard_normal((batch, cached_h * cached_w, channels)).astype(dtype)
    residual = rng.standard_normal((batch, length, channels)).astype(np.float32)
    out, total = np.zeros_like(x), np.zeros_like(residual)
    arrays = pointers(gathered, indices, cached, residual, out, total)
    getattr(kernels, f"run_restore_{dtype}")(*arrays, batch, keep, channels, h, w, cached_h, cached_w)
    expected = oracle.restore_tokens(gathered, indices, cached, h=h, w=w, cached_h=cached_h, cached_w=cached_w)
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(total, residual + out.astype(np.float32), atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_compile(architecture: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    cubin = compile_kernels(architecture)
    assert cubin[:4] == b"\x7fELF"
    for name in KERNELS:
        assert name.encode() in cubin, name


def test_ptx_for_engines() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    ptx = compile_kernels("sm_80", ptx=True).decode()
    assert ".target sm_80" in ptx and ".visible .entry select_tokens(" in ptx
