"""Export: what a bundle holds, in every variant of model and precision, and that nothing is lost when it fails."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from polygraphy.backend.onnx import OnnxFromPath
from safetensors.numpy import load_file
from safetensors.torch import save_file

from conftest import TINY_PLAN, tiny_states
from fastvar_trt.export import exporter, validation
from fastvar_trt.export.exporter import (
    ExportOptions,
    ExportReport,
    add_reference,
    export_again,
    export_model,
    load_bundle_model,
)
from fastvar_trt.export.folders import replace_folder, temporary_folder
from fastvar_trt.export.models.reference import default_request
from fastvar_trt.export.models.resize import area_matrix, bicubic_matrix
from fastvar_trt.export.models.var.model import VAR
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.export.tracing import COMPUTE, GraphFunction
from fastvar_trt.export.validation import run_in_onnxruntime
from fastvar_trt.export.weights_file import write_weights
from fastvar_trt.runtime import BundleError, ExportError, Pipeline, PlanError, PruningPlan, read_manifest
from fastvar_trt.runtime.manifest import REFERENCE_FILE, WEIGHTS_FILE, file_sha256
from fastvar_trt.runtime.plan import DENSE
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.tools.random_checkpoints import random_checkpoint

Export = Callable[..., tuple[Path, ExportReport]]
FP32 = PRECISIONS["fp32"]

VARIANTS: dict[str, dict[str, Any]] = {
    "shared_aln": {"shared_aln": True, "patch_nums": (1, 6)},
    "no_l2_norm": {"attn_l2_norm": False, "patch_nums": (1, 6)},
    "one_scale_wide": {"patch_nums": (2, 4), "width": 192, "num_heads": 3, "depth": 3},
}


@pytest.fixture(scope="module")
def smallest_source() -> VARSource:
    """One scale, one layer: for what has to fail or to be there, and not to be right."""
    return VARSource.from_state(*tiny_states(patch_nums=(2,), depth=1))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_variants_match_pytorch(variant: str, export_once: Export) -> None:
    plan = PruningPlan("half", ((-1, 0.5),), cache_scale=0, first_layer=1)
    source = VARSource.from_state(*tiny_states(**VARIANTS[variant]))
    bundle, report = export_once(f"variant_{variant}", source, ExportOptions(plan=plan))
    assert len(report.errors) == len(source.config.patch_nums) + 2
    assert all(error.relative_error < PRECISIONS["fp32"].tolerance.error / 10 for error in report.errors.values())
    with Pipeline.load(bundle) as pipe:
        outcome = verify_bundle(pipe)
    assert not outcome.failures
    assert outcome.num_images_equal == outcome.num_images == 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precisions(precision: str, tiny_source: VARSource, export_once: Export) -> None:
    bundle, report = export_once(f"tiny_{precision}", tiny_source, ExportOptions(plan=TINY_PLAN, precision=precision))
    assert max(error.relative_error for error in report.errors.values()) < PRECISIONS[precision].tolerance.error
    dtypes = {t.name: t.dtype for g in report.manifest.graphs for t in (*g.inputs, *g.outputs)}
    half = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert dtypes["new_k_0"] == dtypes["past_v_1"] == dtypes["cache_1_ffn"] == half
    assert dtypes["f_hat"] == dtypes["logits"] == dtypes["uniform"] == dtypes["modulation_0"] == "float32"
    weights = onnx.load(bundle / "step_01.onnx", load_external_data=False).graph.initializer
    by_name = {w.name: w.data_type for w in weights}
    assert by_name["blocks.0.ffn.fc1.weight"] == {"fp16": 10, "bf16": 16}[precision]
    assert by_name["pos.1"] == onnx.TensorProto.FLOAT


def test_every_graph_points_into_one_weights_file(tiny_bundle: Path, tmp_path: Path) -> None:
    # A copy: other tests link the shared bundle's files, and onnx.checker refuses weights with a second link.
    tiny_bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    manifest = read_manifest(tiny_bundle)
    weights = load_file(tiny_bundle / WEIGHTS_FILE)
    used = set()
    for graph in manifest.graphs:
        onnx.checker.check_model(str(tiny_bundle / graph.file), full_check=True)
        model = onnx.load(tiny_bundle / graph.file, load_external_data=False)
        assert (tiny_bundle / graph.file).stat().st_size < 150_000
        assert [opset.version for opset in model.opset_import if opset.domain == ""] == [23]
        assert {tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in model.graph.input} == {
            i.shape for i in graph.inputs
        }
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                assert {e.key: e.value for e in tensor.external_data}["location"] == WEIGHTS_FILE
                used.add(tensor.name)
            else:
                assert tensor.ByteSize() < 512
    assert used == set(weights)  # nothing is stored that no graph reads
    # Read back by another implementation of the format and of external data.
    model = OnnxFromPath(str(tiny_bundle / "step_02.onnx"))()
    fc1 = next(t for t in model.graph.initializer if t.name == "blocks.1.ffn.fc1.weight")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(fc1), weights["blocks.1.ffn.fc1.weight"])


def test_pruned_steps_hold_the_operator_and_dense_steps_do_not(tiny_bundle: Path) -> None:
    plan = read_manifest(tiny_bundle).resolved_plan
    for scale in plan.steps:
        model = onnx.load(tiny_bundle / f"step_{scale:02d}.onnx", load_external_data=False)
        custom = [node.op_type for node in model.graph.node if node.domain == "fastvar"]
        pruned_sublayers = 2 * sum(plan.prunes(scale, layer) for layer in range(plan.depth))
        assert custom.count("PivotalTokens") == custom.count("RestoreTokens") == pruned_sublayers
        assert {f.name for f in model.functions} == set(custom)
        names = [o.name for o in model.graph.output]
        assert any(n.startswith("new_k") for n in names) == (scale != plan.steps[-1])
        assert ("cache_1_attn" in names) == (scale == plan.cache_scale)


def test_the_manifest_is_complete(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert set(manifest.files) == {p.name for p in tiny_bundle.iterdir() if p.is_file()} - {"manifest.json"}
    for name, spec in manifest.files.items():
        assert spec.sha256 == file_sha256(tiny_bundle / name)
    assert manifest.batches == (1, 2)
    assert {g.file for g in manifest.graphs if g.batch == 2} == {
        "condition_b2.onnx",
        *(f"step_{k:02d}_b2.onnx" for k in range(4)),
        "decoder_b2.onnx",
    }
    assert manifest.operators == {"fastvar": 1}
    assert {"torch", "onnx", "fastvar-trt"} <= set(manifest.tools)


def test_skipped_scale_has_no_graph(tiny_source: VARSource, export_once: Export) -> None:
    plan = PruningPlan("skip", ((-1, 1.0), (-2, 0.25)), cache_scale=1)
    bundle, _ = export_once("skip", tiny_source, ExportOptions(plan=plan))
    assert not (bundle / "step_03.onnx").exists()
    with Pipeline.load(bundle) as pipe:
        assert not verify_bundle(pipe).failures
        result = pipe.generate([1])
    assert [t.shape[1] for t in result.tokens] == [1, 9, 25]
    assert result.images.shape == (1, 128, 128, 3)


@pytest.mark.parametrize(("size_out", "size_in"), [(16, 1), (16, 13), (32, 9), (5, 5), (3, 8)])
def test_resize_matrices_are_torchs(size_out: int, size_in: int) -> None:
    image = torch.randn(2, 3, size_in, size_in, generator=torch.Generator().manual_seed(0))
    for mode, matrix in (("bicubic", bicubic_matrix), ("area", area_matrix)):
        m = matrix(size_out, size_in)
        expected = torch.nn.functional.interpolate(image, size=(size_out, size_out), mode=mode)
        torch.testing.assert_close(m @ image @ m.T, expected, atol=5e-6, rtol=0)


def test_memory_mapped_and_safetensors_checkpoints_give_the_same_bundle(
    tmp_path: Path, tiny_bundle: Path, tiny_source: VARSource
) -> None:
    save_file({k: v.contiguous() for k, v in tiny_source.state.items()}, tmp_path / "var.safetensors")
    save_file({k: v.contiguous() for k, v in tiny_source.vae_state.items()}, tmp_path / "vae.safetensors")
    source = VARSource.from_files(tmp_path / "var.safetensors", tmp_path / "vae.safetensors")
    precision = PRECISIONS["fp32"]
    write_weights(tmp_path, source.shapes(precision, 900), source.tensors(precision, 900))
    assert file_sha256(tmp_path / WEIGHTS_FILE) == read_manifest(tiny_bundle).files[WEIGHTS_FILE].sha256


class _Stop(BaseException):  # as KeyboardInterrupt is
    pass


def _contents(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in folder.iterdir() if p.is_file()}


def test_an_existing_folder_is_refused_and_kept(tiny_source: VARSource, tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export_model(tiny_source, out, ExportOptions())
    with pytest.raises(ExportError, match="not a bundle, so --force does not replace it"):
        export_model(tiny_source, out, ExportOptions(), force=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_an_interrupted_export_keeps_the_old_bundle(
    smallest_source: VARSource, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    shutil.copytree(tiny_bundle, out)
    before = _contents(out)

    def stop(graph: str, phase: str, share: float) -> None:
        if (graph, phase) == ("step_00.onnx", "check"):
            raise _Stop

    with pytest.raises(_Stop):
        export_model(smallest_source, out, ExportOptions(), force=True, progress=stop)
    assert _contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_what_appears_during_an_export_is_kept(smallest_source: VARSource, tmp_path: Path) -> None:
    out = tmp_path / "b"

    def appear(graph: str, phase: str, share: float) -> None:
        if not out.exists():
            out.mkdir()
            (out / "notes.txt").write_text("mine")

    with pytest.raises(ExportError, match="exists already"):
        export_model(smallest_source, out, ExportOptions(), progress=appear)
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_manifest_of_another_kind_makes_no_bundle(tiny_source: VARSource, tmp_path: Path) -> None:
    out = tmp_path / "web"
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(ExportError, match="not a bundle, so --force does not replace it"):
        export_model(tiny_source, out, ExportOptions(), force=True)
    assert [p.name for p in out.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("stop", [OSError(30, "Read-only file system"), KeyboardInterrupt()])
def test_a_swap_that_fails_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    target = tmp_path / "b"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def fail(self: Path, other: Path) -> Path:
        if "partial" in self.name:
            raise stop
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(stop)), temporary_folder(target) as folder:
        replace_folder(folder, target)
    assert (target / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from fastvar_trt.export.folders import replace_folder, temporary_folder
target, moment = Path(sys.argv[1]), sys.argv[2]
original = Path.rename
def rename(self, other):
    if moment == "between" and "partial" in self.name:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, other)
    if moment == "after" and "partial" in self.name:
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename
with temporary_folder(target) as folder:
    (folder / "new").touch()
    if moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace_folder(folder, target)
"""


@pytest.mark.parametrize(("moment", "there"), [("before", "old"), ("between", "old"), ("after", "new")])
def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, moment: str, there: str) -> None:
    target = tmp_path / "b"
    target.mkdir()
    (target / "old").touch()
    done = subprocess.run([sys.executable, "-c", _KILLED, str(target), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 1
    with temporary_folder(tmp_path / "other"), temporary_folder(target) as living:  # the name alone tells nothing
        assert [p.name for p in target.iterdir()] == [there]
        with temporary_folder(target):
            assert living.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with temporary_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
        replace_folder(folder, tmp_path / "link")
    assert [p.name for p in (tmp_path / "link").iterdir()] == ["new"]
    assert (tmp_path / "real" / "old").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link"}


def test_force_replaces_a_bundle(smallest_source: VARSource, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    shutil.copytree(tiny_bundle, out)
    export_model(smallest_source, out, ExportOptions(), force=True)
    assert read_manifest(out).default.schedule == ((2, 2),)
    assert not (out / "step_01.onnx").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_graph_that_differs_from_pytorch_fails_the_export(
    smallest_source: VARSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = validation.run_in_onnxruntime

    def wrong(folder: Path, spec: Any, model: Any, inputs: Any) -> validation.GraphOutputs:
        outputs = original(folder, spec, model, inputs)
        if spec.file == "decoder.onnx":
            outputs.tensors["image"][0, 2, 1, 3] += 0.5
        return outputs

    monkeypatch.setattr(exporter, "run_in_onnxruntime", wrong)
    with pytest.raises(ExportError, match=r"decoder.onnx: image: maximum error 0\.5"):
        export_model(smallest_source, tmp_path / "b", ExportOptions())
    assert list(tmp_path.iterdir()) == []


def _last_step(bundle: Path) -> tuple[GraphFunction, dict[str, torch.Tensor], Path, ir.Model]:
    """The pruned last step of the tiny bundle, with inputs for it."""
    model, manifest = load_bundle_model(bundle)
    function = exporter.chain_functions(model, manifest.resolved_plan, 1)[-2]
    generator = torch.Generator().manual_seed(0)
    request = vars(default_request(model, 1, greedy=True))
    inputs = {
        i.name: request[i.name] if i.name in request else torch.randn(i.shape, generator=generator)
        for i in function.spec.inputs
    }
    return function, inputs, bundle, ir.load(bundle / function.spec.file)


def test_a_selection_that_is_not_pytorchs_fails_the_export(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundle, bundle)
    function, inputs, folder, graph = _last_step(bundle)
    got = run_in_onnxruntime(folder, function.spec, graph, inputs)
    assert len(got.selections) == 2 * 1  # attn and ffn of the one pruned layer
    assert validation.compare_with_torch(function, inputs, got, FP32.tolerance).selection_shortfall == 0
    others = [i for i in range(max(function.layers.items())[1].num_tokens) if i not in got.selections[0][0].tolist()]
    got.selections[0][0, :3] = torch.tensor(others[:3])
    with pytest.raises(ExportError, match="the pivotal tokens of one sublayer are not those of PyTorch"):
        validation.compare_with_torch(function, inputs, got, FP32.tolerance)


def test_one_token_at_the_edge_of_a_selection_is_no_mismatch(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a near-tie falls the other way, the outputs differ altogether; on the same tokens they agree."""
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundle, bundle)
    function, inputs, folder, graph = _last_step(bundle)
    got = run_in_onnxruntime(folder, function.spec, graph, inputs)
    original, calls = torch.argsort, []

    def swapped(score: torch.Tensor, **options: Any) -> torch.Tensor:
        order = original(score, **options)
        if not calls:
            keep = got.selections[0].shape[1]
            order[0, [keep - 1, keep]] = order[0, [keep, keep - 1]]
        calls.append(score)
        return order

    monkeypatch.setattr("fastvar_trt.plugins.torch_ops.torch.argsort", swapped)
    expected = function.run(inputs, COMPUTE)
    with pytest.raises(ExportError, match="maximum error"):
        validation.compare_graph(function, expected, got.tensors, FP32.tolerance)
    calls.clear()
    error = validation.compare_with_torch(function, inputs, got, FP32.tolerance)
    assert error.relative_error < PRECISIONS["fp32"].tolerance.error


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_not_finite_is_a_mismatch(tiny_source: VARSource, wrong: float) -> None:
    model = VAR(tiny_source.config, tiny_source.vae_config, FP32)
    function = exporter.chain_functions(model, TINY_PLAN.resolve(tiny_source.config.schedule, 2), 1)[0]
    with pytest.raises(ExportError, match="start: maximum error"):
        validation.compare_graph(
            function, {"start": torch.ones(2)}, {"start": torch.tensor([1.0, wrong])}, FP32.tolerance
        )


def test_no_disk_space_is_seen_before_writing(
    tiny_source: VARSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match="1 MiB free, the bundle needs about"):
        export_model(tiny_source, tmp_path / "b", ExportOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing(
    smallest_source: VARSource, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b"
    shutil.copytree(tiny_bundle, out)
    before = _contents(out)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporter, "save_graph", full)
    with pytest.raises(ExportError, match="the disk is full"):
        export_model(smallest_source, out, ExportOptions(), force=True)
    assert _contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_plan_that_does_not_fit_is_refused_before_writing(tiny_source: VARSource, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="scale 7 does not exist"):
        export_model(tiny_source, tmp_path / "b", ExportOptions(plan=PruningPlan("p", ((7, 0.5),), 1)))
    assert list(tmp_path.iterdir()) == []


def test_top_k_is_bounded_by_the_vocabulary(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert manifest.sampling.max_top_k == manifest.model.vocab_size == 96


def test_the_public_sizes_are_read_from_the_state_dict() -> None:
    state, vae_state = random_checkpoint(
        depth=3, width=192, num_heads=3, patch_nums=(1, 2, 6), num_classes=7, vocab_size=64, vae_channels=32
    )
    source = VARSource.from_state(state, vae_state)
    config = source.config
    assert (config.depth, config.width, config.num_heads, config.mlp_width) == (3, 192, 3, 768)
    assert (config.num_classes, config.vocab_size, config.patch_nums) == (7, 64, (1, 2, 6))
    assert source.vae_config.level_channels == (32, 32, 64, 64, 128)
    assert json.dumps(config.schedule) == "[[1, 1], [2, 2], [6, 6]]"


def test_how_many_tokens_may_fall_otherwise() -> None:
    fp32, fp16, bf16 = (PRECISIONS[name].tolerance for name in ("fp32", "fp16", "bf16"))
    assert fp32.may_change(10_000, are_bits=False) == 0.01
    assert fp32.may_change(1, are_bits=False) == 0.01  # none of one
    assert bf16.may_change(10_000, are_bits=True) == 0.1
    assert bf16.may_change(8, are_bits=True) == 0.25  # two of the first step's eight bits
    assert fp16.may_change(10_000, are_bits=True) == 0.02


def test_an_export_without_pytorch_says_so(
    tiny_source: VARSource, export_once: Callable[..., tuple[Path, ExportReport]], tmp_path: Path
) -> None:
    """Its graphs are those of an export with it, and PyTorch can draw the known answers later."""
    compared, _ = export_once("tiny", tiny_source, ExportOptions(plan=TINY_PLAN, batches=(1, 2)))
    quick = tmp_path / "quick"
    report = export_model(tiny_source, quick, ExportOptions(plan=TINY_PLAN, batches=(1, 2), compare=False))
    assert not report.errors and REFERENCE_FILE not in report.manifest.files
    assert set(report.traced) == {graph.file for graph in report.manifest.graphs}
    assert {name: spec.sha256 for name, spec in report.manifest.files.items()} == {
        name: spec.sha256 for name, spec in read_manifest(compared).files.items() if name != REFERENCE_FILE
    }
    again = tmp_path / "again"
    assert REFERENCE_FILE not in export_again(quick, again, DENSE).manifest.files
    with Pipeline.load(quick) as pipe, pytest.raises(BundleError, match="was exported with --no-compare"):
        verify_bundle(pipe)
    add_reference(quick, torch.device("cpu"))
    with Pipeline.load(quick) as pipe:
        assert not verify_bundle(pipe).failures
    with np.load(quick / REFERENCE_FILE) as ours, np.load(compared / REFERENCE_FILE) as theirs:
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
