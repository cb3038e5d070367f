"""Scenes as prompts that can be checked: for `fastvar evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.tools.measure.evaluate import Case
from fastvar_trt.tools.scenes.checker import compliance, read_picture
from fastvar_trt.tools.scenes.world import Scene, Solid, caption, random_scene

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
        found.append(Case(caption(scene, rng), TAGS[len(scene.solids)], dataclasses.asdict(scene)))
    return found


def check(picture: NDArray[np.uint8], expected: Mapping[str, Any]) -> Mapping[str, bool]:
    """Whether a picture shows a scene, by category: the checker of `fastvar evaluate`.

    Args:
        picture: uint8 [H, W, 3].
        expected: of a case: a `Scene` as a mapping.
    """
    solids = tuple(Solid(**solid) for solid in expected["solids"])
    return compliance(Scene(**{**expected, "solids": solids}), read_picture(picture))
