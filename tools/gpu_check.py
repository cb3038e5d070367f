"""Everything that needs a GPU, in one command: kernels, backends, speed and memory; says what it skipped and why.

    python -m fastvar_trt.tools.gpu_check --out out/gpu_check

Writes `gpu_check.json` and `gpu_check.md`. Times are medians of rounds in which every variant runs once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.build.tensorrt.flavour import RTX_TARGETS
from fastvar_trt.export.exporter import ExportOptions, export_again, export_model, load_bundle_model
from fastvar_trt.export.models.registry import load_plan
from fastvar_trt.export.models.var.demo import demo_source
from fastvar_trt.plugins import oracle
from fastvar_trt.plugins.cuda_kernels import CacheKernels
from fastvar_trt.runtime import Pipeline, read_manifest
from fastvar_trt.runtime.backends.cuda import CudaDevice
from fastvar_trt.runtime.errors import BackendError, BundleError, UnavailableError
from fastvar_trt.runtime.manifest import Condition
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.plan import DENSE
from fastvar_trt.tools.cli.command import ErrorCommand
from fastvar_trt.tools.tables import format_table

_DEFAULT_PLAN = "fastvar-demo"
_REPEATS = 20  # between two events, so that they queue up behind each other


@dataclasses.dataclass
class Section:
    """One part of the check: what it found, or why it was skipped, or how it failed."""

    name: str
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skipped: str = ""
    failed: str = ""


def run_section(name: str, check: Callable[[], list[dict[str, Any]]]) -> Section:
    """Run a part; what is not on this machine skips it, anything else fails it."""
    section = Section(name)
    try:
        section.results = check()
    except UnavailableError as error:
        section.skipped = str(error)
    except Exception as error:  # one part must not keep the others from running
        section.failed = f"{type(error).__name__}: {error}"
    if any(not result.get("ok", True) for result in section.results):
        section.failed = "results differ, see the table"
    return section


def check_gpu() -> list[dict[str, Any]]:
    """Name and memory of the GPU."""
    device = CudaDevice()
    try:
        return [{"gpu": device.name, "target": device.target, "free MiB": device.free_bytes() >> 20}]
    finally:
        device.close()


def check_kernels() -> list[dict[str, Any]]:
    """The CUDA kernels of the cache operator against the numpy oracle, and their times."""
    device = CudaDevice()
    kernels = CacheKernels(device.target.replace("sm", "sm_"), device.stream)
    maps = (
        ((13, 13), (10, 10), 256),
        ((16, 16), (10, 10), 1024),
        ((32, 32), (18, 18), 1024),
        ((64, 64), (40, 40), 2048),
        ((27, 48), (18, 32), 2048),
    )
    try:
        return [
            _check_kernels_once(device, kernels, size, cached, channels, dtype)
            for size, cached, channels in maps
            for dtype in ("float32", "float16")
        ]
    finally:
        kernels.close()
        device.close()


def _check_kernels_once(
    device: CudaDevice,
    kernels: CacheKernels,
    size: tuple[int, int],
    cached_size: tuple[int, int],
    channels: int,
    dtype: str,
) -> dict[str, Any]:
    """Selection, then gather and restore on the oracle's own indices: near-ties in the scores cannot hide them."""
    rng = np.random.default_rng(0)
    batch, length, num_cached = 2, size[0] * size[1], cached_size[0] * cached_size[1]
    keep = length // 2
    sides = {"h": size[0], "w": size[1], "cached_h": cached_size[0], "cached_w": cached_size[1]}
    x = rng.standard_normal((batch, length, channels)).astype(dtype)
    cached = rng.standard_normal((batch, num_cached, channels)).astype(dtype)
    indices = oracle.pivotal_tokens(x, keep)
    computed = oracle.gather_tokens(x, indices)
    restored = oracle.restore_tokens(computed, indices, cached, **sides)
    scratch = [np.zeros((batch, channels), np.float32), np.zeros((batch, length), np.float32)]
    results = [np.zeros_like(indices), np.zeros_like(computed), np.zeros_like(restored)]
    arrays = [x, cached, *scratch, *results]
    pointers = [device.allocate(array.nbytes) for array in arrays]
    p_x, p_cached, p_mean, p_score, p_indices, p_computed, p_restored = pointers
    device.upload(p_x, x)
    device.upload(p_cached, cached)
    p_oracle = device.allocate(indices.nbytes)
    device.upload(p_oracle, indices)
    counts = {"batch": batch, "keep": keep, "channels": channels}

    def run() -> None:
        kernels.pivotal_tokens(dtype, p_x, p_indices, p_mean, p_score, length=length, **counts)
        kernels.gather_tokens(dtype, p_x, p_oracle, p_computed, length=length, **counts)
        kernels.restore_tokens(dtype, p_computed, p_oracle, p_cached, p_restored, **counts, **sides)

    run()
    times = []
    for _ in range(20):
        start = device.record()
        for _ in range(_REPEATS):
            run()
        times.append(device.elapsed_ms(start, device.record()) / _REPEATS)
    for array, pointer in zip(results, pointers[-3:], strict=True):
        device.download(array, pointer)
    for pointer in (*pointers, p_oracle):
        device.free(pointer)
    # Scores within rounding of each other may change places at the cut.
    same = float((results[0] == indices).mean())
    error = float(np.abs(results[2].astype(np.float32) - restored).max())
    return {
        "map": f"{size[0]}x{size[1]} from {cached_size[0]}x{cached_size[1]}",
        "channels": channels,
        "dtype": dtype,
        "indices equal": same,
        "max error": error,
        "ms, launches included": round(statistics.median(times), 4),
        "ok": same > 0.999 and np.array_equal(results[1], computed) and error <= (1e-5 if dtype == "float32" else 4e-3),
    }


def check_backend(bundle: Path, name: str, target: str) -> list[dict[str, Any]]:
    """A GPU backend against the CPU chain: tokens of the same noise, captured and not."""
    build_targets(bundle, target)
    with Pipeline.load(bundle) as cpu:
        expected = cpu.generate([0, 1], seeds=7)
    before = CudaDevice()
    free = before.free_bytes()
    with Pipeline.load(bundle, backend=name, device="cuda") as pipe:
        first, second = pipe.generate([0, 1], seeds=7), pipe.generate([0, 1], seeds=7)
        used = free - before.free_bytes()
    before.close()
    agreement = [float((a == b).mean()) for a, b in zip(first.tokens, expected.tokens, strict=True)]
    return [
        {
            "backend": name,
            "tokens equal, first scales": min(agreement[:4]),
            "tokens equal, all": float(np.mean(agreement)),
            "second run equal": all((a == b).all() for a, b in zip(first.tokens, second.tokens, strict=True)),
            "device MiB": used >> 20,
            # Kernels round differently: a near-tie may fall the other way, and later scales follow.
            "ok": min(agreement[:4]) > 0.9
            and all((a == b).all() for a, b in zip(first.tokens, second.tokens, strict=True)),
        }
    ]


def check_speed(bundles: dict[str, Path], runs: int) -> list[dict[str, Any]]:
    """Latency of every GPU backend that loads, and of PyTorch with flash SDPA, in the same rounds."""
    variants: dict[str, Callable[[], None]] = {}
    opened: list[Pipeline] = []
    try:
        for label, bundle in bundles.items():
            for name in ("tensorrt_rtx", "tensorrt", "onnxruntime"):
                try:
                    pipe = Pipeline.load(bundle, backend=name, device="cuda")
                except (UnavailableError, BundleError):
                    continue  # not here or not built: the section of this backend says why
                opened.append(pipe)
                variants[f"{name} {label}"] = lambda pipe=pipe: pipe.generate([0]) and None  # type: ignore[misc]
            with contextlib.suppress(UnavailableError):
                variants[f"PyTorch {label}"] = _pytorch(bundle)
        if not variants:
            raise UnavailableError("no GPU backend that loads, and no PyTorch that sees a GPU")
        for run in variants.values():
            for _ in range(3):
                run()
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(runs):
            for name, run in variants.items():
                begin = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - begin) * 1e3)
    finally:
        for pipe in opened:
            pipe.close()
    base = times.get(f"PyTorch {next(iter(bundles))}", next(iter(times.values())))
    return [
        {
            "variant": name,
            "ms": round(statistics.median(rows), 3),
            "speed-up": round(statistics.median(b / r for b, r in zip(base, rows, strict=True)), 3),
        }
        for name, rows in times.items()
    ]


def _pytorch(bundle: Path) -> Callable[[], None]:
    """One image by eager PyTorch on the GPU, decoder and copy to the host included."""
    import torch

    from fastvar_trt.export.models.reference import default_request, generate

    if not torch.cuda.is_available():
        raise UnavailableError("PyTorch sees no GPU; install a CUDA build of torch")
    model, manifest = load_bundle_model(bundle)
    model = model.to("cuda")
    plan = manifest.resolved_plan
    noise = {k: torch.from_numpy(uniform_noise(0, k, plan.num_tokens(k)))[None].cuda() for k in plan.steps}
    request = default_request(model, 1, greedy=False)
    request = dataclasses.replace(request, **{name: value.cuda() for name, value in vars(request).items()})
    inputs = {name: tensor.to("cuda") for name, tensor in model.example_condition(1).items()}
    kernel = (
        torch.nn.attention.SDPBackend.MATH
        if manifest.precision == "fp32"
        else torch.nn.attention.SDPBackend.FLASH_ATTENTION
    )

    def run() -> None:
        with torch.inference_mode(), torch.nn.attention.sdpa_kernel(kernel):
            model.decode(generate(model, plan, inputs, noise, request).f_hat)[1].cpu()

    return run


def to_markdown(sections: list[Section], machine: dict[str, str]) -> str:
    """The report for people."""
    lines = ["# GPU check", "", ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    for section in sections:
        lines += [f"## {section.name}", ""]
        if section.skipped:
            lines += [f"Skipped: {section.skipped}", ""]
        if section.failed:
            lines += [f"**Failed**: {section.failed}", ""]
        if section.results:
            header = [key for key in section.results[0] if key != "ok"]
            rows = [[result[key] for key in header] for result in section.results]
            lines += ["```", format_table(header, rows), "```", ""]
    return "\n".join(lines)


@click.command(cls=ErrorCommand)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/gpu_check"), show_default=True)
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True, help="Rounds of the speed comparison.")
def main(bundle: Path | None, out: Path, runs: int) -> None:
    """Check kernels and GPU backends on this machine; BUNDLE: an fp16 bundle, default: the demo model."""
    if bundle is not None and read_manifest(bundle).model.condition is not Condition.CLASS:
        raise BundleError(f"bundle {bundle}: gpu_check draws classes, and this draws from text; give another")
    out.mkdir(parents=True, exist_ok=True)
    sections = [run_section("GPU", check_gpu), run_section("CUDA kernels against the oracle", check_kernels)]
    gpu = sections[0].results[0]["target"] if sections[0].results else ""
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        bundles = {name: Path(scratch) / name for name in ("dense", "pruned")}

        def export() -> list[dict[str, Any]]:
            """Bundles of our own, so that the given one stays as it is; PyTorch is compared at batch 1."""
            if not gpu:
                raise UnavailableError("no GPU")
            if bundle is None:
                export_model(demo_source(), bundles["pruned"], ExportOptions(load_plan(_DEFAULT_PLAN), "fp16"))
            else:
                export_again(bundle, bundles["pruned"], read_manifest(bundle).default.plan, batches=(1,))
            export_again(bundles["pruned"], bundles["dense"], DENSE)
            for path in bundles.values():
                build_targets(path, "cpu")
            return [{"bundle": name, "precision": read_manifest(path).precision} for name, path in bundles.items()]

        sections.append(run_section("Export", export))
        enterprise = [("tensorrt", target) for target in ("current", "current+plugins")]
        for name, target in (("onnxruntime", "cuda"), ("tensorrt_rtx", gpu), *enterprise):

            def check(name: str = name, target: str = target) -> list[dict[str, Any]]:
                if not sections[2].results:
                    raise UnavailableError("no bundles to run, see Export")
                if name == "tensorrt_rtx" and target not in RTX_TARGETS:
                    raise UnavailableError(f"TensorRT for RTX does not build for {target}")
                return [result for path in bundles.values() for result in check_backend(path, name, target)]

            sections.append(run_section(f"{name}, built for {target}, against the CPU", check))

        def speed() -> list[dict[str, Any]]:
            if not sections[2].results:
                raise UnavailableError("no bundles to run, see Export")
            return check_speed(bundles, runs)

        sections.append(run_section("Speed", speed))
    machine = {"python": platform.python_version(), "system": platform.platform()}
    data = {"machine": machine, "sections": [dataclasses.asdict(section) for section in sections]}
    (out / "gpu_check.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = to_markdown(sections, machine)
    (out / "gpu_check.md").write_text(text, encoding="utf-8")
    click.echo(text)
    failed = [section.name for section in sections if section.failed]
    if failed:
        raise BackendError(f"failed: {', '.join(failed)}; see {out / 'gpu_check.md'}")


if __name__ == "__main__":
    main()
