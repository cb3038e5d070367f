"""A target whose engines are the graphs themselves, under another name."""

from __future__ import annotations

import shutil
from pathlib import Path

from fastvar_trt.export.build.base import Builder, Built
from fastvar_trt.export.progress import Progress
from fastvar_trt.runtime.manifest import GraphSpec

VERSION = {"toy": "1"}


class ToyBuilder(Builder):
    """Copies of the graphs."""

    folder = "toy"
    target_names = ("toy",)
    description = "nothing that exists"

    def built_with(self) -> dict[str, str]:
        return dict(VERSION)

    def build(
        self, bundle: Path, graph: GraphSpec, targets: tuple[str, ...], scratch: Path, progress: Progress
    ) -> Built:
        path = Path(shutil.copyfile(bundle / graph.file, scratch / f"{graph.name}_b{graph.batch}.toy"))
        return Built(path, (), graph.inputs, graph.outputs, {"toys": 1})
