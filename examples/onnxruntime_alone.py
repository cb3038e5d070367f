"""A bundle's graphs without this package: python onnxruntime_alone.py BUNDLE "two blue cubes on snow" OUT.png.

What the runtime does, as plainly as it can be said: run the graphs in the manifest's order, hand on what they write,
and find every input by its role. (Nothing is shared, so keys and values are copied at every step.) Needs numpy, Pillow,
onnxruntime and tokenizers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

DTYPES = {"float32": np.float32, "int32": np.int32, "int64": np.int64, "uint8": np.uint8, "bool": np.bool_}


def run(bundle: Path, graph: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """One graph."""
    session = onnxruntime.InferenceSession(bundle / graph["file"], providers=["CPUExecutionProvider"])
    names = [output["name"] for output in graph["outputs"]]
    return dict(zip(names, session.run(names, inputs), strict=True))


def encode(bundle: Path, manifest: dict[str, Any], prompt: str) -> dict[str, Any]:
    """A prompt to the inputs of the condition graph; the second row is the model's own, for guidance."""
    length = manifest["model"]["text_length"]
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(prompt).ids
    padded = np.zeros((1, length), dtype=np.int64)
    padded[0, : len(ids)] = ids
    (encoder,) = (graph for graph in manifest["auxiliary"] if graph["kind"] == "text_encoder")
    count = np.array([len(ids)], dtype=np.int64)
    features = run(bundle, encoder, {"token_ids": padded, "token_count": count})["encoded"]
    rows = np.zeros((2, length, features.shape[-1]), dtype=np.float32)
    rows[0, : len(ids)] = features[0, : len(ids)]
    lengths = np.array([len(ids)] * 2, dtype=np.int64)
    return {"text_features": rows, "text_lengths": lengths, "negative": np.array([False])}


def draw(bundle: Path, prompt: str) -> np.ndarray:
    """The likeliest picture (greedy, so no noise is needed): uint8 [H, W, 3]."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    condition = encode(bundle, manifest, prompt)
    sampling = manifest["sampling"]
    request = {**{name: sampling[name] for name in ("cfg", "temperature", "top_k", "top_p")}, "greedy": True}
    state: dict[str, Any] = {}  # by name: what graphs read later
    kept: dict[tuple[str, int], np.ndarray] = {}  # keys and values of a layer, by (role, layer)
    outputs: dict[str, Any] = {}
    for graph in manifest["variants"][0]["graphs"]:
        if graph["batch"] != 1:
            continue
        inputs = {}
        for spec in graph["inputs"]:
            role, name, shape, dtype = spec["role"], spec["name"], spec["shape"], DTYPES[spec["dtype"]]
            if role == "condition":
                inputs[name] = condition[name]
            elif role == "request":
                inputs[name] = np.array([request[name]], dtype=dtype)
            elif role in ("noise", "given"):  # not looked at by a greedy draw; nothing is given
                inputs[name] = np.zeros(shape, dtype)
            elif role in ("keys", "values"):
                inputs[name] = kept[role, spec["layer"]]
            else:  # where guidance has ended, the conditional half
                inputs[name] = state[name if role != "f_hat" else "f_hat"][: shape[0]]
        outputs = run(bundle, graph, inputs)
        for spec in graph["outputs"]:
            role, value = spec["role"], outputs[spec["name"]]
            if role in ("keys", "values"):
                key = role, spec["layer"]
                kept[key] = np.concatenate([kept[key], value]) if key in kept else value
            else:
                state["f_hat" if role == "f_hat" else spec["name"]] = value
    return outputs["pixels"][0]


if __name__ == "__main__":
    Image.fromarray(draw(Path(sys.argv[1]), sys.argv[2])).save(sys.argv[3])
