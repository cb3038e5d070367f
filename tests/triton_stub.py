"""A stand-in for `triton_python_backend_utils`: what NVIDIA documents of the Python backend's interface, and no more.

`StubServer` loads a model as Triton does, and holds requests and responses to the model's `config.pbtxt`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient
from google.protobuf import json_format, text_format

_DTYPES = {
    "TYPE_INT64": np.int64,
    "TYPE_UINT64": np.uint64,
    "TYPE_FP32": np.float32,
    "TYPE_UINT8": np.uint8,
    "TYPE_STRING": np.object_,
    "TYPE_BOOL": np.bool_,
}


class Tensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class InferenceRequest:
    def __init__(self, inputs: list[Tensor]) -> None:
        self._inputs = inputs

    def inputs(self) -> list[Tensor]:
        return self._inputs


class TritonError:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._outputs, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def model_config(text: str) -> Any:
    """`inference.ModelConfig` of a `config.pbtxt`, by NVIDIA's own definition; the package around it needs more."""
    path = Path(tritonclient.__file__).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(text, module.ModelConfig())


class StubServer:
    """One model of a repository, loaded and asked as Triton does."""

    def __init__(self, repository: Path, name: str, backend: str = "") -> None:
        self.config = model_config((repository / name / "config.pbtxt").read_text())
        assert self.config.name == name
        sys.modules["triton_python_backend_utils"] = _as_module()
        spec = importlib.util.spec_from_file_location("model", repository / name / "1" / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._model = module.TritonPythonModel()
        if backend:
            self.config.parameters["backend"].string_value = backend
        as_json = json_format.MessageToDict(self.config, preserving_proto_field_name=True)
        self._model.initialize(
            {
                "model_config": json.dumps(as_json),
                "model_repository": str(repository / name),
                "model_version": "1",
                "model_name": name,
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
            }
        )

    def close(self) -> None:
        self._model.finalize()
        sys.modules.pop("triton_python_backend_utils", None)

    def infer(self, *requests: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One call of `execute` for requests that the batcher put together: outputs, or `error`, of each."""
        assert sum(len(next(iter(request.values()))) for request in requests) <= self.config.max_batch_size
        responses = self._model.execute([self._request(request) for request in requests])
        assert len(responses) == len(requests)
        return [self._outputs(r, len(next(iter(q.values())))) for r, q in zip(responses, requests, strict=True)]

    def _request(self, values: Mapping[str, Any]) -> InferenceRequest:
        declared = {spec.name: spec for spec in self.config.input}
        assert set(values) <= set(declared)
        assert {name for name, spec in declared.items() if not spec.optional} <= set(values)
        tensors = []
        for name, value in values.items():
            kind = type(declared[name]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
            array = np.array(value, dtype=_DTYPES[kind[declared[name].data_type].name])
            _check_dims(name, array, declared[name].dims)
            tensors.append(Tensor(name, array))
        return InferenceRequest(tensors)

    def _outputs(self, response: InferenceResponse, count: int) -> dict[str, Any]:
        error = response.error()
        if error is not None:
            return {"error": error.message()}
        found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        assert set(found) == {spec.name for spec in self.config.output}
        for spec in self.config.output:
            kind = type(spec).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[spec.data_type].name
            assert found[spec.name].dtype == _DTYPES[kind]
            assert found[spec.name].flags["C_CONTIGUOUS"]
            assert len(found[spec.name]) == count
            _check_dims(spec.name, found[spec.name], spec.dims)
        return found


@contextmanager
def running(repository: Path, name: str, backend: str = "") -> Iterator[StubServer]:
    """A server that is closed when the block ends."""
    server = StubServer(repository, name, backend)
    try:
        yield server
    finally:
        server.close()


def _check_dims(name: str, array: np.ndarray[Any, Any], dims: Any) -> None:
    assert array.ndim == len(dims) + 1, name
    for got, expected in zip(array.shape[1:], dims, strict=True):
        assert expected in (-1, got), name


def _as_module() -> types.ModuleType:
    module = types.ModuleType("triton_python_backend_utils")
    for thing in (Tensor, InferenceRequest, InferenceResponse, TritonError, get_input_tensor_by_name):
        setattr(module, thing.__name__, thing)
    return module
