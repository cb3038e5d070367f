"""The demo model that comes with the package: eight photographs at 256x256 pixels."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from fastvar_trt.export.models.var.source import VARSource

DEMO_FOLDER = Path(str(importlib.resources.files("fastvar_trt.export"))) / "demo_model"


def demo_source() -> VARSource:
    """The trained checkpoint, in the official keys (fp16 safetensors).

    Raises:
        CheckpointError: the package was installed without its data.
    """
    return VARSource.from_files(DEMO_FOLDER / "var.safetensors", DEMO_FOLDER / "vae.safetensors")
