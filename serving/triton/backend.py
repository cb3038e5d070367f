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
from fastvar_trt.runtime.request import Request, parameters


class TritonPythonModel:
    """What Triton looks for in `model.py`; one per instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle beside `model.py`.

        Args:
            args: of Triton: `model_config` (JSON), `model_repository` (the model's folder), `model_version`,
                `model_instance_kind`, `model_instance_device_id`. The parameters `backend` and `device` of the
                configuration are those of `Pipeline.load`; an instance of kind GPU without `device` gets its own GPU.
        """
        configured = json.loads(args["model_config"]).get("parameters", {})
        values = {key: entry.get("string_value", "") for key, entry in configured.items()}
        device = values.get("device") or None
        if device is None and args["model_instance_kind"] == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._pipe = Pipeline.load(bundle, backend=values.get("backend") or "onnxruntime", device=device)
        self._pipe.warm_up()
        self._inputs = {name.upper(): name for name in parameters(self._pipe.manifest)}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Draw the images of several requests together, one response each.

        Args:
            requests: `InferenceRequest`s, inputs [n, ...] as in `config.pbtxt`.
        """
        accepted: dict[int, list[Request]] = {}
        responses: dict[int, Any] = {}
        for i, request in enumerate(requests):
            try:
                wanted = self._requests(request)
                self._pipe.check(wanted)
                accepted[i] = wanted
            except (FastVARError, UnicodeDecodeError) as error:
                responses[i] = _failure(error)
        if accepted:
            responses |= self._draw(accepted)
        return [responses[i] for i in range(len(requests))]

    def finalize(self) -> None:
        """Release the bundle."""
        self._pipe.close()

    def _draw(self, accepted: dict[int, list[Request]]) -> dict[int, Any]:
        """The responses; where drawing them together fails, each is drawn alone."""
        try:
            images = self._pipe.draw([request for wanted in accepted.values() for request in wanted]).images
        except Exception as error:
            if len(accepted) == 1:
                return {i: _failure(error) for i in accepted}
            return {i: self._draw({i: wanted})[i] for i, wanted in accepted.items()}
        responses, start = {}, 0
        for i, wanted in accepted.items():
            tensors = [
                pb_utils.Tensor("IMAGE", np.ascontiguousarray(images[start : start + len(wanted)])),
                pb_utils.Tensor("SEED_USED", np.array([[request.seed] for request in wanted], dtype=np.uint64)),
            ]
            responses[i] = pb_utils.InferenceResponse(output_tensors=tensors)
            start += len(wanted)
        return responses

    def _requests(self, request: Any) -> list[Request]:
        """The pictures of one of Triton's requests; a seed that is left out is drawn."""
        given: dict[str, list[Any]] = {}
        for name, field in self._inputs.items():
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                continue
            array = tensor.as_numpy()
            if array.ndim > 2:  # features [n, tokens, width], pictures, masks
                given[field] = list(array)
            else:
                given[field] = [v.decode() if isinstance(v, bytes) else v for v in array[:, 0].tolist()]
        count = max(len(values) for values in given.values())
        given.setdefault("seed", [secrets.randbits(32) for _ in range(count)])
        return [Request(**{field: values[i] for field, values in given.items()}) for i in range(count)]


def _failure(error: Exception) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))
