"""A model repository for Triton Inference Server: one model, served by its Python backend.

```
DIR/<name>/config.pbtxt
DIR/<name>/1/model.py      imports serving.triton.backend, which must be installed where Triton runs
DIR/<name>/1/bundle/       the bundle: hard links where the file system has them
```
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from fastvar_trt.export.folders import disk_errors, new_folder, recover
from fastvar_trt.runtime.errors import ExportError
from fastvar_trt.runtime.manifest import MANIFEST_FILE, Manifest, Variant, check_files, read_manifest
from fastvar_trt.runtime.request import Parameter, parameters

_MODEL = '''"""Needs fastvar-trt in the Python of Triton's Python backend."""

from fastvar_trt.serving.triton.backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_QUEUE_DELAY_US = 5000  # as Service's default


def check_free(target: Path, *, force: bool) -> None:
    """That the folder of a model does not exist, or is one of ours and may be replaced.

    Raises:
        ExportError: it is there already.
    """
    with disk_errors("--triton", target):
        recover(target)
        if not os.path.lexists(target):
            return
        if not force:
            raise ExportError(
                f"--triton: {target} exists already; give another folder, or --force to replace the model"
            )
        if not (target / "1" / "bundle" / MANIFEST_FILE).is_file():
            raise ExportError(f"--triton: {target} exists and holds no bundle, so --force does not replace it")


def model_folder(repository: Path, bundle: Path) -> Path:
    """Where a bundle's model goes: it is named like the bundle."""
    # resolve() would follow links: the model of a link is named like the link.
    return Path(os.path.abspath(repository)) / Path(os.path.abspath(bundle)).name  # noqa: PTH100


def write_triton_model(bundle: Path, repository: Path, *, force: bool = False) -> Path:
    """Write the model of a bundle into a model repository, whole or not at all.

    Args:
        bundle: its folder; the model gets its name.
        repository: Triton's --model-repository; made where it does not exist.
        force: replace the model of that name.

    Returns:
        The folder of the model.

    Raises:
        BundleError: the bundle is incomplete.
        ExportError: the model exists already, or cannot be written.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=False)
    target = model_folder(repository, bundle)
    with new_folder(target, "--triton", lambda: check_free(target, force=force)) as folder:
        (folder / "config.pbtxt").write_text(triton_config(target.name, manifest), encoding="utf-8")
        (folder / "1").mkdir()
        (folder / "1" / "model.py").write_text(_MODEL, encoding="utf-8")
        shutil.copytree(bundle, folder / "1" / "bundle", copy_function=_link_or_copy)
    return target


def triton_config(name: str, manifest: Manifest) -> str:
    """The model's `config.pbtxt` (`inference.ModelConfig` as protobuf text)."""
    variant, largest = manifest.default, max(manifest.batches)
    # What a picture is of: one of the ways that the bundle takes is required.
    known = parameters(manifest)
    subject = next(p for p in known.values() if p.condition)
    inputs = [
        _input(p, variant, required=p is subject)
        for p in known.values()
        if not p.condition or subject.name in (p.name, p.needs)
    ]
    outputs = [
        _tensor("IMAGE", "UINT8", f"{variant.image_height}, {variant.image_width}, 3"),
        _tensor("SEED_USED", "UINT64", "1"),
    ]
    sections = [
        f"name: {json.dumps(name)}",
        'backend: "python"',
        f"max_batch_size: {largest}",
        f"input [\n{_joined(inputs)}\n]",
        f"output [\n{_joined(outputs)}\n]",
        # The Python backend leaves the device to model.py; see `parameters`.
        "instance_group [\n  { count: 1 kind: KIND_CPU }\n]",
        'parameters { key: "backend" value { string_value: "onnxruntime" } }',
        'parameters { key: "device" value { string_value: "" } }',
    ]
    if largest > 1:
        preferred = ", ".join(str(size) for size in sorted(manifest.batches) if size > 1)
        sections.append(
            f"dynamic_batching {{\n  preferred_batch_size: [ {preferred} ]\n"
            f"  max_queue_delay_microseconds: {_QUEUE_DELAY_US}\n}}"
        )
    return "\n".join(sections) + "\n"


_KINDS = {
    "integer": "INT64",
    "number": "FP32",
    "boolean": "BOOL",
    "text": "STRING",
    "features": "FP32",
    "image": "UINT8",
    "mask": "BOOL",
}


def _input(parameter: Parameter, variant: Variant, *, required: bool) -> str:
    """The input of a parameter; prompts of different lengths may share a batch."""
    size = f"{variant.image_height}, {variant.image_width}"
    dims = {"features": f"-1, {parameter.width}", "image": f"{size}, 3", "mask": size}
    kind = "UINT64" if parameter.name == "seed" else _KINDS[parameter.kind]
    more = ["allow_ragged_batch: true"] if parameter.kind == "features" else []
    more += [] if required else ["optional: true"]
    return _tensor(parameter.name.upper(), kind, dims.get(parameter.kind, "1"), *more)


def _tensor(name: str, kind: str, dims: str, *more: str) -> str:
    return "  { " + " ".join([f'name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ]', *more]) + " }"


def _joined(tensors: list[str]) -> str:
    return ",\n".join(tensors)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
