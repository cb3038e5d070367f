"""The interface between the scale loop and whatever runs the graphs."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fastvar_trt.runtime.errors import BackendError
from fastvar_trt.runtime.manifest import ON_DEMAND, GraphSpec, Manifest, TensorSpec
from fastvar_trt.runtime.precision import DTYPES


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Memory of a backend: a dense row-major tensor.

    Attributes:
        shape, dtype: of the tensor.
        pointer: where it starts; graphs are bound by this, shape and dtype alone.
        owner: keeps the memory alive; a backend's own, of the whole allocation, of which a buffer may be a part.
    """

    shape: tuple[int, ...]
    dtype: str
    pointer: int
    owner: Any

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].num_bytes

    def part(self, offset: int, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A tensor in this memory, `offset` bytes from its start; to be bound, not to be uploaded or downloaded."""
        return Buffer(shape, dtype, self.pointer + offset, self.owner)

    def view(self) -> View:
        """The whole buffer."""
        return View(self, self.shape, self.pointer)

    def rows(self, start: int, count: int) -> View:
        """`count` entries of the first axis from `start`; a view, nothing is copied."""
        assert start >= 0 and start + count <= self.shape[0], (start, count, self.shape)
        row_bytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].num_bytes
        return View(self, (count, *self.shape[1:]), self.pointer + start * row_bytes)


@dataclasses.dataclass(frozen=True)
class View:
    """A contiguous part of a buffer, as it is bound to a graph's input or output."""

    buffer: Buffer
    shape: tuple[int, ...]
    pointer: int

    def matches(self, spec: TensorSpec) -> bool:
        """True where the view has the shape and dtype that a graph asks for."""
        return self.shape == spec.shape and self.buffer.dtype == spec.dtype


class BoundGraph(abc.ABC):
    """A graph with all its buffers bound."""

    @abc.abstractmethod
    def enqueue(self) -> None:
        """Run the graph on the bound buffers, or queue the run on the backend's stream."""


class BoundOnDemand(BoundGraph):
    """A graph that is loaded, run and unloaded at every run; for `Backend.is_on_demand`.

    Args:
        backend: loads it.
        graph: the graph.
        inputs: as for `Backend.bind`.
        outputs: likewise.
        spare: memory that nothing else needs while it runs.
    """

    def __init__(
        self,
        backend: Backend,
        graph: GraphSpec,
        inputs: Mapping[str, View],
        outputs: Mapping[str, View],
        spare: Buffer | None,
    ) -> None:
        self._backend, self._graph, self._inputs, self._outputs = backend, graph, inputs, outputs
        self._spare = spare

    def enqueue(self) -> None:
        """Also waits for it."""
        backend = self._backend
        backend.lend(self._graph, self._spare)
        try:
            backend.load(self._graph)
            bound = backend.bind(self._graph, self._inputs, self._outputs)
            bound.enqueue()
            backend.synchronize()  # before anything of it is dropped
            del bound
        finally:
            backend.unload(self._graph)


class CapturedChain(abc.ABC):
    """A sequence of bound graphs that is launched as one.

    Attributes:
        marks: one before the first graph and one after each, as `Backend.mark` gives them; of the latest launch.
    """

    marks: Sequence[Any]

    @abc.abstractmethod
    def launch(self) -> None:
        """Queue all graphs."""

    @abc.abstractmethod
    def close(self) -> None:
        """Drop it; the graphs stay."""


class Backend(abc.ABC):
    """Loads graphs, owns memory, runs. Constructing one touches no device; `open` does.

    A backend that cannot do what it is asked raises `BackendError` in `open` or `load`; none falls back to
    another device.
    """

    name: str
    low_memory = False  # whether graphs of `manifest.ON_DEMAND` are there only while they run

    def is_on_demand(self, graph: GraphSpec) -> bool:
        """Whether a graph is loaded when it is to run, and unloaded after."""
        return self.low_memory and graph.kind in ON_DEMAND

    @abc.abstractmethod
    def open(self, bundle: Path, manifest: Manifest, *, check_hashes: bool) -> None:
        """Acquire the device for the graphs of one bundle.

        Args:
            bundle: its folder.
            manifest: its manifest, whose files have been checked.
            check_hashes: whether engine files are compared by their content, or by their sizes only.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything; may be called twice."""

    def activate(self) -> None:  # noqa: B027  # most backends have nothing to do
        """Prepare the calling thread; before anything else is called in it."""

    @abc.abstractmethod
    def load(self, graph: GraphSpec) -> None:
        """Make one graph of the bundle ready to bind."""

    def lend(self, graph: GraphSpec, memory: Buffer | None) -> None:  # noqa: B027  # most have memory of their own
        """Let a graph on demand use memory for its activations that nothing else needs while it runs."""

    def num_activation_bytes(self, graph: GraphSpec) -> int:
        """What a graph on demand can use of memory that is lent to it."""
        return 0

    def synchronize(self) -> None:  # noqa: B027  # where nothing is queued, nothing is waited for
        """Wait for what was enqueued."""

    def unload(self, graph: GraphSpec) -> None:
        """Drop a graph that is on demand, with all that it alone holds, whether its load came to an end or not; nothing
        of it is running any more."""
        raise NotImplementedError(self.name)

    @abc.abstractmethod
    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A zeroed buffer on the device."""

    def free(self, buffer: Buffer) -> None:  # noqa: B027  # where the owner's end is the memory's
        """Give back what `allocate` gave; no graph that is bound to it will run again. `close` frees what is left."""

    @abc.abstractmethod
    def bind(self, graph: GraphSpec, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> BoundGraph:
        """Bind views by tensor name; outputs that are not named are not computed."""

    @abc.abstractmethod
    def upload(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copy an array of the buffer's shape and dtype into it."""

    @abc.abstractmethod
    def download(self, buffer: Buffer) -> NDArray[Any]:
        """A copy of the buffer on the host; waits for what was enqueued."""

    @abc.abstractmethod
    def mark(self) -> Any:
        """A point in time on the backend's stream, for `elapsed_ms`."""

    @abc.abstractmethod
    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Milliseconds between two marks; waits for the second."""

    def release(self, mark: Any) -> None:  # noqa: B027  # most marks are plain numbers
        """Give back what a mark holds."""

    @property
    def on_cpu(self) -> bool:
        """Whether this machine's processor computes the graphs."""
        return False

    def describe(self) -> dict[str, Any]:
        """What a report on its times should say of it."""
        return {"backend": self.name}

    def operator_times(self) -> dict[str, dict[str, float]]:
        """Graph file -> operator or kernel -> ms, summed over all runs; of a backend that was made to take them.

        Raises:
            BackendError: it was not.
        """
        raise BackendError(f"backend {self.name}: takes no times of single operators")

    def keep_compiled(self) -> None:  # noqa: B027  # most backends compile nothing
        """Keep what was compiled so far for other processes; called after every run that was not captured."""

    @property
    def can_capture(self) -> bool:
        """Whether `capture` makes the chain faster here."""
        return False

    def capture(self, bound: Sequence[BoundGraph]) -> CapturedChain:
        """Record the graphs, which have run before, as one launch."""
        raise NotImplementedError(self.name)


@dataclasses.dataclass(frozen=True)
class BackendOption:
    """An option of a backend: a keyword of `Pipeline.load`, and with dashes an option of the command line.

    Attributes:
        name: the keyword.
        kind: `int`, `str` or `bool`.
        description: for people.
        choices: of a string.
        flag: on the command line, where it is not the keyword with dashes.
    """

    name: str
    kind: type
    description: str
    choices: tuple[str, ...] = ()
    flag: str = ""


LOW_MEMORY = BackendOption(
    "low_memory", bool, "Load encoders and decoder when they are to run, and free them: less memory, more time."
)


@dataclasses.dataclass(frozen=True)
class BackendEntry:
    """A backend in the registry.

    Attributes:
        name: by which it is asked for.
        create: makes one that is not yet opened: `create(device, profile, **options)`, device as the user gave it or
            None; profile: take the times of single operators, for `Backend.operator_times`.
        options: the keywords that `create` takes.
        checks: by kind of device (`cpu`, `cuda`): says what it would run on here, or raises UnavailableError.
    """

    name: str
    create: Callable[..., Backend]
    options: tuple[BackendOption, ...] = ()
    checks: Mapping[str, Callable[[], str]] = dataclasses.field(default_factory=dict)
