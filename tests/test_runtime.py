"""The runtime: the scale loop on a fake backend, and what `Pipeline.generate` promises on a real bundle."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import TINY_PATCH_NUMS
from fastvar_trt.runtime import BackendError, BundleError, Pipeline, RequestError, read_manifest
from fastvar_trt.runtime import manifest as names
from fastvar_trt.runtime.backends import Backend, BoundGraph, Buffer, View
from fastvar_trt.runtime.chain import plan_batches
from fastvar_trt.runtime.manifest import MANIFEST_FILE, GraphSpec, Manifest, Role
from fastvar_trt.runtime.noise import uniform_noise
from fastvar_trt.runtime.precision import DTYPES

NUM_TOKENS = [n * n for n in TINY_PATCH_NUMS]


class FakeBackend(Backend):
    """Runs no graph: each one checks what is bound to its inputs, and leaves a mark in its outputs."""

    name = "fake"

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.bound_logits: list[str] = []
        self.pointers: dict[int, int] = {}
        self.closed = 0

    def open(self, bundle: Path, manifest: Manifest, *, check_hashes: bool) -> None:
        assert manifest == read_manifest(bundle)
        assert (manifest.precision, check_hashes) == ("fp32", True)

    def close(self) -> None:
        self.closed += 1

    def load(self, graph: GraphSpec) -> None:
        pass

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        owner = np.zeros(shape, dtype=dtype)
        assert self.pointers.setdefault(owner.ctypes.data, owner.nbytes) == owner.nbytes
        return Buffer(shape, dtype, owner.ctypes.data, owner)

    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        assert inputs.keys() == {i.name for i in graph.inputs}
        return _FakeGraph(self, graph, inputs, outputs)

    def upload(self, buffer: Buffer, array: Any) -> None:
        buffer.owner[...] = array

    def download(self, buffer: Buffer) -> Any:
        return buffer.owner.copy()

    def mark(self) -> int:
        return len(self.ran)

    def elapsed_ms(self, start: int, stop: int) -> float:
        return float(stop - start)


class _FakeGraph(BoundGraph):
    def __init__(
        self, backend: FakeBackend, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]
    ) -> None:
        self.backend, self.graph = backend, graph
        self.inputs = {name: _array(view) for name, view in inputs.items()}
        self.outputs = {name: _array(view) for name, view in outputs.items()}
        if names.LOGITS in outputs:
            backend.bound_logits.append(graph.name)

    def enqueue(self) -> None:
        """Step k writes k + 1 to everything; the condition 100, plus the label in `start`."""
        self.backend.ran.append(self.graph.name)
        scale = self.graph.scale
        for name, value in self.inputs.items():
            if name.startswith(("past_k", "past_v")):
                # Rows of the steps before, in order; the tiny plan prunes layer 1 at the last step only.
                expected = np.concatenate([np.full(n, k + 1) for k, n in enumerate(NUM_TOKENS[:scale])])
                np.testing.assert_array_equal(value[:, 0, 0, 0], expected)
            elif name.startswith("cache"):
                assert (value == 3).all()  # cache scale -2 is step 2
            elif name == names.F_HAT:
                assert (value == (scale if scale is not None else 4)).all()
            elif name.startswith("modulation") or name == names.HEAD_MODULATION:
                assert (value == 100).all()
            elif name == names.START:
                assert (value[:, 0] == 100).all()
            elif name == names.UNIFORM:
                np.testing.assert_array_equal(value[0], uniform_noise(7, scale or 0, value.shape[1]))
        for value in self.outputs.values():
            value[...] = 100 if scale is None else scale + 1


def _array(view: View) -> Any:
    """The view as an array of the owner's memory, by its pointer alone."""
    memory, dtype = view.buffer.owner, np.dtype(DTYPES[view.buffer.dtype].host)
    count, first = int(np.prod(view.shape)), view.pointer - memory.ctypes.data
    return memory.reshape(-1).view(np.uint8)[first : first + count * dtype.itemsize].view(dtype).reshape(view.shape)


def test_the_scale_loop_binds_every_step_to_what_the_steps_before_it_wrote(tiny_bundle: Path) -> None:
    backend = FakeBackend()
    with Pipeline.load(tiny_bundle, backend=backend) as pipe:
        for _ in range(2):  # the second image finds the leftovers of the first
            result = pipe.generate([1], seeds=7)
            assert backend.ran == ["condition", "step_00", "step_01", "step_02", "step_03", "decoder"]
            assert result.timings == dict.fromkeys(backend.ran, 1.0)
            assert [t.shape for t in result.tokens] == [(1, n) for n in NUM_TOKENS]
            assert [int(t[0, 0]) for t in result.tokens] == [1, 2, 3, 4]
            assert (result.f_hat == 4).all()
            backend.ran.clear()
        assert backend.bound_logits == []  # not computed unless asked for
        assert pipe.generate([1], seeds=7, return_logits=True).logits is not None
        assert len(backend.bound_logits) == 4
    assert backend.closed == 1


def test_key_and_value_memory_is_one_buffer_per_layer(tiny_bundle: Path) -> None:
    with Pipeline.load(tiny_bundle, backend=FakeBackend()) as pipe:
        shapes = pipe.buffer_shapes["128x128", 2]
        for layer in range(2):
            for role in (Role.KEYS, Role.VALUES):
                assert shapes[f"{role}_{layer}x4"] == (1 + 9 + 25, 4, 2, 64)  # [S_total, B2, H, D]
        assert not any("past" in name or "new_" in name for name in shapes)


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle) as pipeline:
        yield pipeline


def test_equal_seeds_give_equal_images_and_others_do_not(pipe: Pipeline) -> None:
    first, again, other = (pipe.generate([3], seeds=s) for s in (5, 5, 6))
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.tokens[3] != other.tokens[3]).mean() > 0.5
    assert first.images.dtype == np.uint8
    assert first.images.shape == (1, 128, 128, 3)


@pytest.mark.parametrize("count", [2, 3, 5])  # batches 2; 2 + 1; 2 + 2 + 1
def test_an_image_does_not_depend_on_its_neighbours(pipe: Pipeline, count: int) -> None:
    labels, seeds = list(range(count)), [40 + 3 * i for i in range(count)]
    cfg, temperature = [1.0 + i for i in range(count)], [0.5 + 0.2 * i for i in range(count)]
    together = pipe.generate(labels, seeds=seeds, cfg=cfg, temperature=temperature, top_k=[9 + i for i in range(count)])
    for i in range(count):
        alone = pipe.generate([i], seeds=[seeds[i]], cfg=cfg[i], temperature=temperature[i], top_k=9 + i)
        for k in range(4):
            np.testing.assert_array_equal(alone.tokens[k][0], together.tokens[k][i])
        assert np.abs(alone.images[0].astype(int) - together.images[i]).max() <= 1


def test_one_seed_counts_up_over_the_images(pipe: Pipeline) -> None:
    counted, listed = pipe.generate([1, 1, 1], seeds=8), pipe.generate([1, 1, 1], seeds=[8, 9, 10])
    np.testing.assert_array_equal(counted.images, listed.images)
    assert (counted.tokens[3][0] != counted.tokens[3][1]).any()


def test_batches_are_padded_where_no_smaller_size_exists(tiny_bundle: Path, tmp_path: Path, pipe: Pipeline) -> None:
    bundle = tmp_path / "b2"
    shutil.copytree(tiny_bundle, bundle)
    manifest = read_manifest(bundle)
    variant = dataclasses.replace(manifest.default, graphs=manifest.default.chain(2))
    only_two = dataclasses.replace(manifest, batches=(2,), variants=(variant,))
    (bundle / MANIFEST_FILE).write_text(json.dumps(only_two.to_json()))
    with Pipeline.load(bundle) as padded:
        result = padded.generate([4, 5, 6], seeds=1)
    assert result.images.shape[0] == result.f_hat.shape[0] == 3
    for k, tokens in enumerate(pipe.generate([4, 5, 6], seeds=1).tokens):
        np.testing.assert_array_equal(result.tokens[k], tokens)


def test_batch_planning() -> None:
    assert plan_batches(1, (1,)) == [1]
    assert plan_batches(7, (1, 4)) == [4, 1, 1, 1]
    assert plan_batches(3, (2, 8)) == [2, 2]
    assert plan_batches(3, (4,)) == [4]


def test_threads_take_turns(pipe: Pipeline) -> None:
    alone = [pipe.generate([i], seeds=i) for i in range(4)]
    together: dict[int, Any] = {}

    def draw(i: int) -> None:
        together[i] = pipe.generate([i], seeds=i)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_array_equal(together[i].images, alone[i].images)


def test_pipelines_of_one_process_do_not_disturb_each_other(tiny_bundle: Path, pipe: Pipeline) -> None:
    expected = pipe.generate([3], seeds=5)
    with Pipeline.load(tiny_bundle, num_threads=1) as second:
        np.testing.assert_array_equal(second.generate([3], seeds=5).tokens[3], expected.tokens[3])
    np.testing.assert_array_equal(pipe.generate([3], seeds=5).images, expected.images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, r"labels: got \[\], expected a list of at least one whole number"),
        ({"labels": 3}, "labels: got 3, expected a list"),
        ({"labels": [1.7]}, r"label: got 1.7, expected a whole number"),
        ({"labels": ["a"]}, "label: got 'a', expected a whole number"),
        ({"labels": [1], "seeds": None}, "seeds: got None, expected whole numbers"),
        ({"labels": [1], "seeds": [1.5]}, r"seeds: got \[1.5\], expected whole numbers"),
        ({"labels": [1], "cfg": "x"}, "cfg: got 'x', expected numbers"),
        ({"labels": [1], "top_k": 5.5}, "top_k: got 5.5, expected a whole number"),
        ({"labels": [10]}, "class 10: this model has 10 classes, 0 to 9"),
        ({"labels": [2, -1]}, "class -1: this model has 10 classes"),
        ({"labels": [1], "seeds": [1, 2]}, "seeds: got 2, expected one, or one per image"),
        ({"labels": [1], "seeds": -1}, "seed: got -1, expected 0 to"),
        ({"labels": [1], "seeds": 2**64}, "seed: got 18446744073709551616"),
        ({"labels": [1], "cfg": float("nan")}, "cfg: got nan, expected finite numbers"),
        (
            {"labels": [1, 2], "cfg": [1.0, 2.0, 3.0]},
            r"cfg: got \(3,\), expected one value, one per image \(2\), or per image and scale \(2, 4\)",
        ),
        ({"labels": [1], "temperature": 0.0}, "temperature: got 0.0, expected 0.001 or more"),
        ({"labels": [1], "top_p": 1.5}, "top_p: got 1.5, expected 0 to 1"),
        ({"labels": [1], "top_k": 97}, "top_k: got 97, this bundle takes 0 to 96"),
        ({"labels": [1], "top_k": -1}, "top_k: got -1"),
    ],
)
def test_requests_out_of_range(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe.generate(**arguments)
    assert pipe.generate([1]).images.shape[0] == 1  # the pipeline goes on


def test_logits_that_are_not_finite_are_an_error(pipe: Pipeline) -> None:
    with pytest.raises(BackendError, match=r"image 1: the model's logits are not finite: cfg 3e\+38 is too large"):
        pipe.generate([1, 2], cfg=[1.5, 3e38])


def test_top_k_zero_needs_the_whole_vocabulary(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundle, bundle)
    data = json.loads((bundle / MANIFEST_FILE).read_text())
    data["sampling"]["max_top_k"] = 50
    (bundle / MANIFEST_FILE).write_text(json.dumps(data))
    with Pipeline.load(bundle) as limited:
        with pytest.raises(RequestError, match="this bundle takes 1 to 50"):
            limited.generate([1], top_k=0)
        limited.generate([1], top_k=0, greedy=True)  # without effect there, so not refused


def test_a_closed_pipeline_says_so(tiny_bundle: Path) -> None:
    with Pipeline.load(tiny_bundle) as closed:
        pass
    closed.close()
    with pytest.raises(RequestError, match="the pipeline is closed"):
        closed.generate([1])


def test_unknown_backends_and_devices(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="onnx-runtime"):
        Pipeline.load(tiny_bundle, backend="onnx-runtime")
    with pytest.raises(BackendError, match="tpu"):
        Pipeline.load(tiny_bundle, device="tpu")
    with pytest.raises(RequestError, match="check: got 'none'"):
        Pipeline.load(tiny_bundle, check="none")


def test_a_graph_that_onnxruntime_cannot_read(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundle, bundle)
    path = bundle / "step_02.onnx"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(BackendError, match=r"step_02.onnx: ONNX Runtime cannot load it"):
        Pipeline.load(bundle, check="size")


def test_a_manifest_whose_graphs_do_not_fit_together(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundle, bundle)
    text = (bundle / MANIFEST_FILE).read_text()
    data = json.loads(text)
    step = next(g for g in data["variants"][0]["graphs"] if g["file"] == "step_01.onnx")
    next(t for t in step["inputs"] if t["name"] == "f_hat")["shape"][1] = 31
    (bundle / MANIFEST_FILE).write_text(json.dumps(data))
    message = r"step_01.onnx: only the manifest has the tensor f_hat, float32 \(1, 31, 8, 8\)"
    with pytest.raises(BundleError, match=message):  # ONNX Runtime knows what the graph has
        Pipeline.load(bundle)
    with pytest.raises(BundleError, match=r"step_01.onnx: tensor f_hat: got float32 \(1, 31, 8, 8\), but the graphs"):
        Pipeline.load(bundle, backend=FakeBackend())
