"""A world of simple scenes: what is in one, and in words; prompts describe it, and pictures are checked against it."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
MATERIALS = ("matte", "glossy")
GROUNDS = ("grass", "sand", "snow", "tiles")
SKIES = ("day", "sunset", "night")
SLOTS = ("left", "middle", "right")
_SIDE = {"left": -1, "middle": 0, "right": 1}
# By how many solids there are: from the middle to those at the sides, and their radius. They do not touch.
_SPACING = {1: 1.75, 2: 1.75, 3: 2.35}
_RADIUS = {1: 1.6, 2: 1.4, 3: 0.95}
_TURN = 0.5  # radians: cubes show two sides
# One of so many combinations of (shape, colour, ground) never occurs in training.
_HELD_OUT_SHARE = 8


@dataclasses.dataclass(frozen=True)
class Solid:
    """One object.

    Attributes:
        shape, colour, material: of `SHAPES`, `COLOURS`, `MATERIALS`.
        slot: of `SLOTS`, where it stands in words.
        x, z: where it stands: to the right, and away from the camera, which stands at z = -7.4.
        radius: in the same units.
        turn: about the vertical, in radians.
        is_in_front: of the other one.
    """

    shape: str
    colour: str
    material: str
    slot: str
    x: float = 0.0
    z: float = 0.0
    radius: float = 1.0
    turn: float = 0.0
    is_in_front: bool = False


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture.

    Attributes:
        ground, sky: of `GROUNDS`, `SKIES`.
        solids: one to three, from left to right.
        light: where it comes from: azimuth and elevation in radians.
        moon: where it stands at night: across and up, in halves of the picture.
    """

    ground: str
    sky: str
    solids: tuple[Solid, ...]
    light: tuple[float, float] = (0.6, 0.9)
    moon: tuple[float, float] = (0.5, 0.7)

    @property
    def near(self) -> Solid | None:
        """The solid that stands in front of another."""
        return next((solid for solid in self.solids if solid.is_in_front), None)


def is_held_out(solid: Solid, ground: str) -> bool:
    """Whether training never shows this shape in this colour on this ground."""
    key = f"{solid.shape} {solid.colour} {ground}"
    return hashlib.sha256(key.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def random_scene(rng: np.random.Generator, num_solids: int | None = None, *, held_out: bool | None = False) -> Scene:
    """A scene.

    What a caption does not say varies little: a next-scale model draws the tokens of a scale independently of each
    other, and where places and outlines vary, it mixes them.

    Args:
        rng: which.
        num_solids: 1 to 3; default: any.
        held_out: False: none of the combinations that training never shows; True: at least one; None: any.
    """
    while True:
        count = int(rng.integers(1, 4)) if num_solids is None else num_solids
        ground = str(rng.choice(GROUNDS))
        slots = {1: [str(rng.choice(SLOTS))], 2: ["left", "right"], 3: list(SLOTS)}[count]
        # Several of one kind, to be counted, in a part of the scenes.
        alike = count > 1 and rng.random() < 0.3
        kinds = [_random_kind(rng) for _ in slots]
        near = 0 if count == 2 and not alike and rng.random() < 0.5 else None
        if kinds[0][1] == kinds[-1][1]:  # of one colour, they would look like one
            near = None
        spacing, radius = _SPACING[count], _RADIUS[count]
        solids = tuple(
            Solid(
                *(kinds[0] if alike else kind),
                slot,
                _SIDE[slot] * (spacing if near is None else 0.75 * spacing) + float(rng.uniform(-0.03, 0.03)),
                (0.0 if near is None else -1.6 if near == i else 1.2) + float(rng.uniform(-0.05, 0.05)),
                radius * float(rng.uniform(0.97, 1.03)),
                _TURN + float(rng.uniform(-0.1, 0.1)),
                near == i,
            )
            for i, (slot, kind) in enumerate(zip(slots, kinds, strict=True))
        )
        found = any(is_held_out(solid, ground) for solid in solids)
        if held_out is None or found == held_out:
            light = (float(rng.uniform(0.5, 0.7)), float(rng.uniform(0.85, 0.95)))
            moon = (float(rng.uniform(0.45, 0.55)), float(rng.uniform(0.77, 0.81)))
            return Scene(ground, str(rng.choice(SKIES)), solids, light, moon)


def _random_kind(rng: np.random.Generator) -> tuple[str, str, str]:
    return str(rng.choice(SHAPES)), str(rng.choice(COLOURS)), str(rng.choice(MATERIALS))


_GROUND_WORDS = {
    "grass": ("grass", "green grass", "a lawn", "a meadow"),
    "sand": ("sand", "the sand", "a beach", "desert sand"),
    "snow": ("snow", "white snow", "a snowy field", "fresh snow"),
    "tiles": ("tiles", "a tiled floor", "checkered tiles", "a checkerboard floor"),
}
_SKY_WORDS = {
    "day": ("under a blue sky", "in daylight", "by day", "on a bright day"),
    "sunset": ("at sunset", "under a sunset sky", "at dusk", "in the evening"),
    "night": ("at night", "under the moon", "in the moonlight", "under a night sky"),
}
_SLOT_WORDS = {
    "left": ("on the left", "to the left", "at the left"),
    "middle": ("in the middle", "in the center", "at the centre"),
    "right": ("on the right", "to the right", "at the right"),
}
_MATERIAL_WORDS = {"matte": ("", "", "matte"), "glossy": ("glossy", "shiny", "")}
_NUMBERS = {2: "two", 3: "three"}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many ways to say what is in a scene."""
    place = f"on {rng.choice(_GROUND_WORDS[scene.ground])}"
    air = str(rng.choice(_SKY_WORDS[scene.sky]))
    things = _things(scene, rng)
    order = int(rng.integers(0, 4))
    if order == 0:
        return f"{things} {place} {air}"
    if order == 1:
        return f"{things} {place}, {air}"
    if order == 2:
        return f"{air}, {things} {place}"
    return f"a picture of {things} {place} {air}"


def tells_sides(text: str) -> bool:
    """Whether a caption of several solids says which side they are on; else the mirror image shows it, too."""
    return " between " not in text


def _things(scene: Scene, rng: np.random.Generator) -> str:
    solids = scene.solids
    named = [_named(solid, rng) for solid in solids]
    if len(solids) == 1:
        return f"{_article(named[0])} {rng.choice(_SLOT_WORDS[solids[0].slot])}"
    if len({(s.shape, s.colour, s.material) for s in solids}) == 1:
        return f"{_NUMBERS[len(solids)]} {_named(solids[0], rng)}s"
    if len(solids) == 3:
        a, b, c = map(_article, named)
        return str(
            rng.choice(
                (
                    f"{a}, {b} and {c} from left to right",
                    f"{a} on the left, {b} in the middle and {c} on the right",
                    f"{b} between {a} and {c}",
                )
            )
        )
    a, b = map(_article, named)
    if scene.near is not None:
        near, far = (a, b) if scene.near is solids[0] else (b, a)
        return str(rng.choice((f"{near} in front of {far}", f"{far} behind {near}")))
    return str(
        rng.choice(
            (
                f"{a} left of {b}",
                f"{b} right of {a}",
                f"{a} to the left of {b}",
                f"{a} on the left and {b} on the right",
                f"{b} on the right and {a} on the left",
            )
        )
    )


def _named(solid: Solid, rng: np.random.Generator) -> str:
    material = str(rng.choice(_MATERIAL_WORDS[solid.material]))
    return " ".join(word for word in (material, solid.colour, solid.shape) if word)


def _article(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
