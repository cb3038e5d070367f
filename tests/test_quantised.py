"""Matrices of few bits: what is written, that graphs multiply with it exactly, what engines make of it, bad input."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from conftest import INFINITY_MAPS, INFINITY_PLAN, TINY_PLAN, Golden, run, thorough, tiny_infinity, tiny_states, told_by
from fastvar_trt.export.build.registry import build_targets
from fastvar_trt.export.build.tensorrt.builder import RtxBuilder
from fastvar_trt.export.exporter import ExportOptions, ExportReport, export_again, export_model, load_bundle_model
from fastvar_trt.export.models.base import Request
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.models.matrix import FORMATS, Quantised, observing
from fastvar_trt.export.models.reference import generate
from fastvar_trt.export.models.source import Source
from fastvar_trt.export.models.var.code import CoDeSource
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.export.passes.integer_products import IntegerProducts
from fastvar_trt.export.validation import tolerance_of
from fastvar_trt.export.weights_file import map_weights
from fastvar_trt.runtime import BundleError, ExportError, Pipeline, PlanError, read_manifest
from fastvar_trt.runtime.engines import read_engines
from fastvar_trt.runtime.layout import kv_bytes
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, Manifest, Role
from fastvar_trt.runtime.plan import PruningPlan
from fastvar_trt.runtime.precision import PRECISIONS
from fastvar_trt.runtime.verify import verify_bundle
from fastvar_trt.runtime.weights import read_layout
from fastvar_trt.tools.cli import main as fastvar
from fastvar_trt.tools.cli.export import main as fastvar_export
from fastvar_trt.tools.measure.profiling import step_bytes

Export = Callable[..., tuple[Path, ExportReport]]
QUANTISED = ("w8", "w4", "w8a8", "fp8")
BITS = {"w8": 8, "w4": 4, "w8a8": 8, "fp8": 8}


@pytest.fixture
def quantised(tiny_source: VARSource, export_once: Export) -> Callable[[str], Path]:
    def export(precision: str) -> Path:
        return export_once(precision, tiny_source, ExportOptions(plan=TINY_PLAN, precision=precision))[0]

    return export


def dequantised(tensors: Mapping[str, Tensor], linear: str) -> np.ndarray[Any, Any]:
    """A matrix [out, in] in fp32, by numpy alone, from what the file holds."""
    q, scale = (tensors[f"{linear}.{part}"].contiguous() for part in ("weight_q", "weight_scale"))
    if q.dtype == torch.uint8:  # two to a byte, the first in the lower half
        packed = q.numpy()
        values = np.empty((packed.shape[0], 2 * packed.shape[1]), dtype=np.int32)
        values[:, 0::2], values[:, 1::2] = packed & 15, packed >> 4
        values[values > 7] -= 16
    else:
        values = q.float().numpy()
    scales = scale.numpy()
    if scales.ndim == 2:
        scales = np.repeat(scales, len(values) // len(scales), axis=0)
    return (values * scales).T.astype(np.float32)


@pytest.mark.parametrize("precision", QUANTISED)
def test_matrices_lie_in_the_file_once_in_few_bits(
    precision: str, quantised: Callable[[str], Path], tiny_bundle: Path
) -> None:
    bundle = quantised(precision)
    ours, plain = read_layout(bundle / WEIGHTS_FILE), read_layout(tiny_bundle / WEIGHTS_FILE)
    tensors, before = map_weights(bundle), map_weights(tiny_bundle)
    linears = [name.removesuffix(".weight_q") for name in ours if name.endswith(".weight_q")]
    in_blocks = [linear for linear in linears if linear.endswith(("mat_qkv", "attn.proj", "fc1", "fc2"))]
    assert len(in_blocks) == 8 and "head" not in linears and "head.weight" in ours
    for linear in in_blocks:
        assert f"{linear}.weight" not in ours
        assert ours[f"{linear}.weight_q"].num_bytes * 32 == BITS[precision] * plain[f"{linear}.weight"].num_bytes
        exact, rounded = before[f"{linear}.weight"].numpy(), dequantised(tensors, linear)
        error = np.abs(rounded - exact).mean() / np.abs(exact).mean()
        assert error < {"w4": 0.15, "fp8": 0.04}.get(precision, 0.015)


@pytest.mark.parametrize("precision", QUANTISED)
def test_graphs_compute_what_pytorch_computes(precision: str, quantised: Callable[[str], Path]) -> None:
    """To rounding, as long as nothing lies near a tie; and as a chain, prepacked or not."""
    bundle = quantised(precision)
    with Pipeline.load(bundle) as pipe:
        found = verify_bundle(pipe)
    assert not found.failures
    first = found.steps[0]
    assert first.relative_error is not None and first.relative_error < (2e-2 if precision == "fp8" else 1e-5)


def test_graphs_may_differ_as_far_as_they_round(
    quantised: Callable[[str], Path], tiny_source: VARSource, export_once: Export
) -> None:
    """As fp32 does, unless activations are rounded before a product; kept keys and values are rounded at the end."""
    bundles = {precision: quantised(precision) for precision in ("w8", "w4", "w8a8")}
    options = ExportOptions(TINY_PLAN, integer_kv=True)
    bundles["integer_kv"], report = export_once("kv_var_True", tiny_source, options)
    for name, bundle in bundles.items():
        manifest = read_manifest(bundle)
        for graph in manifest.graphs:
            rounds = name == "w8a8" and graph.scale is not None
            expected = (manifest.own_precision if rounds else PRECISIONS["fp32"]).tolerance
            assert tolerance_of(ir.load(bundle / graph.file), manifest.own_precision) == expected, (name, graph.file)
    assert max(error.relative_error for error in report.errors.values()) < 1e-4


GOLDENS = {"var_d4_256": "w8", "infinity_d4_006M": "w4", "infinity_d4_006M again": "w8", "var_d4_256 again": "w4"}


@pytest.mark.parametrize("case", [thorough(case) if "again" in case else case for case in GOLDENS])
def test_tokens_are_those_of_a_model_of_the_same_weights(case: str, export_once: Export) -> None:
    """An fp32 model over matrices that numpy dequantised draws what the bundle draws, token for token."""
    golden, precision = Golden(case.removesuffix(" again")), GOLDENS[case]
    source: Source
    if case.startswith("var"):
        source = golden.source()
        inputs = {"labels": torch.tensor(golden.case["labels"][:1])}
        arguments: dict[str, Any] = {"labels": golden.case["labels"][:1]}
    else:
        source = InfinitySource.from_files(golden.folder / "infinity.pth", golden.vae, golden.case["pn"])
        features = golden.expected["text_features"]
        arguments = {"text_features": [features], "temperature": golden.case["tau"]}
        padded = torch.zeros(2, source.config.text_length, source.config.text_width)
        padded[0, : len(features)] = torch.from_numpy(features)
        lengths = torch.full((2,), len(features))
        inputs = {"text_features": padded, "text_lengths": lengths, "has_negative": torch.tensor([False])}
    bundle, _ = export_once(f"{precision}_golden", source, ExportOptions(precision=precision, compare=False))
    with Pipeline.load(bundle, engines="off") as pipe:
        drawn = pipe.generate(cfg=golden.case["cfg"], greedy=True, return_logits=True, **arguments)
    held = map_weights(bundle)
    tensors = {name: tensor for name, tensor in held.items() if not name.endswith((".weight_q", ".weight_scale"))}
    for linear in [name.removesuffix(".weight_q") for name in held if name.endswith(".weight_q")]:
        tensors[f"{linear}.weight"] = torch.from_numpy(dequantised(held, linear))
    model = source.new_model(PRECISIONS["fp32"]).load_tensors(tensors)
    names = [spec.name for spec in model.condition_inputs(1)]
    plan = model.resolve(PruningPlan())
    noise = {k: torch.zeros(1, *model.token_spec(k)[0]) for k in plan.steps}
    ones = torch.ones(1)
    request = Request(
        ones * golden.case["cfg"], ones * golden.case.get("tau", 1.0), ones.long(), ones, torch.tensor([True])
    )
    expected = generate(model, plan, dict(zip(names, inputs.values(), strict=True)), noise, request)
    assert drawn.logits is not None
    for k in plan.steps:
        np.testing.assert_array_equal(drawn.tokens[k], expected.tokens[k].numpy(), err_msg=f"scale {k}")
        np.testing.assert_allclose(drawn.logits[k], expected.logits[k].numpy(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("precision", ["w8", "w4", "w8a8"])
def test_the_cpu_multiplies_in_few_bits(
    precision: str, quantised: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(quantised(precision), tmp_path / "b"))
    rewritten, serialize = [], ir.serde.serialize_model

    def measured(model: ir.Model) -> Any:
        rewritten.append(serialize(model))
        return rewritten[-1]

    monkeypatch.setattr(ir.serde, "serialize_model", measured)
    build_targets(bundle, "cpu")
    matrix = min(place.num_bytes for name, place in read_layout(bundle / WEIGHTS_FILE).items() if "weight_q" in name)
    constants = [constant for proto in rewritten for constant in proto.graph.initializer]
    assert constants and all(len(constant.raw_data) < matrix for constant in constants)  # protobuf ends at 2 GiB
    for graph in read_manifest(bundle).graphs:
        nodes = onnx.load(bundle / "engines" / "cpu" / graph.file, load_external_data=False).graph.node
        operators = [node.op_type for node in nodes]
        assert "DequantizeLinear" not in operators, graph.file
        if graph.scale is not None:
            assert operators.count("MatMulIntegerToFloat" if precision == "w8a8" else "MatMulNBits") == 8
    with Pipeline.load(bundle, engines="require") as packed, Pipeline.load(bundle, engines="off") as plain:
        assert not verify_bundle(packed).failures
        a, b = (pipe.generate([1], seeds=1, return_logits=True) for pipe in (packed, plain))
    assert a.logits is not None and b.logits is not None
    assert np.abs(a.logits[0] - b.logits[0]).max() < 0.05 * np.abs(b.logits[0]).max()


def test_linked_weights_are_named(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    """A model repository of Triton links a bundle's files; onnx_ir would raise a ValueError."""
    bundle = Path(shutil.copytree(quantised("w8"), tmp_path / "b"))
    (tmp_path / "link").hardlink_to(bundle / WEIGHTS_FILE)
    for target in ("cpu", "cuda"):
        done = CliRunner().invoke(fastvar, ["build", str(bundle), "--target", target])
        assert done.exit_code == 1 and "has several links" in done.output and "cp -r" in done.output


@pytest.mark.parametrize("has_vnni", [True, False])
def test_products_of_integers_are_exact(has_vnni: bool, rng: np.random.Generator) -> None:
    """With int8 matrices, or uint8 ones, where pairs of products would saturate: the standard's form, to rounding."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    q = rng.choice(np.array([-127, 127], dtype=np.int8), (64, 48))
    x = rng.choice(np.array([-1.27, 1.27], dtype=np.float32), (5, 64))
    constants: dict[str, Any] = {"s": rng.random(48, dtype=np.float32), "xs": np.float32(0.01), "xz": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs"], ["xd"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        helper.make_node("Gemm", ["xd", "w", "b"], ["y"], name="product"),
    ]
    values = {"q": q, "b": rng.random(48, dtype=np.float32), **constants}
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 64])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 48])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=11,
    )
    proto = onnx.shape_inference.infer_shapes(proto)
    model = ir.serde.deserialize_model(proto)
    assert IntegerProducts(has_vnni=has_vnni)(model).modified
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "MatMulIntegerToFloat"]
    rewritten = ir.serde.serialize_model(model).SerializeToString()
    got = onnxruntime.InferenceSession(rewritten, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]
    exact = (x / 0.01).round() @ q.astype(np.float32) * constants["s"] * np.float32(0.01) + values["b"]
    if has_vnni:
        from fastvar_trt.runtime.backends.onnxruntime import cpu_has_vnni

        if not cpu_has_vnni():
            pytest.skip("this processor adds pairs of products in 16 bits, which saturate")
    np.testing.assert_allclose(got, exact, rtol=1e-5)


def test_scales_of_activations_are_the_largest_that_were_seen(tiny_source: VARSource, tmp_path: Path) -> None:
    """Of the classes that were given: drawn once more in fp32, nothing is larger, and one thing is as large."""
    export_model(
        tiny_source, tmp_path / "b", ExportOptions(plan=TINY_PLAN, precision="w8a8", compare=False, calibration=(5, 7))
    )
    model, manifest = load_bundle_model(tmp_path / "b")
    scales = {id(p): float(p) for name, p in model.named_parameters() if name.endswith("input_scale")}
    assert len(scales) == 8 and all(0 < scale < 10 for scale in scales.values())
    seen = dict.fromkeys(scales, 0.0)

    def observe(linear: str, tensors: Mapping[str, Tensor], x: Tensor) -> None:
        key = id(tensors.get(f"{linear}.input_scale"))
        if key in seen:
            seen[key] = max(seen[key], float(x.abs().max()) / 127)

    from fastvar_trt.export.models.reference import default_request
    from fastvar_trt.runtime.noise import uniform_noise

    plan = manifest.resolved_plan
    with observing(observe):
        for i, label in enumerate((5, 7)):
            noise = {k: torch.from_numpy(uniform_noise(i, k, model.token_spec(k)[0]))[None] for k in plan.steps}
            generate(model, plan, {"labels": torch.tensor([label])}, noise, default_request(model, 1, greedy=False))
    assert seen == pytest.approx(scales, rel=1e-5)


def test_scales_are_found_again_for_another_plan(tiny_source: VARSource, tmp_path: Path) -> None:
    """With a scale that was skipped, activations are smaller: those of a fresh export are found."""
    short = PruningPlan("short", ((-1, 1.0),))
    export_model(tiny_source, tmp_path / "short", ExportOptions(short, "w8a8", compare=False))
    export_again(tmp_path / "short", tmp_path / "again", PruningPlan())
    export_model(tiny_source, tmp_path / "dense", ExportOptions(PruningPlan(), "w8a8", compare=False))
    before, again, dense = (
        {name: float(x) for name, x in map_weights(tmp_path / bundle).items() if name.endswith("input_scale")}
        for bundle in ("short", "again", "dense")
    )
    assert again == dense != before


def test_a_bundle_keeps_what_it_was_calibrated_with(tiny_source: VARSource, tmp_path: Path) -> None:
    """Whatever else changes; `--calibrate` alone makes another one, whose graphs are the same."""
    export_model(tiny_source, tmp_path / "b", ExportOptions(TINY_PLAN, "w8a8", compare=False, calibration=(5,)))
    export_again(tmp_path / "b", tmp_path / "more", batches=(1, 2))
    arguments = ["bundle", "--from", tmp_path / "b", "--calibrate", "7", "--out", tmp_path / "other"]
    assert "(0 traced)" in told_by(fastvar_export, *arguments)
    before, more, other = (map_weights(tmp_path / bundle) for bundle in ("b", "more", "other"))
    assert all(torch.equal(before[name], more[name]) for name in before)
    changed = {name for name in before if not torch.equal(before[name], other[name])}
    assert changed and all(name.endswith("input_scale") for name in changed)
    assert [read_manifest(tmp_path / bundle).calibration for bundle in ("b", "more", "other")] == [(5,), (5,), (7,)]


def test_scales_hold_at_all_sizes(tmp_path: Path) -> None:
    """The largest that are seen at any of three sizes, neither of the first alone nor of the last."""
    shortened = [INFINITY_MAPS[:count] for count in (3, 4, 2)]
    sizes = [(tiny_infinity(maps), PruningPlan()) for maps in shortened]

    def scales(name: str, chosen: Sequence[tuple[InfinitySource, PruningPlan]]) -> dict[str, float]:
        (source, plan), *more = chosen
        export_model(source, tmp_path / name, ExportOptions(plan, compare=False, integer_kv=True), more=more)
        return {name: float(x) for name, x in map_weights(tmp_path / name).items() if name.endswith("input_scale")}

    alone = [scales(str(i), [size]) for i, size in enumerate(sizes)]
    together = scales("all", sizes)
    assert together == {name: max(own[name] for own in alone) for name in alone[0]}
    assert together not in (alone[0], alone[2])


def test_a_bundle_becomes_one_of_few_bits(tiny_bundle: Path, quantised: Callable[[str], Path], tmp_path: Path) -> None:
    """By the command, with another plan at once; the weights are those that an export of the checkpoint writes."""
    arguments = [
        "bundle",
        "--from",
        str(tiny_bundle),
        "--precision",
        "w8",
        "--batch",
        "1",
        "--out",
        str(tmp_path / "b"),
    ]
    done = CliRunner().invoke(fastvar_export, arguments)
    assert done.exit_code == 0, done.output
    ours, theirs = map_weights(tmp_path / "b"), map_weights(quantised("w8"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    export_again(tmp_path / "b", tmp_path / "dense", PruningPlan())
    dense = read_manifest(tmp_path / "dense")
    assert (dense.precision, dense.default.plan.name) == ("w8", "none")
    shown = CliRunner().invoke(fastvar, ["inspect", str(tmp_path / "b")]).output
    assert "blocks.*.ffn.fc1" in shown and "w8" in shown


def test_a_step_reads_what_is_stored(quantised: Callable[[str], Path], tiny_source: VARSource, tmp_path: Path) -> None:
    """Bytes of the smallest step: matrices of two layers with their scales, the head and keys and values in fp32."""
    qkv, proj, fc1, fc2 = (128, 384), (128, 128), (128, 512), (512, 128)
    others = 4 * 128 * 96 + 4 * 2 * 2 * 128 * 2

    def of_layers(weight: float, *shapes: tuple[int, int], block: int = 0) -> float:
        return 2 * sum(
            weight * rows * columns + 4 * columns * (rows // block if block else 1) for rows, columns in shapes
        )

    plain = tmp_path / "plain"
    exception = ExportOptions(TINY_PLAN, "w8", matrices=(("ffn.fc2", "plain"),), compare=False)
    export_model(tiny_source, plain, exception)
    for bundle, expected in (
        (quantised("w8"), of_layers(1, qkv, proj, fc1, fc2)),
        (quantised("w4"), of_layers(0.5, qkv, proj, fc1, fc2, block=64)),
        (plain, of_layers(1, qkv, proj, fc1) + 2 * 4 * 512 * 128),
    ):
        found = step_bytes(read_manifest(bundle), read_layout(bundle / WEIGHTS_FILE), 0, 1)
        assert found == expected + others, bundle.name
    shown = CliRunner().invoke(fastvar, ["inspect", str(plain)]).output
    assert re.search(r"blocks\.\*\.ffn\.fc2 +float32 +2 +32\.00 +0\.50 +0\.00", shown), shown


def test_what_text_models_round(export_once: Export, tmp_path: Path) -> None:
    bundle, report = export_once("infinity_w8a8", tiny_infinity(), ExportOptions(plan=INFINITY_PLAN, precision="w8a8"))
    assert {report.errors[file].relative_error < 1e-4 for file in ("condition.onnx", "decoder.onnx")} == {True}
    names = read_layout(bundle / WEIGHTS_FILE)
    assert "blocks.0.cross.mat_q.input_scale" in names
    assert "blocks.0.cross.mat_kv.weight_q" in names and "blocks.0.cross.mat_kv.input_scale" not in names
    with pytest.raises(ExportError, match="got the class 3, the model draws from text"):
        export_model(tiny_infinity(), tmp_path / "b", ExportOptions(precision="w8a8", calibration=(3,)))


KV_CASES = {
    "var": lambda: (VARSource.from_state(*tiny_states()), TINY_PLAN, "fp32"),
    "infinity": lambda: (tiny_infinity(), dataclasses.replace(INFINITY_PLAN, unguided_from=-1), "w8"),
    "pair": lambda: (_pair(), PruningPlan("late", ((-1, 0.5),), cache_scale=-2, unguided_from=-1), "fp32"),
}


def _pair() -> CoDeSource:
    (drafter, vae), (refiner, _) = tiny_states(depth=3, width=192, num_heads=3), tiny_states()
    return CoDeSource.from_states({"drafter": drafter, "refiner": refiner}, vae, 2)


@pytest.mark.parametrize("name", [name if name == "infinity" else thorough(name) for name in KV_CASES])
def test_keys_and_values_in_8_bits(name: str, export_once: Export, tmp_path: Path) -> None:
    """A quarter of the memory, whatever the plan; close to what is drawn without, and not the same."""
    source, plan, precision = KV_CASES[name]()
    bundles = [
        export_once(f"kv_{name}_{rounded}", source, ExportOptions(plan, precision, integer_kv=rounded))[0]
        for rounded in (True, False)
    ]
    ours, theirs = (read_manifest(bundle) for bundle in bundles)
    assert 4 * kv_bytes(ours.default.chain(1)) == kv_bytes(theirs.default.chain(1))
    assert {spec.dtype for graph in ours.graphs for spec in graph.outputs if spec.role is Role.CACHE} == {"float32"}
    build_targets(Path(shutil.copytree(bundles[0], tmp_path / "b")), "cpu")
    for bundle in (bundles[0], tmp_path / "b"):
        with Pipeline.load(bundle) as pipe:
            assert not verify_bundle(pipe).failures
    condition: dict[str, Any] = {"labels": [1]}
    if name == "infinity":
        condition = {"text_features": [np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)]}
    logits = []
    for bundle in bundles:
        with Pipeline.load(bundle) as pipe:
            found = pipe.generate(**condition, greedy=True, return_logits=True).logits
            assert found is not None
            logits.append(found)
    np.testing.assert_allclose(logits[0][0], logits[1][0], atol=1e-4)  # nothing was kept before
    difference = np.abs(logits[0][1] - logits[1][1]).max() / np.abs(logits[1][1]).max()
    assert 1e-5 < difference < 0.05
    if name == "var":
        export_again(bundles[0], tmp_path / "c", precision="w8")
        export_again(bundles[0], tmp_path / "d", PruningPlan())
        for again, precision in (("c", "w8"), ("d", "fp32")):
            found = read_manifest(tmp_path / again)
            assert (found.integer_kv, found.precision) == (True, precision)


def test_keys_and_values_in_8_bits_cost_tensorrt_a_launch_per_layer(tiny_source: VARSource, tmp_path: Path) -> None:
    """At most: those of the past are dequantised where they are put in order for attention anyway."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    totals = []
    for rounded in (True, False):
        bundle = tmp_path / str(rounded)
        export_model(tiny_source, bundle, ExportOptions(TINY_PLAN, "fp16", compare=False, integer_kv=rounded))
        build_targets(bundle, "sm86")
        record = read_engines(bundle, "tensorrt_rtx").records["step_02.onnx"]
        totals.append(record.kernels["total"])
        kept = {spec.dtype for spec in record.inputs if spec.name.startswith("past")}
        assert kept == {"int8" if rounded else "float16"}
    assert totals[0] - totals[1] <= 2


def test_exceptions_from_the_format(tiny_source: VARSource, tmp_path: Path) -> None:
    options = ExportOptions(precision="w4", compare=False, matrices=(("ffn.fc2", "plain"), ("attn.*", "w8")))
    export_model(tiny_source, tmp_path / "b", options)
    layout = read_layout(tmp_path / "b" / WEIGHTS_FILE)
    assert "blocks.1.ffn.fc2.weight" in layout
    dtypes = {name: layout[f"blocks.0.{name}.weight_q"].dtype for name in ("attn.proj", "ffn.fc1")}
    assert dtypes == {"attn.proj": "int8", "ffn.fc1": "uint8"}
    with Pipeline.load(tmp_path / "b") as pipe:
        assert pipe.manifest.matrices[:2] == options.matrices
        pipe.generate([1])


def test_a_format_is_known_by_its_numbers(tiny_source: VARSource, tmp_path: Path) -> None:
    """Those of another name than ours, too."""
    coarse, fine = Quantised("coarse", "int4", block=128), Quantised("fine", "float8_e4m3fn")
    added = [dataclasses.replace(PRECISIONS["w8"], name=fmt.name, stored=fmt.name) for fmt in (coarse, fine)]
    with FORMATS.registered(coarse, fine), PRECISIONS.registered(*added):
        with pytest.raises(ExportError, match="sm89: TensorRT dequantises coarse matrices"):
            RtxBuilder(["sm89"]).check_precision(added[0])
        with pytest.raises(ExportError, match="sm86: has no numbers of fine, sm89 is the first"):
            RtxBuilder(["sm89", "sm86"]).check_precision(added[1])
        RtxBuilder(["sm89"]).check_precision(added[1])
        options = ExportOptions(precision="coarse", compare=False, matrices=(("ffn.fc2", "fine"),))
        export_model(tiny_source, tmp_path / "b", options)
        layout = read_layout(tmp_path / "b" / WEIGHTS_FILE)
        assert [layout[f"blocks.0.ffn.fc{i}.weight_q"].dtype for i in (1, 2)] == ["uint8", "float8_e4m3fn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ExportOptions(precision="w8", matrices=(("ffn.fc3", "plain"),)),
            r"matrix ffn.fc3: no linear layer .* ffn.fc2",
        ),
        (ExportOptions(precision="w8", matrices=(("head", "w5"),)), "matrix head: got 'w5', expected one of plain, w8"),
        (ExportOptions(precision="fp16", matrices=(("head", "w8"),)), "fp16 has one format for all"),
        (ExportOptions(precision="w8", matrices=(("class_emb", "w8"),)), "matrix class_emb: no linear layer has such"),
        (ExportOptions(precision="w8-fp16", matrices=(("head", "float32"),)), "matrix head: got 'float32'"),
        (ExportOptions(precision="w8", calibration=(1,)), "calibration: nothing has a scale in w8"),
        (ExportOptions(precision="w8a8", calibration=("a cat",)), "got the prompt 'a cat', the model draws classes"),
        (ExportOptions(precision="w8a8", calibration=(4000,)), "class 4000: the model has 0 to"),
    ],
)
def test_options_that_do_not_fit(options: ExportOptions, message: str, tiny_source: VARSource, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(tiny_source, tmp_path / "b", options)
    assert not list(tmp_path.iterdir())


def test_weights_that_no_format_holds(tmp_path: Path) -> None:
    state, vae = tiny_states()
    state["blocks.1.ffn.fc1.weight"][3, 4] = torch.nan
    with pytest.raises(ExportError, match=r"blocks\.1\.ffn\.fc1: the matrix holds numbers that are not finite"):
        export_model(VARSource.from_state(state, vae), tmp_path / "b", ExportOptions(precision="w8"))
    narrow = VARSource.from_state(*tiny_states(width=96))
    options = ExportOptions(precision="w4", compare=False, matrices=(("attn.*", "plain"),))
    with pytest.raises(
        ExportError, match=r"not of whole blocks of 64, which w4 needs; leave it out with --matrix ffn\.fc1=plain"
    ):
        export_model(narrow, tmp_path / "b", options)
    assert not list(tmp_path.iterdir())
    followed = dataclasses.replace(options, matrices=(*options.matrices, ("ffn.fc1", "plain")))
    export_model(narrow, tmp_path / "b", followed)
    assert "blocks.0.ffn.fc2.weight_q" in read_layout(tmp_path / "b" / WEIGHTS_FILE)


def test_numbers_that_are_none_are_not_calibrated_away(tmp_path: Path) -> None:
    state, vae = tiny_states()
    state["class_emb.weight"][:] = torch.nan
    with pytest.raises(ExportError, match=r"calibration: what blocks\.0\.attn\.mat_qkv takes is not finite"):
        export_model(VARSource.from_state(state, vae), tmp_path / "b", ExportOptions(precision="w8a8", compare=False))
    assert not list(tmp_path.iterdir())


def test_exceptions_hold_for_both_models_of_a_pair(tmp_path: Path) -> None:
    options = ExportOptions(precision="w8", compare=False, matrices=(("head", "w8"), ("ffn.fc2", "plain")))
    export_model(_pair(), tmp_path / "b", options)
    layout = read_layout(tmp_path / "b" / WEIGHTS_FILE)
    assert {"drafter.head.weight_q", "refiner.head.weight_q"} <= layout.keys()
    assert {f"blocks.{i}.ffn.fc2.weight" for i in range(5)} <= layout.keys()
    manifest = read_manifest(tmp_path / "b")
    for scale, width, layers in ((0, 192, range(3)), (3, 128, range(3, 5))):  # each model's own layers and head
        keys = sum(
            manifest.resolved_plan.num_past(scale, layer) + manifest.resolved_plan.kept(scale, layer)
            for layer in layers
        )
        of_layer = 8 * width**2 + 4 * 4 * width**2 + 4 * 8 * width  # three matrices with scales, and fc2
        expected = len(layers) * of_layer + 96 * width + 4 * 96 + 4 * 2 * 2 * width * keys
        expected += 4 * 32 * width if scale else 0  # the embedding
        assert step_bytes(manifest, layout, scale, 1) == expected
    with Pipeline.load(tmp_path / "b") as pipe:
        pipe.generate([1])


@pytest.mark.parametrize(
    "change", [{"matrices": ["ab"]}, {"matrices": [["head", "w5"]]}, {"integer_kv": "false"}, {"calibration": [1.5]}]
)
def test_a_damaged_manifest(change: dict[str, Any], tiny_bundle: Path) -> None:
    data = read_manifest(tiny_bundle).to_json()
    with pytest.raises(BundleError, match=f"damaged .*{next(iter(change))}"):
        Manifest.from_json({**data, **change}, "manifest.json")


def test_the_precision_that_a_bundle_has_already(tiny_source: VARSource, tmp_path: Path) -> None:
    """Its own exceptions stay, and its graphs, where keys and values do."""
    export_model(
        tiny_source, tmp_path / "w8", ExportOptions(TINY_PLAN, "w8", matrices=(("ffn.fc2", "plain"),), compare=False)
    )
    assert not export_again(tmp_path / "w8", tmp_path / "same", precision="w8").traced
    export_again(tmp_path / "w8", tmp_path / "kv", precision="w8", integer_kv=True)
    found = read_manifest(tmp_path / "kv")
    assert found.integer_kv and found.matrices == read_manifest(tmp_path / "w8").matrices
    with pytest.raises(ExportError, match=r"matrix: bundle .*w8 is w8 already; take what it was made of"):
        export_again(tmp_path / "w8", tmp_path / "b", precision="w8", matrices=(("ffn.fc1", "plain"),))


def test_bundles_that_cannot_be_rounded(quantised: Callable[[str], Path], tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is w8, and rounding twice loses more"):
        export_again(quantised("w8"), tmp_path / "b", precision="w4")
    with pytest.raises(ExportError, match="is fp32, and w8-fp16 computes in float16"):
        export_again(tiny_bundle, tmp_path / "b", precision="w8-fp16")
    with pytest.raises(PlanError):
        export_again(tiny_bundle, tmp_path / "b", PruningPlan("x", ((9, 0.5),), cache_scale=-2), precision="w8")
    done = CliRunner().invoke(fastvar_export, ["bundle", "--from", str(tiny_bundle), "--out", str(tmp_path / "b")])
    assert (
        done.exit_code == 2
        and "--prune, --precision, --integer-kv, --calibrate, --batch or --checkpoint" in done.output
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("precision", "kind"),
    [thorough("w8-fp16", "gemm_dequantising"), ("w8a8-bf16", "gemm_8_bit"), thorough("fp8-fp16", "gemm_8_bit")],
)
def test_engines_multiply_in_few_bits(precision: str, kind: str, tmp_path: Path) -> None:
    """With the matrices as inputs, shared by all engines: they hold none of them."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    states = tiny_states(width=256, num_heads=4)
    export_model(
        VARSource.from_state(*states), tmp_path / "b", ExportOptions(TINY_PLAN, precision=precision, compare=False)
    )
    build_targets(tmp_path / "b", "sm89,sm120")
    layout = read_layout(tmp_path / "b" / WEIGHTS_FILE)
    for record in read_engines(tmp_path / "b", "tensorrt_rtx").records.values():
        if record.graph.startswith("step"):
            assert record.kernels[kind] == 8, record.graph
            bound = [name for name in record.weights if name.endswith("weight_q")]
            assert len(bound) == 8 and all(layout[name].num_bytes >= 16 << 10 for name in bound)
    if precision.startswith("fp8"):
        before = (tmp_path / "b" / "engines" / "tensorrt_rtx" / "engines.json").read_bytes()
        done = CliRunner().invoke(fastvar, ["build", str(tmp_path / "b"), "--target", "sm86"])
        assert done.exit_code == 1 and "sm86: has no numbers of fp8, sm89 is the first" in done.output
        assert (tmp_path / "b" / "engines" / "tensorrt_rtx" / "engines.json").read_bytes() == before


def test_a_format_that_is_none_is_refused_first(tmp_path: Path) -> None:
    """Before what is asked of a target, and before the model is there."""
    arguments = ["scenes", "--precision", "w8", "--matrix", "ffn.fc2=fp16", "--target", "sm86"]
    done = run(fastvar_export, *arguments, "--out", tmp_path / "b")
    assert done.exit_code == 1 and "matrix ffn.fc2: got 'fp16', expected one of plain" in done.output
    assert not list(tmp_path.iterdir())


def test_engines_refuse_four_bits(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    """TensorRT would hold more of them than of eight bits; before anything is exported or built."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    done = CliRunner().invoke(fastvar, ["build", str(quantised("w4")), "--target", "sm86"])
    assert done.exit_code == 1 and "--target sm86: TensorRT dequantises w4 matrices" in done.output
    arguments = ["scenes", "--target", "sm86", "--out", str(tmp_path / "b")]
    done = CliRunner().invoke(fastvar_export, [*arguments, "--precision", "w4-fp16"])
    assert done.exit_code == 1 and "take w8" in done.output and not list(tmp_path.iterdir())
    options = ExportOptions(precision="w8", compare=False, matrices=(("ffn.fc2", "w4"),))
    export_model(VARSource.from_state(*tiny_states()), tmp_path / "w8", options)
    arguments = ["bundle", "--from", str(tmp_path / "w8"), "--precision", "w8", "--integer-kv"]  # its exception stays
    done = CliRunner().invoke(fastvar_export, [*arguments, "--target", "sm86", "--out", str(tmp_path / "b")])
    assert done.exit_code == 1 and "--target sm86: TensorRT dequantises w4 matrices" in done.output
    assert not (tmp_path / "b").exists()
