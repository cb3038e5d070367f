"""Run by `test_flash_attention`, on any ONNX Runtime: what one attention without a mask adds to the peak memory.

Usage: python attention_memory.py; prints MiB without and with the rewrite, and how far their results differ, as
JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from fastvar_trt.export.passes.flash_attention import FlashAttention

QUERIES, KEYS, HEADS, DIM = 2048, 4096, 2, 32  # 64 MiB of scores


def attention() -> ir.Model:
    """One attention of [1, H, L, D] on [1, H, S, D]."""
    shapes = {"q": QUERIES, "k": KEYS, "v": KEYS}
    inputs = [
        ir.Value(name=name, shape=ir.Shape([1, HEADS, n, DIM]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, n in shapes.items()
    ]
    node = ir.node("Attention", inputs, {"scale": 0.5}, name="attention")
    last = ir.node("Identity", node.outputs)
    for name, own in (("attended", node), ("y", last)):
        own.outputs[0].name, own.outputs[0].shape, own.outputs[0].type = name, inputs[0].shape, inputs[0].type
    graph = ir.Graph(inputs, last.outputs, nodes=[node, last], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> tuple[float, Any]:
    """MiB that a run adds to the peak, and the result."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    proto = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {i.name: rng.standard_normal(i.shape, np.float32) for i in session.get_inputs()}
    before = peak_mib()
    (result,) = session.run(None, feeds)
    return peak_mib() - before, result


def peak_mib() -> float:
    """Of resident memory. `getrusage` would begin with that of the process before `exec`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    rewritten = attention()
    assert FlashAttention()(rewritten).modified
    with_rewrite, got = run(rewritten)  # first: the peak only grows
    without, expected = run(attention())
    json.dump({"without": without, "with": with_rewrite, "error": float(np.abs(got - expected).max())}, sys.stdout)
