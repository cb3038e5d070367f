"""What `fastvar compare`, `tune` and `evaluate` share: which pictures are drawn, and what they are judged by."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.manifest import Condition, Manifest
from fastvar_trt.tools.files import write_text
from fastvar_trt.tools.measure.compare import Pictures
from fastvar_trt.tools.measure.evaluate import Judge, load_checker, read_cases

_SEEDS = 8
_FEW_CLASSES = 16  # all of them are drawn where nothing else is asked for
_SCENES = "fastvar_trt.tools.scenes.cases:check"
_IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp"}

cfg_option = click.option("--cfg", type=float, help="Guidance scale; default: the bundle's.")
vif_option = click.option("--vif/--no-vif", default=True, show_default=True, help="VIF takes longest.")
json_option = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write the JSON line to this file."
)


def request_options(command: Any) -> Any:
    """Give a command the options that say what is drawn, and what it is judged by."""
    for option in (
        click.option(
            "--references",
            type=click.Path(path_type=Path),
            help="Photographs of the classes: a folder with one sub-folder per class index.",
        ),
        cfg_option,
        click.option("--seeds", type=click.IntRange(1), help=f"Images per class or prompt. Default: {_SEEDS}."),
        click.option("--prompt", "prompts", multiple=True, help="Text, for a model of text; repeat for more."),
        click.option("--class", "labels", type=int, multiple=True, help="Class index; default: all, if they are few."),
    ):
        command = option(command)
    return command


def judge_options(command: Any) -> Any:
    """Give a command the options that say which prompts are drawn, and who looks whether pictures show them."""
    for option in (
        click.option("--checker", help="Looks at the pictures of --prompts: module:function, also of this folder."),
        click.option(
            "--prompts",
            "prompts_file",
            type=click.Path(path_type=Path),
            help="In place of scenes: a JSON object per line with prompt, tag, and what the checker takes (GenEval's "
            "format).",
        ),
        click.option(
            "--held-out/--trained",
            default=None,
            help="Scenes with what training never showed, or without. Default: --held-out.",
        ),
        click.option("--scenes", "num_scenes", type=click.IntRange(1), help="So many scenes of the demo's world."),
    ):
        command = option(command)
    return command


def judge_of(
    num_scenes: int | None, held_out: bool | None, prompts_file: Path | None, checker: str | None, seed: int
) -> Judge | None:
    """What the options of `judge_options` ask for; None where neither scenes nor prompts are.

    Raises:
        UsageError: both, or options that do not go together.
        RequestError: a file of prompts or a checker that cannot be read.
    """
    if num_scenes is not None and prompts_file is not None:
        raise click.UsageError("give one of --scenes and --prompts")
    if (prompts_file is None) != (checker is None):
        raise click.UsageError("--prompts needs --checker, which says what they are to show; scenes have their own")
    if held_out is not None and num_scenes is None:
        raise click.UsageError("--held-out and --trained are for --scenes")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a command is not given it, as `python` is
    if prompts_file is not None and checker is not None:
        return Judge(tuple(read_cases(prompts_file)), load_checker(checker), seed)
    if num_scenes is None:
        return None
    from fastvar_trt.tools.scenes.cases import cases  # needs scipy, which comes with the extra

    return Judge(tuple(cases(num_scenes, seed, held_out is not False)), load_checker(_SCENES), seed)


def picture_requests(
    bundle: Path, labels: tuple[int, ...], prompts: tuple[str, ...], num_seeds: int | None, manifest: Manifest
) -> Pictures:
    """Every class or prompt with so many seeds; None: the default.

    Raises:
        RequestError: classes for a model of text, or the other way round; a class that the model has not; a bundle
            without its text encoder.
    """
    model = manifest.model
    if model.condition is Condition.TEXT:
        if labels or not prompts:
            raise RequestError("the bundle draws from text: give --prompt, and no --class")
        check_takes_prompts(manifest, bundle)
        return _with_seeds(prompts, num_seeds)
    if prompts:
        raise RequestError("--prompt: the bundle draws classes; give --class")
    if not labels and model.num_classes > _FEW_CLASSES:
        raise click.UsageError(f"the model has {model.num_classes} classes; name some with --class")
    classes = labels or tuple(range(model.num_classes))
    for label in classes:
        if not 0 <= label < model.num_classes:
            raise RequestError(f"class {label}: the bundle has 0 to {model.num_classes - 1}")
    return _with_seeds(classes, num_seeds)


def check_takes_prompts(manifest: Manifest, bundle: Path) -> None:
    """That a bundle draws from text, and has its text encoder.

    Raises:
        RequestError: it does not.
    """
    if manifest.model.condition is not Condition.TEXT:
        raise RequestError(f"bundle {bundle}: draws classes, expected one that draws from text")
    if manifest.text_encoder is None:
        raise RequestError(f"bundle {bundle}: has no text encoder for prompts; export it with --text-encoder")


def echo_json(data: Any, json_file: Path | None) -> None:
    """A line of JSON, and the same to a file where one is given.

    Raises:
        RequestError: that cannot be written.
    """
    line = json.dumps(data)
    click.echo(line)
    if json_file is not None:
        write_text(json_file, line + "\n")


def subject_name(subject: int | str) -> str:
    """For people."""
    return subject if isinstance(subject, str) else f"class {subject}"


def _with_seeds(subjects: tuple[Any, ...], num_seeds: int | None) -> Pictures:
    num_seeds = num_seeds or _SEEDS
    repeated = tuple(subject for subject in subjects for _ in range(num_seeds))
    return Pictures(repeated, tuple(range(num_seeds)) * len(subjects))


def references_of(source: Path | None, pictures: Pictures, manifest: Manifest) -> dict[int, NDArray[Any]] | None:
    """Photographs of every class that is drawn; None without a source.

    Raises:
        RequestError: prompts are drawn, or a class has no readable photograph.
    """
    if not source:
        return None
    if not pictures.are_classes:
        raise RequestError("--references: are of classes, and prompts are drawn")
    return load_references(source, list(pictures.labels), manifest.default.image_width)


def load_references(source: Path, labels: list[int], side: int) -> dict[int, NDArray[Any]]:
    """Photographs of each class, uint8 [M, side, side, 3].

    Args:
        source: a folder with one sub-folder per class index.
        labels: the classes that are needed.
        side: pixels; the middle square of every photograph is scaled to it.

    Raises:
        RequestError: a class without a readable photograph.
    """
    references = {}
    for label in dict.fromkeys(labels):
        folder = source / str(label)
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _IMAGE_FILES) if folder.is_dir() else []
        if not files:
            raise RequestError(f"--references {folder}: no PNG, JPEG or WebP files there; give some of every class")
        try:
            references[label] = np.stack([_middle_square(file, side) for file in files])
        except OSError as error:
            raise RequestError(f"--references {folder}: {error}") from error
    return references


def _middle_square(path: Path, side: int) -> NDArray[Any]:
    with Image.open(path) as image:
        length = min(image.size)
        left, top = ((extent - length) / 2 for extent in image.size)
        box = (left, top, left + length, top + length)
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box))
