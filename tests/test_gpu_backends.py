"""The backends for NVIDIA GPUs and the scale loop above them, on a GPU that is not there."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fake_gpu import VERSION, FakeCuda, FakeOnnxRuntime, FakeTensorRT, fake_build_engine
from fastvar_trt.export.build.base import BuildReport, Progress, build_bundle, no_progress
from fastvar_trt.export.build.cuda import CudaBuilder
from fastvar_trt.export.build.tensorrt import builder
from fastvar_trt.export.build.tensorrt.builder import EnterpriseBuilder, RtxBuilder, tensorrt_graph
from fastvar_trt.export.build.tensorrt.flavour import Flavour
from fastvar_trt.runtime import Pipeline, chain
from fastvar_trt.runtime.backends.cuda import CudaDevice
from fastvar_trt.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from fastvar_trt.runtime.backends.tensorrt import TensorRTBackend
from fastvar_trt.runtime.chain import ChainOutputs
from fastvar_trt.runtime.engines import device_memory, read_engines
from fastvar_trt.runtime.errors import BackendError, BundleError, ExportError, OutOfMemoryError
from fastvar_trt.runtime.layout import passed_bytes
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, read_manifest
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.runtime.weights import read_layout
from fastvar_trt.tools.measure import profiling


def build_tensorrt(bundle: Path, *targets: str, progress: Progress = no_progress) -> BuildReport:
    kind = EnterpriseBuilder if targets[0].startswith("current") else RtxBuilder
    return build_bundle(bundle, kind(targets), progress)


def build_cuda(bundle: Path) -> BuildReport:
    return build_bundle(bundle, CudaBuilder(("cuda",)))


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with engines of the fake package, for sm86 and sm89."""
    bundle = tmp_path_factory.mktemp("tensorrt") / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    with pytest.MonkeyPatch.context() as patch:
        patch_build(patch)
        build_tensorrt(bundle, "sm86", "sm89")
    build_cuda(bundle)
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(built, tmp_path / "bundle")
    return tmp_path / "bundle"


def patch_build(patch: pytest.MonkeyPatch, build_engine: Callable[..., Any] = fake_build_engine) -> None:
    module = type("module", (), {"__version__": VERSION})
    patch.setattr(builder, "build_engine", build_engine)
    patch.setattr(Flavour, "load", classmethod(lambda cls, name: cls(name, module)))


def load(
    bundle: Path,
    cuda: FakeCuda | None = None,
    *,
    capture: bool = True,
    kernel_cache: Path | str = "off",
    low_memory: bool = False,
) -> tuple[Pipeline, FakeCuda]:
    cuda = cuda or FakeCuda()
    backend = _tensorrt(
        cuda, FakeTensorRT(cuda), capture=capture, kernel_cache=str(kernel_cache), low_memory=low_memory
    )
    return Pipeline.load(bundle, backend=backend), cuda


def _tensorrt(cuda: FakeCuda, trt: FakeTensorRT, **options: Any) -> TensorRTBackend:
    return TensorRTBackend(cuda=cuda, tensorrt=trt, **{"kernel_cache": "off", **options})


def load_onnxruntime(bundle: Path, *, capture: bool = False, low_memory: bool = False) -> tuple[Pipeline, FakeCuda]:
    cuda = FakeCuda()
    backend = OnnxRuntimeCudaBackend(
        cuda=cuda, onnxruntime=FakeOnnxRuntime(cuda), capture=capture, low_memory=low_memory
    )
    return Pipeline.load(bundle, backend=backend), cuda


load_tensorrt = load


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("load", [load_tensorrt, load_onnxruntime])
def test_it_draws_what_onnx_runtime_draws_on_the_cpu(
    built: Path, load: Callable[..., tuple[Pipeline, FakeCuda]], capture: bool
) -> None:
    requests: list[dict[str, Any]] = [
        {"labels": [1], "seeds": 3},
        {"labels": [1], "seeds": 4, "return_logits": True},
        {"labels": [2, 3, 4], "seeds": 5, "cfg": [1.0, 2.0, 3.0], "top_k": 20},
        {"labels": [5], "greedy": True},
        {"labels": [1], "seeds": 3},
    ]
    pipe, cuda = load(built, capture=capture)
    with pipe, Pipeline.load(built) as reference:
        for request in requests:
            ours, theirs = pipe.generate(**request), reference.generate(**request)
            for k, (x, y) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
                np.testing.assert_array_equal(x, y, err_msg=f"{request}: step {k}")
            np.testing.assert_allclose(ours.f_hat, theirs.f_hat, atol=1e-4)
            assert np.abs(ours.images.astype(int) - theirs.images).max() <= 1
            if theirs.logits is not None:
                assert ours.logits is not None
                np.testing.assert_allclose(ours.logits[-1], theirs.logits[-1], atol=1e-3)
            assert set(ours.timings) == set(theirs.timings) and min(ours.timings.values()) > 0
        # Between two captured launches: previews need the chain uncaptured, and leave no trace in it.
        for our, their in zip(*(p.stream([1], seeds=3, preview_scales=[0, 1]) for p in (pipe, reference)), strict=True):
            assert our.scale == their.scale and np.abs(our.images.astype(int) - their.images).max() <= 1
        again = pipe.generate([1], seeds=3)
        np.testing.assert_array_equal(again.images, ours.images)
    # Captured: once for each of (batch 1), (batch 1 with logits), (batch 2); launched at once, and by later requests.
    # ONNX Runtime captures its sessions by itself.
    assert cuda.num_launches == (7 if capture and load is load_tensorrt else 0)
    assert not cuda.memory, "device memory is given back"
    assert cuda.num_events == 0 and cuda.num_graphs == 0, "events and graphs are given back"
    assert cuda.num_activations >= len(requests), "the device is made current in the thread that draws"


@pytest.mark.parametrize("load", [load_tensorrt, load_onnxruntime])
def test_the_decoder_may_be_there_only_while_it_runs(
    built: Path, load: Callable[..., tuple[Pipeline, FakeCuda]]
) -> None:
    """The same pictures, previews among them; what it has taken is given back, and no chain is captured."""
    low, cuda = load(built, low_memory=True)
    requests: list[dict[str, Any]] = [{"labels": [1]}, {"labels": [2, 3]}, {"labels": [1]}]
    with low, load(built)[0] as usual:
        before = set(cuda.memory)
        for request in requests:
            ours, theirs = (pipe.generate(**request, seeds=3) for pipe in (low, usual))
            assert np.abs(ours.images.astype(int) - theirs.images).max() <= 1
        after = set(cuda.memory)
        for our, their in zip(*(p.stream([1], seeds=3, preview_scales=[1]) for p in (low, usual)), strict=True):
            assert np.abs(our.images.astype(int) - their.images).max() <= 1
        assert before <= after == set(cuda.memory)  # outputs that nobody reads were added once
        loaded = [file for name in ("_loaded", "_sessions") for file in getattr(low.backend, name, {})]
        assert loaded and not any(file.startswith("decoder") for file in loaded)
        assert cuda.num_launches == 0
    assert not cuda.memory


def test_the_decoder_has_the_memory_of_keys_and_values(bundle: Path) -> None:
    """As much as it wants of it; a preview, which comes while they are needed, has memory of its own."""
    path = bundle / "engines" / "tensorrt_rtx" / "engines.json"
    data = json.loads(path.read_text())
    wanted = 8_000_000
    for engine in data["engines"]:
        engine["activation_bytes"] = wanted if engine["graph"].startswith("decoder") else 4096
    path.write_text(json.dumps(data))
    manifest, engines = read_manifest(bundle), read_engines(bundle, "tensorrt_rtx")
    places = read_layout(bundle / WEIGHTS_FILE)
    usual, low = (device_memory(manifest, engines, places, low_memory=low) for low in (False, True))
    passed = max(passed_bytes(manifest.default.chain(batch)) for batch in manifest.batches)
    assert (usual["activations"], low["activations"]) == (wanted, 4096)
    assert passed < wanted and low["buffers"] - usual["buffers"] == wanted - passed
    pipe, cuda = load(bundle, low_memory=True)
    with pipe:
        assert sum(array.nbytes == wanted for array in cuda.memory.values()) == 1  # of all batch sizes
        pipe.generate([1])
        held = cuda.num_allocations
        pipe.generate([1])
        of_decoder = cuda.num_allocations - held  # what of its weights is an input
        list(pipe.stream([1], preview_scales=[1]))
        assert cuda.num_allocations - held == 3 * of_decoder + 1


@pytest.mark.parametrize("load", [load_tensorrt, load_onnxruntime])
def test_a_chain_that_finds_no_memory_leaves_none(built: Path, load: Callable[..., tuple[Pipeline, FakeCuda]]) -> None:
    pipe, cuda = load(built)
    with pipe:
        expected = pipe.generate([1], seeds=3).images
        pipe._chains.clear()  # as of a variant that was not drawn yet
        before, total_bytes = set(cuda.memory), cuda.total_bytes
        cuda.total_bytes -= cuda.free_bytes() - 300  # enough for some of its buffers
        allocated = cuda.num_allocations
        with pytest.raises(OutOfMemoryError):
            pipe.generate([1], seeds=3)
        assert cuda.num_allocations > allocated and set(cuda.memory) == before
        cuda.total_bytes = total_bytes
        np.testing.assert_array_equal(pipe.generate([1], seeds=3).images, expected)


def test_nothing_is_allocated_after_the_first_image(built: Path) -> None:
    pipe, cuda = load(built)
    with pipe:
        pipe.generate([1])
        before = cuda.num_allocations
        pipe.generate([2], seeds=9)
        pipe.generate([3, 4])
        assert cuda.num_allocations == before


def test_one_copy_of_the_weights_serves_all_engines(built: Path) -> None:
    records = read_engines(built, "tensorrt_rtx").records.values()
    assert len(records) == len(read_manifest(built).graphs) == 12  # two batch sizes
    pipe, cuda = load(built)
    with pipe:
        backend = pipe.backend
        assert isinstance(backend, TensorRTBackend)
        addresses = backend._weights
        used = {name for record in records for name in record.weights}
        assert set(addresses) == used and "blocks.1.ffn.fc1.weight" in used
        held = sum(cuda.memory[pointer].nbytes for pointers in backend._held.values() for pointer in pointers)
        shapes = {s.name: s.num_bytes for record in records for s in record.inputs if s.name in record.weights}
        assert sum(shapes.values()) <= held < sum(shapes.values()) + 256 * len(shapes)


def test_layers_are_timed_where_it_is_asked_for(built: Path) -> None:
    """The stand-in reports half a millisecond per node, to a profiler that is a subclass as TensorRT wants it."""
    cuda = FakeCuda()
    backend = _tensorrt(cuda, FakeTensorRT(cuda), profile=True)
    with Pipeline.load(built, backend=backend) as pipe:
        for _ in range(4):
            pipe.generate([1])
        times = profiling.operators_of(pipe, 1, runs=4)
        assert cuda.num_launches == 0  # a captured chain would report nothing
        manifest = pipe.manifest
    for graph in manifest.default.chain(1):
        nodes = onnx.load(
            built / "engines" / "tensorrt_rtx" / read_engines(built, "tensorrt_rtx").records[graph.file].file
        )
        counts = Counter(node.op_type for node in nodes.graph.node)
        assert times[graph.name] == {kind: 0.5 * count for kind, count in counts.most_common()}
    plain, _ = load(built)
    with plain, pytest.raises(BackendError, match="takes no times of single operators"):
        plain.backend.operator_times()


def test_a_capture_that_computes_something_else_is_not_trusted(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that was computed uncaptured is returned, and so are those after it."""
    warnings: list[str] = []
    monkeypatch.setattr(chain._LOGGER, "warning", lambda text, *values: warnings.append(text % values))
    cuda = FakeCuda()
    cuda.spoil_captures = True
    pipe, _ = load(built, cuda)
    with pipe, Pipeline.load(built) as reference:
        for seed in (3, 4):
            assert (
                np.abs(
                    pipe.generate([1], seeds=seed).images.astype(int) - reference.generate([1], seeds=seed).images
                ).max()
                <= 1
            )
        assert cuda.num_launches == 1 and cuda.num_graphs == 0  # tried once, and dropped
        (problem,) = pipe.capture_problems
        assert re.search(
            r"does not compute what it computes uncaptured \(step \d wrote no tokens\); load with capture", problem
        )
        assert warnings == [f"{problem}; the chain runs uncaptured"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_rounding_may_differ_where_a_chain_is_captured(precision: str) -> None:
    """Kernels with atomic sums round otherwise in every run: the first step with other tokens is judged."""
    tolerance = PRECISIONS[precision].tolerance
    tokens = [np.full((1, n), 5, np.int32) for n in (1, 64, 4096)]
    pixels = np.full((1, 8, 8, 3), 100, np.uint8)

    def outputs(tokens: list[np.ndarray], pixels: np.ndarray, f_hat: float = 0.0) -> ChainOutputs:
        return ChainOutputs(tokens, np.full(4, f_hat), pixels, np.ones(1, bool), None, None, {})

    def problem(got: ChainOutputs) -> str:
        return chain._unwritten(got) or chain._difference(got, expected, tolerance)

    expected = outputs(tokens, pixels)
    few, many, none = (tokens[2].copy() for _ in range(3))
    few[0, :3], many[0, :3000] = 7, 7
    none[:] = chain._no_token(none.dtype)
    assert not problem(expected) and not problem(outputs(tokens, pixels + 1))
    assert not problem(outputs([*tokens[:2], few], pixels + 50))
    assert "73.2% of the tokens of step 2" in problem(outputs([*tokens[:2], many], pixels))
    assert "pixels differ by 3.0" in problem(outputs(tokens, pixels + 3))
    # What a captured run does not write keeps the value that it was wiped with.
    assert problem(outputs([*tokens[:2], none], pixels)) == "step 2 wrote no tokens"
    assert problem(outputs([none[:, :1], none[:, :64], none], pixels * 0, np.nan)) == "step 0 wrote no tokens"
    assert problem(outputs([*tokens[:2], few], pixels * 0)) == "no pixels were written"
    assert problem(outputs([*tokens[:2], few], pixels, np.nan)) == "f_hat was not written"
    bits = np.full((1, 4, 8), chain._no_token(np.dtype(np.uint8)), np.uint8)
    assert chain._unwritten(outputs([bits], pixels)) == "step 0 wrote no tokens"


def test_a_chain_that_cannot_be_captured_is_named(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeCuda) -> None:
        raise BackendError("CUDA: operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeCuda, "end_capture", refuse)
    pipe, cuda = load(built)
    with pipe:
        assert pipe.generate([1]).images.shape == (1, 128, 128, 3)
        assert re.search("cannot be captured .* load with capture=False", pipe.capture_problems[0])
    assert cuda.num_events == 0


def test_tensorrt_is_asked_whether_an_engine_can_be_captured(built: Path) -> None:
    cuda = FakeCuda()
    trt = FakeTensorRT(cuda)
    trt.can_capture = False
    with Pipeline.load(built, backend=_tensorrt(cuda, trt)) as pipe:
        pipe.generate([1])
        assert re.search("condition.*cannot be captured; build it again", pipe.capture_problems[0])
    assert not cuda.num_graphs


def test_compiled_kernels_are_kept_for_the_next_process(built: Path, tmp_path: Path) -> None:
    def compiled(folder: Path | str, **gpu: Any) -> int:
        cuda = FakeCuda()
        vars(cuda).update(gpu)
        trt = FakeTensorRT(cuda)
        with Pipeline.load(built, backend=_tensorrt(cuda, trt, kernel_cache=str(folder))) as pipe:
            pipe.generate([1])
        return trt.num_compiled

    folder = tmp_path / "kernels"
    assert compiled(folder) == 12
    (kept,) = folder.iterdir()
    assert kept.name == "tensorrt_rtx-0_fake-a_GPU_that_is_not_there-13000.kernels"
    assert compiled(folder) == 0
    assert compiled(folder, driver=14000) == 12  # another driver: a file of its own
    kept.write_bytes(b"damaged")
    assert compiled(folder) == 12 and compiled(folder) == 0
    assert compiled("off") == 12
    (tmp_path / "file").touch()
    assert compiled(tmp_path / "file" / "below") == 12  # a folder that cannot be made loses nothing else


def test_the_largest_batch_is_loaded_first(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What engines share is then allocated once, however much larger those of the larger batch are."""
    order: list[int] = []
    load_one = TensorRTBackend.load
    monkeypatch.setattr(TensorRTBackend, "load", lambda self, graph: order.append(graph.batch) or load_one(self, graph))
    load(built)[0].close()
    assert order == sorted(order, reverse=True) and set(order) == {1, 2}


def test_enterprise_engines_are_built_for_this_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_build(monkeypatch)
    registered: list[bool] = []
    with_plugins: list[bool] = []

    def graph_without_plugins(path: Path, *, plugins: bool) -> Any:
        with_plugins.append(plugins)
        return tensorrt_graph(path)

    monkeypatch.setattr(builder, "register_plugins", lambda: registered.append(True))
    monkeypatch.setattr(builder, "tensorrt_graph", graph_without_plugins)
    monkeypatch.setattr(builder, "CudaDevice", lambda: FakeCuda(target="sm90"))
    assert build_tensorrt(bundle, "current").targets == ("sm90",)
    assert not build_tensorrt(bundle, "current").built
    assert not registered and not any(with_plugins)  # an option, which has never run
    assert len(build_tensorrt(bundle, "current+plugins").built) == 12
    assert registered and with_plugins[-12:] == [True] * 12
    assert len(build_tensorrt(bundle, "current").built) == 12
    with pytest.raises(ExportError, match=r"got current and current\+plugins: give one of them"):
        build_tensorrt(bundle, "current", "current+plugins")
    monkeypatch.setattr(builder, "CudaDevice", lambda: FakeCuda(target="sm75"))
    with pytest.raises(ExportError, match=r"current\+plugins: needs SM80 or later, this GPU is SM75; take current"):
        build_tensorrt(bundle, "current+plugins")
    with pytest.raises(ExportError, match="sm75: has no numbers of fp8"):  # before anything is exported
        EnterpriseBuilder(["current"]).check_precision(PRECISIONS["fp8"])

    def load_enterprise(target: str) -> Pipeline:
        cuda = FakeCuda(target=target)
        backend = TensorRTBackend("tensorrt", cuda=cuda, tensorrt=FakeTensorRT(cuda), kernel_cache="off")
        return Pipeline.load(bundle, backend=backend)

    with load_enterprise("sm90") as pipe:
        assert pipe.generate([1]).images.shape == (1, 128, 128, 3)
    with pytest.raises(BundleError, match=r"here is sm80; run `fastvar build .* --target current`"):
        load_enterprise("sm80")


def test_a_record_cannot_name_files_elsewhere(bundle: Path) -> None:
    path = bundle / "engines" / "tensorrt_rtx" / "engines.json"
    data = json.loads(path.read_text())
    data["engines"][0]["file"] = "../../weights.safetensors"
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="expected a plain file name"):
        load(bundle)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "step_03.engine").unlink(), r"step_03\.engine is missing"),
        (lambda folder: (folder / "step_03.engine").write_bytes(b"short"), "got 5 bytes, expected"),
        (
            lambda folder: (folder / "step_03.engine").write_bytes(b"\0" * (folder / "step_03.engine").stat().st_size),
            "its SHA-256 is not that on record",
        ),
        (lambda folder: (folder / "engines.json").unlink(), "no engines of tensorrt_rtx were built"),
        (lambda folder: (folder / "engines.json").write_text("{"), "damaged"),
    ],
)
def test_damaged_engines_are_refused(bundle: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(bundle / "engines" / "tensorrt_rtx")
    with pytest.raises(BundleError, match=message) as error:
        load(bundle)
    assert f"`fastvar build {bundle}" in str(error.value)


def test_another_gpu_or_version_is_named(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"built for sm86, sm89, here is sm120; run `fastvar build .* sm120`"):
        load(bundle, FakeCuda(target="sm120"))
    cuda = FakeCuda()
    newer = FakeTensorRT(cuda)
    newer.__version__ = "2.0"
    with pytest.raises(BundleError, match=r"built with tensorrt_rtx 0\.fake, here is 2\.0"):
        Pipeline.load(bundle, backend=_tensorrt(cuda, newer))


def test_an_engine_that_cannot_be_loaded_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTensorRT, "deserialize_cuda_engine", lambda self, data: None)
    with pytest.raises(BackendError, match=r"condition_b2\.engine: .* could not load the engine; run `fastvar build"):
        load(bundle)


def test_too_little_memory_is_told_before_anything_is_loaded(built: Path) -> None:
    cuda = FakeCuda(total_bytes=100_000)
    with pytest.raises(OutOfMemoryError, match=r"needs \d+ MiB on the GPU \(\d+ of weights, .* \d+ of activations\)"):
        load(built, cuda)
    assert cuda.num_allocations == 0


def test_no_driver_is_named() -> None:
    pytest.importorskip("cuda.bindings")
    from cuda.bindings import runtime

    if runtime.cudaGetDeviceCount()[0] != runtime.cudaError_t.cudaErrorInsufficientDriver:
        pytest.skip("this machine has a driver")
    with pytest.raises(BackendError, match="no NVIDIA driver, or one too old"):
        CudaDevice()


def test_devices_are_checked() -> None:
    with pytest.raises(BackendError, match="expected 'cuda' or 'cuda:N'"):
        TensorRTBackend(device="cpu")


def test_only_what_is_missing_or_stale_is_built(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_build(monkeypatch)
    again = build_tensorrt(bundle, "sm86")
    assert not again.built and len(again.kept) == 12
    assert {record.targets for record in again.kept} == {("sm86", "sm89")}

    (bundle / "engines" / "tensorrt_rtx" / "step_01.engine").write_bytes(b"damaged")
    (bundle / "engines" / "tensorrt_rtx" / "step_02_b2.engine").unlink()
    mended = build_tensorrt(bundle, "sm86")
    assert [record.graph for record in mended.built] == ["step_01.onnx", "step_02_b2.onnx"]

    wider = build_tensorrt(bundle, "sm120")
    assert len(wider.built) == 12 and wider.targets == ("sm86", "sm89", "sm120")
    load(bundle, FakeCuda(target="sm120"))[0].close()


def test_an_interrupted_build_keeps_what_it_finished(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(bundle / "engines")
    patch_build(monkeypatch)

    def interrupt(graph: str, phase: str, share: float) -> None:
        if graph == "step_02.onnx":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_tensorrt(bundle, "sm86", progress=interrupt)
    folder = bundle / "engines" / "tensorrt_rtx"
    finished = ["condition.engine", "step_00.engine", "step_01.engine"]
    assert sorted(path.name for path in folder.iterdir()) == [*finished[:1], "engines.json", *finished[1:]]
    rest = build_tensorrt(bundle, "sm86")
    assert len(rest.built) == 9 and len(rest.kept) == 3
    load(bundle)[0].close()


def test_engines_of_other_weights_are_stale(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle / "engines" / "tensorrt_rtx" / "engines.json"
    data = json.loads(path.read_text())
    data["engines"][3]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"was built from another weights\.safetensors"):
        load(bundle)
    patch_build(monkeypatch)
    assert len(build_tensorrt(bundle, "sm86").built) == 1
    load(bundle)[0].close()


def test_an_engine_with_other_tensors_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*arguments: Any) -> Any:
        import dataclasses

        engine = fake_build_engine(*arguments)
        inputs = tuple(dataclasses.replace(t, dtype="float16") if t.name == "f_hat" else t for t in engine.inputs)
        return dataclasses.replace(engine, inputs=inputs)

    patch_build(monkeypatch, half)
    shutil.rmtree(bundle / "engines")
    with pytest.raises(ExportError, match=r"step_01\.onnx: the engine: only the graph has the tensor f_hat, float16"):
        build_tensorrt(bundle, "sm86")


def test_the_cuda_provider_must_be_there(built: Path) -> None:
    cuda = FakeCuda()
    backend = OnnxRuntimeCudaBackend(cuda=cuda, onnxruntime=FakeOnnxRuntime(cuda, providers=()))
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider .* pip install 'fastvar-trt\[gpu\]'"):
        Pipeline.load(built, backend=backend)


def test_graphs_for_cuda_are_built_once(bundle: Path) -> None:
    assert not build_cuda(bundle).built
    (bundle / "engines" / "onnxruntime_cuda" / "step_01.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"step_01\.onnx: got 7 bytes.*run `fastvar build .* --target cuda`"):
        load_onnxruntime(bundle)
    assert build_cuda(bundle).built
    load_onnxruntime(bundle)[0].close()
