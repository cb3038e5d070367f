"""How fast a model is on a GPU: every backend, captured and not, and PyTorch, taking turns.

One variant is in memory at a time, in a process of its own: a round loads, warms up, times and ends each in turn.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastvar_trt.runtime import Pipeline
from fastvar_trt.runtime.backends.cuda import CudaDevice
from fastvar_trt.runtime.backends.onnxruntime_cuda import FLAVOUR as CUDA_FOLDER
from fastvar_trt.runtime.engines import read_engines
from fastvar_trt.runtime.errors import BackendError, UnavailableError
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.request import example_requests
from fastvar_trt.tools.gpu_check.models import DENSE_LABEL
from fastvar_trt.tools.gpu_check.sections import Results

_WARM_UPS = 3
_COLUMNS = (
    "variant",
    "ms",
    "of PyTorch eager",
    "load, first time s",
    "load, later s",
    "first image s",
    "device MiB",
    "rounds",
    "by graph ms",
    "skipped",
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to draw with one plan.

    Attributes:
        name: for people.
        bundle: whose plan and weights.
        backend: of `runtime.backends`; empty for PyTorch.
        capture: as a CUDA graph; of PyTorch: compiled.
        kernel_cache: where TensorRT for RTX keeps compiled kernels: the first load of a variant finds none.
    """

    name: str
    bundle: Path
    backend: str
    capture: bool
    kernel_cache: Path


def variants_of(bundles: dict[str, Path], kernels: Path) -> list[Variant]:
    """All ways to draw, in the order of their turns: what ratios are to first, what has to be compiled last.

    Args:
        bundles: by the names of their plans.
        kernels: a folder for compiled kernels.
    """
    labels = sorted(bundles, key=lambda label: label != DENSE_LABEL)
    theirs = {
        how: [Variant(f"PyTorch {how}, {label}", bundles[label], "", how == "compiled", kernels) for label in labels]
        for how in ("eager", "compiled")
    }
    ours = [
        Variant(
            f"{backend}{', captured' if capture else ''}, {label}",
            bundles[label],
            backend,
            capture,
            kernels / f"{label}_{capture}",
        )
        for label in labels
        for backend in ("tensorrt_rtx", "tensorrt", "onnxruntime")
        for capture in (True, False)
    ]
    return [*theirs["eager"], *ours, *theirs["compiled"]]


def time_variant(variant: Variant, runs: int) -> Results:
    """One round of a variant.

    Returns:
        one row: seconds until it is loaded and until its first image, ms of every run, ms by graph, and the device
        memory that it holds then.

    Raises:
        UnavailableError: it cannot run on this machine.
    """
    device = CudaDevice()
    try:
        free = device.free_bytes()
        begin = time.perf_counter()
        with _opened(variant) as draw:
            load_s = time.perf_counter() - begin
            draw()
            first_s = time.perf_counter() - begin
            for _ in range(_WARM_UPS):
                draw()
            times, by_graph = [], {}
            for _ in range(runs):
                begin = time.perf_counter()
                by_graph = draw()
                times.append((time.perf_counter() - begin) * 1e3)
            used = free - device.free_bytes()
    finally:
        device.close()
    return [{"load_s": load_s, "first_s": first_s, "ms": times, "by_graph_ms": by_graph, "device_bytes": used}]


@contextmanager
def _opened(variant: Variant) -> Iterator[Callable[[], dict[str, float]]]:
    """A call that draws one image, to the host, and gives the times of its graphs where they are known."""
    if not variant.backend:
        yield _pytorch(variant.bundle, compiled=variant.capture)
        return
    check_built(variant.bundle, variant.backend)
    options: dict[str, Any] = {"capture": variant.capture}
    if variant.backend.startswith("tensorrt"):
        options["kernel_cache"] = str(variant.kernel_cache)
    with Pipeline.load(variant.bundle, backend=variant.backend, device="cuda", check="size", **options) as pipe:
        requests = example_requests(pipe.manifest, 1)
        yield lambda: pipe.draw(requests).timings
        if pipe.capture_problems:
            raise BackendError("; ".join(pipe.capture_problems))


def check_built(bundle: Path, backend: str) -> None:
    """That there is something for a backend to run.

    Raises:
        UnavailableError: nothing was built, because this machine cannot.
    """
    if not read_engines(bundle, CUDA_FOLDER if backend == "onnxruntime" else backend).records:
        raise UnavailableError(f"nothing could be built for {backend} on this machine")


def _pytorch(bundle: Path, *, compiled: bool) -> Callable[[], dict[str, float]]:
    """One image by PyTorch on the GPU, decoder and copy to the host included.

    The same plan, so FastVAR where it prunes, with everything on the device; flash attention in half precision.
    """
    import torch

    from fastvar_trt.export.exporter import load_bundle_model
    from fastvar_trt.export.models.reference import default_request, generate

    device = torch_device()
    model, manifest = load_bundle_model(bundle, hashes=False)  # as the others are loaded
    model = model.to(device)
    plan = manifest.resolved_plan
    noise = {
        scale: torch.from_numpy(uniform_noise(0, scale, model.token_spec(scale)[0]))[None].to(device)
        for scale in plan.steps
    }
    request = default_request(model, 1, greedy=False, device=device)
    inputs = {name: tensor.to(device) for name, tensor in model.example_condition(1).items()}
    if compiled:
        # Block by block: a scale's blocks are one graph each, where a whole step would take minutes to compile.
        torch._dynamo.config.cache_size_limit = 4 * len(plan.steps)
        model.run_block = torch.compile(model.run_block, dynamic=False)  # type: ignore[method-assign]
    backends = torch.nn.attention.SDPBackend
    half = manifest.precision != "fp32" and device.type == "cuda"
    # Cross-attention is masked, which flash attention does not take.
    kernels = [backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION] if half else [backends.MATH]

    def draw() -> dict[str, float]:
        with torch.inference_mode(), torch.nn.attention.sdpa_kernel(kernels, set_priority=True):
            model.decode(generate(model, plan, inputs, noise, request).f_hat)[1].cpu()
        return {}

    return draw


def torch_device() -> Any:
    """The GPU as PyTorch sees it.

    Raises:
        UnavailableError: it sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError("PyTorch sees no GPU; install a CUDA build of torch")
    return torch.device("cuda")


def summary(rounds: dict[str, list[dict[str, Any]]], skipped: dict[str, str]) -> Results:
    """A row per variant: medians over all runs of all rounds; what was skipped, with the reason.

    Ratios are to PyTorch eager, dense, of the same round where it ran.
    """
    base = rounds.get(f"PyTorch eager, {DENSE_LABEL}")
    results: Results = []
    for name, rows in rounds.items():
        times = [ms for row in rows for ms in row["ms"]]
        ratio = "-"
        if base is not None:
            pairs = zip(base, rows, strict=False)
            ratio = (
                f"{statistics.median(statistics.median(b['ms']) / statistics.median(r['ms']) for b, r in pairs):.2f}"
            )
        results.append(
            {
                "variant": name,
                "ms": round(statistics.median(times), 2),
                "of PyTorch eager": ratio,
                "load, first time s": round(rows[0]["load_s"], 2),
                "load, later s": round(rows[-1]["load_s"], 2) if len(rows) > 1 else "-",
                "first image s": round(rows[0]["first_s"], 2),
                "device MiB": rows[-1]["device_bytes"] >> 20,
                "rounds": len(rows),
                "by graph ms": rows[-1]["by_graph_ms"],
                "skipped": "",
            }
        )
    skips = [dict.fromkeys(_COLUMNS, "-") | {"variant": name, "skipped": reason} for name, reason in skipped.items()]
    return [*results, *skips]
