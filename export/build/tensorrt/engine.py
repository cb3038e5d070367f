"""One graph to one engine, with what the build log tells about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from fastvar_trt.export.build.tensorrt.flavour import Flavour
from fastvar_trt.export.build.tensorrt.layers import read_activation_bytes, read_layers
from fastvar_trt.runtime.engines import EngineLayer
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import TensorSpec


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine.

    Attributes:
        data: the plan.
        inputs, outputs: as the network declares them.
        layers: of the optimised network; empty where the log did not list them.
        activation_bytes: that it needs while it runs; 0 where the log did not say.
    """

    data: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[EngineLayer, ...]
    activation_bytes: int


def build_engine(
    flavour: Flavour,
    model: bytes,
    name: str,
    targets: Sequence[str],
    progress: Callable[[str, float], None],
) -> BuiltEngine:
    """Parse and build.

    Args:
        flavour: the TensorRT package.
        model: a serialized ONNX model without external data.
        name: of the graph, for messages.
        targets: compute capabilities.
        progress: called with TensorRT's phase and the share of it that is done; what it raises (KeyboardInterrupt,
            too) cancels the build at the next step and is raised again.

    Raises:
        ExportError: the parser refused the graph, or no engine came out; with TensorRT's own words.
    """
    trt = flavour.module
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(flavour.network_flags())
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        problems = "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in found)
        raise ExportError(f"{name}: {flavour.name} {flavour.version} does not accept the graph: {problems}")
    inputs = _tensors(trt, network.num_inputs, network.get_input)
    outputs = _tensors(trt, network.num_outputs, network.get_output)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Products in fp32 are those that half precision has been kept out of; TF32 would round them to ten bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    flavour.set_targets(config, targets)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.error is not None:
        raise monitor.error
    if plan is None:
        raise ExportError(f"{name}: {flavour.name} {flavour.version} built no engine: {logger.errors()}")
    log = logger.text()
    return BuiltEngine(bytes(plan), inputs, outputs, read_layers(log), read_activation_bytes(log))


def _tensors(trt: Any, count: int, get: Callable[[int], Any]) -> tuple[TensorSpec, ...]:
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.UINT8: "uint8",
        trt.DataType.INT8: "int8",
        trt.DataType.FP8: "float8_e4m3fn",
        trt.DataType.BOOL: "bool",
    }
    return tuple(TensorSpec(t.name, tuple(t.shape), names[t.dtype]) for t in map(get, range(count)))


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps what TensorRT says."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self._lines.append((severity, message))

        def text(self) -> str:
            """All messages."""
            return "\n".join(message for _, message in self._lines)

        def errors(self) -> str:
            """The errors, joined."""
            bad = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            return "; ".join(message for severity, message in self._lines if severity in bad) or "no reason given"

    return Logger()


def _monitor(trt: Any, progress: Callable[[str, float], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports phases, and cancels when the report raises."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return self.error is None

        def phase_finish(self, phase_name: str) -> None:
            self._report(phase_name, self._steps.get(phase_name, 1))

        def _report(self, phase: str, step: int) -> None:
            # An exception must not pass through TensorRT's C++ frames: it is kept, and False cancels the build.
            if self.error is None:
                try:
                    progress(phase, step / max(self._steps.get(phase, 1), 1))
                except BaseException as error:
                    self.error = error

    return Monitor()
