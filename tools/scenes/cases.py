"""Scenes as prompts that can be checked: for `fastvar evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.tools.measure.evaluate import Case
from fastvar_trt.tools.scenes.checker import compliance, read_picture
from fastvar_trt.tools.scenes.world import Scene, Solid, caption, random_scene, tells_sides

TAGS = {1: "one solid", 2: "two solids", 3: "three solids"}


def cases(count: int, seed: int = 0, held_out: bool | None = True) -> list[Case]:
    """Random scenes, one, two and three solids in turn.

    Args:
        count: how many.
        seed: which.
        held_out: as for `random_scene`.
    """
    rng = np.random.default_rng([seed, 97])
    found = []
    for i in range(count):
        scene = random_scene(rng, i % 3 + 1, held_out=held_out)
        text = caption(scene, rng)
        expected = {"scene": dataclasses.asdict(scene), "sides_are_told": tells_sides(text)}
        found.append(Case(text, TAGS[len(scene.solids)], expected))
    return found


def check(picture: NDArray[np.uint8], expected: Mapping[str, Any]) -> Mapping[str, bool]:
    """Whether a picture shows a scene, by category: the checker of `fastvar evaluate`.

    Args:
        picture: uint8 [H, W, 3].
        expected: of a case: the `scene` as a mapping, and whether the caption tells sides.
    """
    return compliance(scene_of(expected), read_picture(picture), sides_are_told=expected["sides_are_told"])


def scene_of(expected: Mapping[str, Any]) -> Scene:
    """The scene that a case expects."""
    solids = tuple(Solid(**solid) for solid in expected["scene"]["solids"])
    return Scene(**{**expected["scene"], "solids": solids})
