"""The two TensorRT packages behind one face. Their Python API is one but for what this module names.

`tensorrt_rtx` (TensorRT for RTX) builds for any of its targets on a machine without a GPU. `tensorrt` (enterprise)
builds on the GPU that will run the engine; that path is written against its API (10.13, 11) and has not been run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastvar_trt.runtime.backends.tensorrt import ENTERPRISE_FLAVOUR, RTX_FLAVOUR, import_tensorrt

# SM90 (H100) is not among them: TensorRT for RTX 1.7 does not list it.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@dataclasses.dataclass(frozen=True)
class Flavour:
    """One TensorRT package.

    Attributes:
        name: `tensorrt_rtx` or `tensorrt`.
        module: the imported package.
    """

    name: str
    module: Any

    @classmethod
    def load(cls, name: str) -> Flavour:
        """Import a package.

        Raises:
            UnavailableError: it is not installed, or its libraries cannot be loaded.
        """
        return cls(name, import_tensorrt(name))

    @property
    def version(self) -> str:
        """Of the package; engines belong to exactly one."""
        return str(self.module.__version__)

    def network_flags(self) -> int:
        """Strongly typed, as precisions come from the graph (RTX and TensorRT 11 know nothing else and have no flag);
        and plugins ahead of time, so that an engine holds their kernels."""
        if self.name == RTX_FLAVOUR:
            return 0
        known = self.module.NetworkDefinitionCreationFlag
        wanted = [getattr(known, name, None) for name in ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")]
        return sum(1 << int(flag) for flag in wanted if flag is not None)

    def set_targets(self, config: Any, targets: Sequence[str]) -> None:
        """Which GPUs an engine is built for, and that it can be captured there."""
        if self.name == ENTERPRISE_FLAVOUR:
            return  # the GPU of this machine
        # An engine that allocates while it runs cannot be captured as a CUDA graph.
        config.set_flag(self.module.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(self.module.ComputeCapability, target.upper()), index)
