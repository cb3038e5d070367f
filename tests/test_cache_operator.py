"""The operators: numpy oracle, torch definition and ONNX function bodies of all targets against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fastvar_trt.plugins import (
    DOMAIN,
    OPERATORS,
    VERSION,
    cuda_functions,
    onnx_functions,
    oracle,
    tensorrt_functions,
    torch_ops,
)

OPSET = 23
ONNX_TYPE = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


BODIES = {"onnxruntime": onnx_functions, "cuda": cuda_functions, "tensorrt": tensorrt_functions}
SELECTING = ("onnxruntime", "tensorrt")  # those with a body of their own
bodies = pytest.mark.parametrize("body", list(BODIES))


def run_body(
    body: str, operator: str, inputs: dict[str, np.ndarray], output: np.ndarray, **attributes: Any
) -> np.ndarray:
    """One node of the operator, a target's body run by ONNX Runtime; `output` has the expected shape and dtype."""
    functions = {f.name: f for module in (onnx_functions, BODIES[body]) for f in module.function_protos(OPSET)}
    graph = helper.make_graph(
        [helper.make_node(operator, list(inputs), ["out"], domain=DOMAIN, **attributes)],
        "g",
        [helper.make_tensor_value_info(n, ONNX_TYPE[str(a.dtype)], a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("out", ONNX_TYPE[str(output.dtype)], output.shape)],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=list(functions.values()),
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Any = session.run(None, inputs)[0]
    return np.asarray(result)


@pytest.mark.parametrize(("length", "keep"), [(5000, 3841), (4096, 4096)])
@pytest.mark.parametrize("body", SELECTING)
def test_many_tokens(body: str, length: int, keep: int) -> None:
    """More than TensorRT's TopK takes (3840); equal scores go to the lower position."""
    x = np.random.default_rng(0).normal(size=(2, length, 6)).astype(np.float32)
    x[1] = np.round(x[1])  # many equal scores
    score = np.square(x - x.mean(axis=1, keepdims=True)).sum(-1)
    expected = oracle.pivotal_tokens(x, keep)
    got = run_body(body, "PivotalTokens", {"x": x}, expected, keep=keep)
    assert (np.diff(got, axis=1) > 0).all()
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(np.sort(score[1, got[1]]), np.sort(score[1, expected[1]]), rtol=1e-5)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 24))


def separated(x: np.ndarray, keep: int) -> bool:
    """Whether the K-th and the next score are apart by more than rounding, so that there is one right answer."""
    deviation = x.astype(np.float64) - x.astype(np.float64).mean(axis=1, keepdims=True)
    score = np.sort(np.square(deviation).sum(-1), axis=1)[:, ::-1]
    return keep == x.shape[1] or bool(np.all(score[:, keep - 1] - score[:, keep] > 1e-4 * score[:, 0]))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), st.data(), st.sampled_from(["float32", "float16"]))
def test_pivotal_tokens_agree(shape: tuple[int, int, int], seed: int, data: st.DataObject, dtype: str) -> None:
    x = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    keep = data.draw(st.integers(1, shape[1]))
    if not separated(x, keep):
        return
    expected = oracle.pivotal_tokens(x, keep)
    np.testing.assert_array_equal(torch_ops.pivotal_tokens(torch.from_numpy(x), keep).numpy(), expected)
    for body in SELECTING:
        np.testing.assert_array_equal(run_body(body, "PivotalTokens", {"x": x}, expected, keep=keep), expected)


def test_pivotal_tokens_known_answer() -> None:
    x = np.zeros((1, 6, 1), np.float32)
    x[0, 4], x[0, 1] = 10.0, -9.0  # far from the mean on both sides
    assert oracle.pivotal_tokens(x, 2).tolist() == [[1, 4]]


@pytest.mark.parametrize("keep", [1, 3, 5, 8])
def test_ties_go_to_the_lower_position(keep: int) -> None:
    # Two groups of equal scores, exact in fp32: +-2 (far) and +-1 (near), mean 0.
    x = np.array([1, -2, -1, 2, 1, 2, -1, -2], np.float32).reshape(1, 8, 1)
    far, near = [1, 3, 5, 7], [0, 2, 4, 6]
    expected = np.array([sorted((far + near)[:keep])])
    np.testing.assert_array_equal(oracle.pivotal_tokens(x, keep), expected)
    np.testing.assert_array_equal(torch_ops.pivotal_tokens(torch.from_numpy(x), keep).numpy(), expected)
    for body in SELECTING:
        np.testing.assert_array_equal(run_body(body, "PivotalTokens", {"x": x}, expected, keep=keep), expected)


def test_score_does_not_overflow_in_half(rng: np.random.Generator) -> None:
    x = (rng.normal(size=(2, 30, 64)) * 300).astype(np.float16)  # the sum of squares passes 65504
    expected = oracle.pivotal_tokens(x, 7)
    assert not np.array_equal(expected, np.tile(np.arange(7), (2, 1)))  # what equal infinite scores would give
    np.testing.assert_array_equal(torch_ops.pivotal_tokens(torch.from_numpy(x), 7).numpy(), expected)
    for body in SELECTING:
        np.testing.assert_array_equal(run_body(body, "PivotalTokens", {"x": x}, expected, keep=7), expected)


@pytest.mark.parametrize("keep", [0, 6])
def test_keep_out_of_range(keep: int) -> None:
    x = np.zeros((1, 5, 2), np.float32)
    with pytest.raises(ValueError, match=f"got {keep}, expected 1..5"):
        oracle.pivotal_tokens(x, keep)
    with pytest.raises(ValueError, match=f"got {keep}, expected 1..5"):
        torch_ops.pivotal_tokens(torch.from_numpy(x), keep)


def random_indices(rng: np.random.Generator, batch: int, length: int, keep: int) -> np.ndarray:
    return np.stack([np.sort(rng.permutation(length)[:keep]) for _ in range(batch)]).astype(np.int64)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), st.data(), st.sampled_from(["float32", "float16"]))
def test_gather_tokens_agree(shape: tuple[int, int, int], seed: int, data: st.DataObject, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(dtype)
    indices = random_indices(rng, shape[0], shape[1], data.draw(st.integers(1, shape[1])))
    expected = oracle.gather_tokens(x, indices)
    assert all((expected[b, i] == x[b, indices[b, i]]).all() for b in range(shape[0]) for i in range(indices.shape[1]))
    got = torch_ops.gather_tokens(torch.from_numpy(x), torch.from_numpy(indices))
    np.testing.assert_array_equal(got.numpy(), expected)
    np.testing.assert_array_equal(
        run_body("onnxruntime", "GatherTokens", {"x": x, "indices": indices}, expected), expected
    )


grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(
    grids,
    grids,
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.data(),
    st.sampled_from(["float32", "float16"]),
)
def test_restore_tokens_agree(
    grid: tuple[int, int],
    cached_grid: tuple[int, int],
    batch: int,
    channels: int,
    seed: int,
    data: st.DataObject,
    dtype: str,
) -> None:
    rng = np.random.default_rng(seed)
    (h, w), (ch, cw) = grid, cached_grid
    keep = data.draw(st.one_of(st.just(1), st.just(h * w), st.integers(1, h * w)))
    computed = rng.normal(size=(batch, keep, channels)).astype(dtype)
    cached = rng.normal(size=(batch, ch * cw, channels)).astype(dtype)
    indices = random_indices(rng, batch, h * w, keep)
    sizes = {"h": h, "w": w, "cached_h": ch, "cached_w": cw}
    expected = oracle.restore_tokens(computed, indices, cached, **sizes)
    got = torch_ops.restore_tokens(*(torch.from_numpy(a) for a in (computed, indices, cached)), **sizes)
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == "float16" else {"atol": 2e-6, "rtol": 2e-6}
    np.testing.assert_allclose(got.numpy(), expected, **tolerance)
    inputs = {"computed": computed, "indices": indices, "cached": cached}
    for body in SELECTING if ch <= h and cw <= w else ["onnxruntime"]:
        out = run_body(body, "RestoreTokens", inputs, expected, **sizes)
        np.testing.assert_allclose(out, expected, **tolerance)
        np.testing.assert_array_equal(np.take_along_axis(out, indices[:, :, None], 1), computed)  # scattered exactly


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@bodies
def test_group_norm_is_torchs(body: str, dtype: str, rng: np.random.Generator) -> None:
    x = (rng.normal(size=(2, 12, 5, 7)) * 3 + rng.normal(size=(2, 12, 1, 1))).astype(dtype)
    weight, bias = (rng.normal(size=12).astype(np.float32) for _ in range(2))
    attributes = {"num_groups": 3, "epsilon": 1e-6}
    expected = torch_ops.group_norm(*(torch.from_numpy(a) for a in (x, weight, bias)), **attributes).numpy()
    assert expected.dtype == dtype
    got = run_body(body, "GroupNorm", {"x": x, "weight": weight, "bias": bias}, expected, **attributes)
    np.testing.assert_allclose(got, expected, atol=2e-2 if dtype == "float16" else 2e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
@bodies
def test_upsample_conv_is_torchs(body: str, size: tuple[int, int], rng: np.random.Generator) -> None:
    """The borders, too: four phases see no other zeros than the doubled map does."""
    x = rng.normal(size=(2, 6, *size)).astype(np.float32)
    weight, bias = rng.normal(size=(4, 6, 3, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    expected = torch_ops.upsample_conv(*(torch.from_numpy(a) for a in (x, weight, bias))).numpy()
    assert expected.shape == (2, 4, 2 * size[0], 2 * size[1])
    got = run_body(body, "UpsampleConv", {"x": x, "weight": weight, "bias": bias}, expected)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "cached"), [((13, 13), (10, 10)), ((6, 9), (4, 6)), ((5, 7), (5, 7)), ((3, 4), (8, 8))]
)
def test_area_interpolation_is_torchs(rng: np.random.Generator, grid: tuple[int, int], cached: tuple[int, int]) -> None:
    (h, w), (ch, cw) = grid, cached
    image = rng.normal(size=(2, 5, ch, cw)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(image), size=grid, mode="area").flatten(2).transpose(1, 2).numpy()
    tokens = image.reshape(2, 5, ch * cw).transpose(0, 2, 1)
    computed, indices = expected[:, :1] * 0, np.zeros((2, 1), np.int64)  # one token, overwritten below
    out = oracle.restore_tokens(computed, indices, tokens, h=h, w=w, cached_h=ch, cached_w=cw)
    np.testing.assert_allclose(out[:, 1:], expected[:, 1:], atol=1e-6)


def test_function_names_do_not_collide_with_builtin_operators() -> None:
    builtin = {schema.name for schema in onnx.defs.get_all_schemas()}
    protos = [proto for module in BODIES.values() for proto in module.function_protos(OPSET)]
    assert {p.name for p in protos} == set(OPERATORS)
    assert not builtin & set(OPERATORS)
    assert all(name for p in protos for node in p.node for name in node.output)  # TensorRT needs every name
