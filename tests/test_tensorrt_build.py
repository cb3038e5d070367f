"""Engines by TensorRT for RTX, built here without a GPU: what is fused, what is read and written."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from conftest import INFINITY_PLAN, TINY_PLAN, tiny_infinity, tiny_states
from fastvar_trt.export.build.base import BuildReport, Progress, build_bundle, no_progress
from fastvar_trt.export.build.registry import parse_targets
from fastvar_trt.export.build.tensorrt import builder
from fastvar_trt.export.build.tensorrt.builder import EnterpriseBuilder, RtxBuilder, tensorrt_graph
from fastvar_trt.export.build.tensorrt.engine import BuiltEngine, build_engine
from fastvar_trt.export.build.tensorrt.flavour import RTX_TARGETS, Flavour
from fastvar_trt.export.build.tensorrt.layers import read_activation_bytes, read_layers
from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.models.var.code import CoDeSource
from fastvar_trt.export.models.var.source import VARSource
from fastvar_trt.plugins import DOMAIN, VERSION, onnx_functions, tensorrt_functions
from fastvar_trt.runtime.engines import EngineLayer, EngineRecord, read_engines
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.runtime.plan import PruningPlan
from fastvar_trt.tools.cli import main
from fastvar_trt.tools.measure.estimate import Gpu, _times
from fastvar_trt.tools.measure.work import chain_multiply_adds

KINDS = ("total", "attention", "gemm_bias_gelu", "gemm_8_bit", "gemm_dequantising")

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def build_tensorrt(bundle: Path, *targets: str, progress: Progress = no_progress) -> BuildReport:
    return build_bundle(bundle, RtxBuilder(targets), progress)


@pytest.fixture(scope="module")
def half_bundle(
    tiny_source: VARSource,
    export_once: Callable[..., tuple[Path, ExportReport]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    shared, _ = export_once("tiny_fp16", tiny_source, ExportOptions(plan=TINY_PLAN, precision="fp16"))
    return Path(shutil.copytree(shared, tmp_path_factory.mktemp("tensorrt") / "half"))


@pytest.fixture(scope="module")
def engines(half_bundle: Path) -> dict[str, EngineRecord]:
    report = build_tensorrt(half_bundle, "sm86", "sm89")
    assert len(report.built) == len(read_manifest(half_bundle).graphs) and not report.kept
    return dict(read_engines(half_bundle, "tensorrt_rtx").records)


def test_every_graph_becomes_an_engine(half_bundle: Path, engines: dict[str, EngineRecord]) -> None:
    manifest = read_manifest(half_bundle)
    assert set(engines) == {graph.file for graph in manifest.graphs}
    for graph in manifest.graphs:
        record = engines[graph.file]
        assert record.targets == ("sm86", "sm89")
        read = {(s.name, s.shape, s.dtype) for s in record.inputs if s.name not in record.weights}
        assert read == {(s.name, s.shape, s.dtype) for s in graph.inputs}
        assert {(s.name, s.shape, s.dtype) for s in record.outputs} == {
            (s.name, s.shape, s.dtype) for s in graph.outputs
        }
        there = read_engines(half_bundle, "tensorrt_rtx")
        assert not there.problem(manifest, graph.file, record.built_with, "sm89", check_hash=True)


def test_attention_and_gelu_are_fused(engines: dict[str, EngineRecord]) -> None:
    for k in range(4):
        kernels = engines[f"step_{k:02d}.onnx"].kernels
        assert kernels["attention"] == 2, "one per layer"
        assert kernels["gemm_bias_gelu"] == 2, "one per layer"
        assert kernels["total"] > 10


def test_keys_values_and_caches_are_half(engines: dict[str, EngineRecord]) -> None:
    last = engines["step_03.onnx"]
    dtypes = {spec.name: spec.dtype for spec in (*last.inputs, *engines["step_02.onnx"].outputs)}
    for name in ("past_k_0", "past_v_1", "cache_1_attn", "new_k_0", "blocks.0.attn.mat_qkv.weight"):
        assert dtypes[name] == "float16", name
    for name in ("f_hat", "f_hat_out", "modulation_0", "uniform", "logits"):
        assert dtypes[name] == "float32", name
    assert dtypes["tokens"] == "int32" and dtypes["greedy"] == dtypes["finite"] == "bool"


def test_large_weights_are_inputs(half_bundle: Path) -> None:
    for k in range(4):
        serialized, weights = tensorrt_graph(half_bundle / f"step_{k:02d}.onnx")
        large = {f"blocks.{i}.{m}.weight" for i in (0, 1) for m in ("attn.mat_qkv", "ffn.fc1")}
        assert large <= {spec.name for spec in weights}
        model = onnx.load_from_string(serialized)
        onnx.checker.check_model(model)
        inside = {i.name: len(i.raw_data) for i in model.graph.initializer}
        assert sum(inside.values()) < 80_000, inside  # convolutions of phi, interpolation, ranks
        shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
        assert shapes["blocks.0.ffn.fc1.bias"] == [1, 512]


def test_fp32_attention_may_be_decomposed(tiny_bundle: Path, half_bundle: Path) -> None:
    for bundle, expected in ((tiny_bundle, 2), (half_bundle, 0)):
        model = onnx.load_from_string(tensorrt_graph(bundle / "step_02.onnx")[0])
        marked = [a for node in model.graph.node for a in node.attribute if a.name == "TRT_decomposable"]
        assert len(marked) == expected


def test_an_fp32_bundle_builds_too(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "b")
    report = build_tensorrt(tmp_path / "b", "sm86")
    assert len(report.built) == 12


def test_the_parser_names_what_it_refuses(half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(half_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("engines"))

    def with_unknown_operator(path: Path, *, plugins: bool) -> object:
        assert not plugins  # TensorRT for RTX has none
        serialized, weights = tensorrt_graph(path)
        model = onnx.load_from_string(serialized)
        model.graph.node[0].op_type = "NoSuchOperator"
        return model.SerializeToString(), weights

    monkeypatch.setattr(builder, "tensorrt_graph", with_unknown_operator)
    with pytest.raises(ExportError, match=r"condition\.onnx: tensorrt_rtx .* does not accept .*NoSuchOperator"):
        build_tensorrt(tmp_path / "b", "sm86")
    assert not read_engines(tmp_path / "b", "tensorrt_rtx").records


def test_ctrl_c_cancels_a_build(half_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(half_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("engines"))

    def interrupt(graph: str, phase: str, share: float) -> None:
        if graph == "step_01.onnx":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_tensorrt(tmp_path / "b", "sm86", progress=interrupt)
    assert set(read_engines(tmp_path / "b", "tensorrt_rtx").records) == {"condition.onnx", "step_00.onnx"}


def test_targets() -> None:
    kinds = [(type(found), found.targets) for found in parse_targets(f"{','.join(RTX_TARGETS)},current")]
    assert kinds == [(RtxBuilder, RTX_TARGETS), (EnterpriseBuilder, ("current",))]
    for targets in ("sm90", "sm86,sm90", ""):
        with pytest.raises(ExportError, match="--target: got"):
            parse_targets(targets)


def test_build_command(half_bundle: Path, engines: dict[str, EngineRecord]) -> None:
    done = CliRunner().invoke(main, ["build", str(half_bundle), "--target", "sm86"])
    assert done.exit_code == 0, done.output
    assert "up to date; nothing to build" in done.output
    refused = CliRunner().invoke(main, ["build", str(half_bundle), "--target", "sm86,h100"])
    assert refused.exit_code == 1 and "--target: got 'h100', expected one or more of cpu" in refused.output
    assert "sm75, sm80, sm86, sm89, sm120, sm121 (TensorRT for RTX, on any machine)" in refused.output


def test_inspect_shows_the_engines(half_bundle: Path, engines: dict[str, EngineRecord]) -> None:
    done = CliRunner().invoke(main, ["inspect", str(half_bundle)])
    assert done.exit_code == 0, done.output
    assert "tensorrt_rtx" in done.output and "sm86, sm89" in done.output
    row = next(line for line in done.output.splitlines() if line.startswith("step_03.engine"))
    kernels = engines["step_03.onnx"].kernels
    assert row.split()[-6:] == [str(kernels[key]) for key in (*KINDS, "plugins")]
    data = json.loads((half_bundle / "engines" / "tensorrt_rtx" / "engines.json").read_text())
    assert len(data["engines"]) == 6


def test_layers_are_read_from_the_build(half_bundle: Path, engines: dict[str, EngineRecord]) -> None:
    """Their arithmetic is what is counted from the model's sizes, and their kinds are those of the graph."""
    manifest = read_manifest(half_bundle)
    for record in engines.values():
        assert record.kernels["total"] == len(record.layers) > 0
        assert record.activation_bytes > 0 and all(layer.num_bytes > 0 for layer in record.layers if layer.flop)
    steps = [graph for graph in manifest.default.chain(1) if graph.scale is not None]
    layers = [layer for graph in steps for layer in engines[graph.file].layers if layer.kind in ("linear", "attention")]
    assert sum(layer.flop for layer in layers) == pytest.approx(
        2 * chain_multiply_adds(manifest.model, manifest.resolved_plan), rel=0.05
    )
    kinds = {name: Counter(layer.kind for layer in record.layers) for name, record in engines.items()}
    assert kinds["step_03.onnx"]["attention"] == 2
    assert kinds["step_03.onnx"]["sort"] == kinds["step_02.onnx"]["sort"] == 1  # that of top-k in the draw
    assert kinds["step_03.onnx"]["selection"] and kinds["step_03.onnx"]["restoring"]
    assert not kinds["step_02.onnx"]["selection"] and not kinds["step_02.onnx"]["restoring"]
    # A doubled map is convolved in four parts; norms are one kernel with the SiLU behind them.
    decoder = engines["decoder.onnx"].layers
    upsampled = [node for node in onnx.load(half_bundle / "decoder.onnx").graph.node if node.op_type == "UpsampleConv"]
    convolutions = [node for node in onnx.load(half_bundle / "decoder.onnx").graph.node if node.op_type == "Conv"]
    assert kinds["decoder.onnx"]["convolution"] >= len(convolutions) + 4 * len(upsampled) - 8  # 1x1 ones are products
    assert any("SiluGnor" in layer.name for layer in decoder)


def test_the_arithmetic_of_the_decoder_is_that_of_its_graph(
    half_bundle: Path, engines: dict[str, EngineRecord]
) -> None:
    graph = ir.load(half_bundle / "decoder.onnx").graph
    counted = 0
    for node in graph:
        shapes = [value.shape.numpy() for value in node.inputs if value is not None and value.shape is not None]
        written = math.prod(node.outputs[0].shape.numpy()) if node.outputs[0].shape is not None else 0
        if node.op_type == "Conv":
            counted += 2 * written * math.prod(shapes[1][1:])
        elif node.op_type == "UpsampleConv":  # four kernels of 2x2, for a quarter of the pixels each
            counted += 2 * written * shapes[1][1] * 4
        elif node.op_type == "MatMul":
            counted += 2 * written * shapes[0][-1]
    flop = sum(layer.flop for layer in engines["decoder.onnx"].layers)
    assert flop == pytest.approx(counted, rel=0.05) and counted > 1e9


def test_a_layer_of_the_log() -> None:
    def tensor(name: str, shape: str, dtype: str) -> str:
        return (
            f"{{ Name: {name}, Dimensions: [{shape}], Strides: [1], StrideOrder: [0], Datatype: {dtype}, Format: x }}"
        )

    def line(name: str, kind: str, inputs: list[str], outputs: list[str], metadata: str = "") -> str:
        return (
            f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(inputs)}], Constants: [], Outputs: "
            f"[ {', '.join(outputs)}], TacticName: t, StreamId: 0, Metadata: {metadata}"
        )

    half = "Half"
    product = line(
        "__myl_FcAdd_myl0_1",
        "runtime_fusion",
        [tensor("bias", "1,512", half), tensor("x", "50,128", half), tensor("w", "128,512", half)],
        [tensor("y", "50,512", half)],
    )
    scatter = line(
        "__myl_Scat_myl0_2",
        "kgen",
        [tensor("map", "100,8", "Float"), tensor("rows", "5,1", "Int64"), tensor("new", "5,8", "Float")],
        [tensor("map", "100,8", "Float")],
        "[ONNX Layer: n | node (RestoreTokens)]",
    )
    attention = line(
        "_gemm_mha_v2_myl0_3",
        "kgen",
        [tensor("q", "4,10,32", half), tensor("k", "4,32,20", half), tensor("v", "4,20,32", half)],
        [tensor("o", "4,10,32", half)],
    )
    signal = "Name: a^signal, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
    signal += "EventId: 1, Metadata: "
    compare = line(
        "__myl_ReshEqlGtrLtAndOrCastSum_myl0_4",
        "kgen",
        [tensor("score", "2,100", "Float")],
        [tensor("rank", "2,100", "Float")],
        "[ONNX Layer: n | node (PivotalTokens)]",
    )
    odd = line("_gemm_mha_v2_myl0_5", "kgen", [tensor("q", "4,10,32", half)], [tensor("o", "4,10,32", half)])
    added = line(
        "__myl_CorrAdd_7",
        "correlation",
        [
            tensor("x", "1,8,64,64", half),
            tensor("w", "8,8,3,3", half),
            tensor("bias", "1,8,1,1", half),
            tensor("residual", "1,8,64,64", half),
        ],
        [tensor("y", "1,8,64,64", half)],
    )
    empty = line("node_conv2d_6", "correlation", [tensor("x", "1,8,4,4", half)], [tensor("y", "1,8,4,4", half)])
    log = "\n".join(
        [
            "Name: nothing",
            product,
            signal,
            scatter,
            attention,
            compare,
            odd,
            empty,
            added,
            "Max Scratch Memory: 4096 bytes",
            "",
        ]
    )
    assert read_layers(log) == (
        EngineLayer("__myl_FcAdd_myl0_1", "linear", "float16", 2 * (512 + 6400 + 65536 + 25600), 2 * 50 * 128 * 512),
        EngineLayer("__myl_Scat_myl0_2", "restoring", "float32", 5 * 8 + 4 * 40, 0),  # written in place: rows only
        EngineLayer(
            "_gemm_mha_v2_myl0_3", "attention", "float16", 2 * (1280 + 2560 + 2560 + 1280), 4 * 4 * 10 * 20 * 32
        ),
        EngineLayer("__myl_ReshEqlGtrLtAndOrCastSum_myl0_4", "selection", "float32", 4 * 400, 6 * 2 * 100 * 100),
        # What a release may print otherwise is not counted; no engine is lost for it.
        EngineLayer("_gemm_mha_v2_myl0_5", "attention", "float32", 2 * 2 * 1280, 0),
        EngineLayer("node_conv2d_6", "convolution", "float32", 2 * 2 * 128, 0),
        EngineLayer("__myl_CorrAdd_7", "convolution", "float16", 2 * (3 * 32768 + 576 + 8), 2 * 32768 * 8 * 9),
    )
    assert read_activation_bytes(log) == 4096 and read_activation_bytes("") == 0 and read_layers("") == ()


def test_estimate_command(half_bundle: Path, engines: dict[str, EngineRecord], tmp_path: Path) -> None:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["profile", str(half_bundle), *arguments])

    done = run("--estimate", "rtx3090", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    total = json.loads(done.output.splitlines()[-1])
    assert 0 < total["least_ms"] < total["probable_ms"]
    manifest = read_manifest(half_bundle)
    chain = [graph.file for graph in manifest.default.chain(1)]
    assert total["launches"] == sum(len(engines[file].layers) for file in chain)
    data = json.loads((tmp_path / "out" / "estimate.json").read_text())
    assert set(data["graphs"]) == {Path(file).stem for file in chain}
    assert data["total"]["flop"] == sum(layer.flop for file in chain for layer in engines[file].layers)
    assert (tmp_path / "out" / "estimate.md").read_text().startswith("# Estimate for half on rtx3090")
    refused = run("--estimate", "a100")
    assert refused.exit_code == 1 and "expected an engine for sm80 (a100); run `fastvar build" in refused.output
    assert run("--estimate", "rtx3090", "--operators").exit_code == 2
    assert run("--estimate", "h100").exit_code == 2


def test_estimated_times() -> None:
    gpu = Gpu("x", "sm86", 100.0, 200.0, 0.0, 10.0, 1000.0)
    layers = (
        EngineLayer("product", "linear", "float16", 10**6, 10**12),  # 10 ms of arithmetic
        EngineLayer("product", "linear", "float32", 10**6, 10**12),  # 100 ms outside tensor cores
        EngineLayer("copy", "copy", "float32", 10**9, 0),  # 1 ms of bandwidth
        EngineLayer("little", "other", "float32", 10, 0),
        EngineLayer("sort", "sort", "float32", 10, 0),
    )
    times = [_times(layer, gpu) for layer in layers]
    assert [round(least, 6) for least, _ in times] == [10, 100, 1, 0, 0]
    probable = [10 / 0.75, 100 / 0.75, 1 / 0.85, 0.0025, 0.05]
    assert [most for _, most in times] == pytest.approx([ms + 0.001 for ms in probable])


def test_plugins_take_the_place_of_the_functions(half_bundle: Path) -> None:
    """For enterprise TensorRT, which cannot be run here: the graph names them as its parser wants it."""
    model = onnx.load_from_string(tensorrt_graph(half_bundle / "step_03.onnx", plugins=True)[0])
    assert {function.name for function in model.functions} <= {"GroupNorm", "UpsampleConv"}  # which have no plugin
    nodes = [node for node in model.graph.node if node.domain == "fastvar"]
    kinds = Counter(node.op_type for node in nodes)
    # One pruned layer: selected, gathered and restored once for each of its two sublayers.
    assert kinds == dict.fromkeys(("TokenMean", "TokenScore", "SelectTokens", "GatherTokens", "RestoreTokensAdd"), 2)
    produced = {i.name for i in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:  # in order, and nothing is missing
        assert set(node.input) - {""} <= produced, node.op_type
        produced |= set(node.output)
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes.pop("plugin_namespace") == b"fastvar"
        if node.op_type == "SelectTokens":
            assert attributes == {"keep": 32}
        if node.op_type == "RestoreTokensAdd":
            assert len(node.input) == 4
            assert attributes == {"h": 8, "w": 8, "cached_h": 5, "cached_w": 5}


def test_infinity_builds(export_once: Callable[..., tuple[Path, ExportReport]], tmp_path: Path) -> None:
    """Pruned, with text of any length masked: self- and cross-attention are fused."""
    shared, report = export_once("infinity_fp16", tiny_infinity(), ExportOptions(plan=INFINITY_PLAN, precision="fp16"))
    bundle = Path(shutil.copytree(shared, tmp_path / "b"))
    build_tensorrt(bundle, "sm86")
    engines = read_engines(bundle, "tensorrt_rtx").records
    assert set(engines) == {graph.file for graph in report.manifest.graphs}
    for k in report.manifest.resolved_plan.steps:
        kernels = engines[f"step_{k:02d}.onnx"].kernels
        assert kernels["attention"] == 4, "two per layer"
        assert kernels["gemm_bias_gelu"] == 2, "one per layer"


@pytest.mark.thorough
def test_a_pair_of_models_builds(export_once: Callable[..., tuple[Path, ExportReport]], tmp_path: Path) -> None:
    """The refiner's first step has an attention per scale; after it a step restores from it, without guidance."""
    (drafter, vae), (refiner, _) = tiny_states(depth=3, width=192, num_heads=3), tiny_states()
    source = CoDeSource.from_states({"drafter": drafter, "refiner": refiner}, vae, 2)
    plan = PruningPlan("late", ((-1, 0.5),), cache_scale=-2, unguided_from=-1)
    shared, report = export_once("pair_fp16", source, ExportOptions(plan=plan, precision="fp16", compare=False))
    bundle = Path(shutil.copytree(shared, tmp_path / "b"))
    build_tensorrt(bundle, "sm86")
    engines = read_engines(bundle, "tensorrt_rtx").records
    assert set(engines) == {graph.file for graph in report.manifest.graphs}
    attentions = [engines[f"step_{k:02d}.onnx"].kernels["attention"] for k in range(4)]
    assert attentions == [3, 3, 2 * 3, 2], "one per layer, and scale at the switch"


def test_more_pivotal_tokens_than_one_top_k_takes() -> None:
    keep, value = 4000, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("PivotalTokens", ["x"], ["indices"], domain=DOMAIN, keep=keep)],
        "g",
        [value("x", onnx.TensorProto.FLOAT, (2, 4096, 32))],
        [value("indices", onnx.TensorProto.INT64, (2, keep))],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    rtx = Flavour.load(RtxBuilder.folder)

    def build_with(functions: list[onnx.FunctionProto]) -> BuiltEngine:
        model = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
        return build_engine(rtx, model.SerializeToString(), "x", ("sm86",), lambda phase, share: None)

    assert build_with(tensorrt_functions.function_protos(23)).data
    with pytest.raises(ExportError, match=r"built no engine|does not accept"):
        build_with(onnx_functions.function_protos(23))
