"""The Python backend of Triton Inference Server: its interface around a `Pipeline`.

Triton forms the batches. Written against the documented interface of the Python backend and tested with a stand-in for
it; it has not been run in a real server.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # Triton puts it beside model.py

from fastvar_trt.runtime.errors import FastVARError
from fastvar_trt.runtime.pipeline import Pipeline

_INPUTS = {
    "LABEL": "labels",
    "PROMPT": "prompts",
    "NEGATIVE_PROMPT": "negative_prompts",
    "TEXT_FEATURES": "text_features",
    "NEGATIVE_TEXT_FEATURES": "negative_text_features",
    "SEED": "seeds",
    "CFG": "cfg",
    "TEMPERATURE": "temperature",
    "TOP_P": "top_p",
    "TOP_K": "top_k",
}
_ARGUMENTS = tuple(_INPUTS.values())


class TritonPythonModel:
    """What Triton looks for in `model.py`; one per instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle beside `model.py`.

        Args:
            args: of Triton: `model_config` (JSON), `model_repository` (the model's folder), `model_version`,
                `model_instance_kind`, `model_instance_device_id`. The parameters `backend` and `device` of the
                configuration are those of `Pipeline.load`; an instance of kind GPU without `device` gets its own GPU.
        """
        parameters = json.loads(args["model_config"]).get("parameters", {})
        values = {key: parameter.get("string_value", "") for key, parameter in parameters.items()}
        device = values.get("device") or None
        if device is None and args["model_instance_kind"] == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._pipe = Pipeline.load(bundle, backend=values.get("backend") or "onnxruntime", device=device)
        self._pipe.warm_up()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Draw the images of several requests together, one response each.

        Args:
            requests: `InferenceRequest`s, inputs [n, ...] as in `config.pbtxt`.
        """
        accepted: dict[int, dict[str, list[Any]]] = {}
        responses: dict[int, Any] = {}
        for i, request in enumerate(requests):
            try:
                arguments = _arguments(request)
                self._pipe.check(**_given(arguments))
                accepted[i] = arguments
            except (FastVARError, UnicodeDecodeError) as error:
                responses[i] = _failure(error)
        if accepted:
            responses |= self._draw(accepted)
        return [responses[i] for i in range(len(requests))]

    def finalize(self) -> None:
        """Release the bundle."""
        self._pipe.close()

    def _draw(self, requests: dict[int, dict[str, list[Any]]]) -> dict[int, Any]:
        """The responses; where drawing them together fails, each is drawn alone."""
        together = {key: [v for arguments in requests.values() for v in arguments[key]] for key in _ARGUMENTS}
        try:
            images = self._pipe.generate(**_given(together)).images
        except Exception as error:
            if len(requests) == 1:
                return {i: _failure(error) for i in requests}
            return {i: self._draw({i: arguments})[i] for i, arguments in requests.items()}
        responses, start = {}, 0
        for i, arguments in requests.items():
            seeds = arguments["seeds"]
            tensors = [
                pb_utils.Tensor("IMAGE", np.ascontiguousarray(images[start : start + len(seeds)])),
                pb_utils.Tensor("SEED_USED", np.array(seeds, dtype=np.uint64)[:, None]),
            ]
            responses[i] = pb_utils.InferenceResponse(output_tensors=tensors)
            start += len(seeds)
        return responses


def _arguments(request: Any) -> dict[str, list[Any]]:
    """The inputs of a request as arguments of `Pipeline.generate`, one value per image; None for what is left out."""
    arguments: dict[str, list[Any] | None] = {}
    for name, argument in _INPUTS.items():
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        array = None if tensor is None else tensor.as_numpy()
        if array is None or array.ndim == 3:  # text features: [n, tokens, width]
            arguments[argument] = None if array is None else list(array)
        else:
            arguments[argument] = [v.decode() if isinstance(v, bytes) else v for v in array[:, 0].tolist()]
    count = max(len(values) for values in arguments.values() if values is not None)
    filled: dict[str, list[Any]] = {key: values or [None] * count for key, values in arguments.items()}
    filled["seeds"] = [secrets.randbits(32) if seed is None else seed for seed in filled["seeds"]]
    return filled


def _given(arguments: dict[str, list[Any]]) -> dict[str, Any]:
    """Without those that no image has."""
    return {key: values for key, values in arguments.items() if any(value is not None for value in values)}


def _failure(error: Exception) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))
