"""`fastvar`: everything that is done with a bundle, a command a file; and `export`, which makes them.

Neither needs torch nor onnx before `build`, `tune` or an export runs.
"""

from __future__ import annotations

import click

from fastvar_trt.tools.cli.build import build
from fastvar_trt.tools.cli.capture import capture
from fastvar_trt.tools.cli.command import ErrorGroup
from fastvar_trt.tools.cli.compare import compare
from fastvar_trt.tools.cli.doctor import doctor
from fastvar_trt.tools.cli.evaluate import evaluate
from fastvar_trt.tools.cli.generate import edit, generate
from fastvar_trt.tools.cli.inspect import inspect
from fastvar_trt.tools.cli.profile import profile
from fastvar_trt.tools.cli.serve import serve
from fastvar_trt.tools.cli.tune import tune
from fastvar_trt.tools.cli.verify import verify


@click.group(cls=ErrorGroup)
@click.version_option(package_name="fastvar-trt")
def main() -> None:
    """Run, check and build exported bundles (make one with fastvar-export)."""


for _command in (build, capture, compare, doctor, edit, evaluate, generate, inspect, profile, serve, tune, verify):
    main.add_command(_command)
