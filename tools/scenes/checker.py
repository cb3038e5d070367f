"""What is in a picture, read off its pixels by classical image processing; it knows the colours of scenes, no more."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import cdist

from fastvar_trt.tools.scenes.renderer import COLOURS, ground_point, render, silhouette, surface_colour
from fastvar_trt.tools.scenes.world import GROUNDS, SHAPES, SKIES, Scene, Solid

Array = NDArray[np.float64]

_SIDE = 256  # pixels of the shorter side that is looked at
_HORIZON = 0.36  # rows above it, as a share, are sky alone

_MIN_PATCH = 0.004  # of a part of a solid, as a share of a square picture
_MIN_AREA = 0.015  # the same of a solid
# Shares of the light, and of what is mirrored, that surfaces are known under.
_SHADES = ((0.0, 0.0), (0.0, 0.08), (0.3, 0.0), (0.8, 0.0), (0.3, 0.08), (0.8, 0.08))
_MIN_SHARE = 0.2  # of one colour in a patch, to be a solid of its own
_TURNS = np.arange(6) * np.pi / 12  # of cubes
_MIN_PART = 0.3  # of the largest part of one colour in a patch, to be a solid of its own
_MIN_LIKENESS = 0.9  # of a silhouette to that of some solid, unless it is cut off
_MIN_LEAD = 0.07  # of the likest over the next
_MIN_JOINED = 0.85  # of that of several patches, or of several colours, to be one solid
_MIN_DISTANCE = {"day": 0.075, "sunset": 0.075, "night": 0.1}  # of a solid's chroma to the ground's


@dataclasses.dataclass(frozen=True)
class Found:
    """A solid in a picture.

    Attributes:
        shape, colour: as in `world`.
        x: middle, 0 at the left to 1 at the right.
        foot: lowest point, 0 at the top to 1 at the bottom.
    """

    shape: str
    colour: str
    x: float
    foot: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a picture shows: ground, sky, and solids from left to right."""

    ground: str
    sky: str
    solids: tuple[Found, ...]


def read_picture(pixels: NDArray[np.uint8]) -> Reading:
    """Read a picture, uint8 [H, W, 3]."""
    image = _resized(pixels)
    sky = _nearest(_known_skies(), _sky_features(image))
    ground = _nearest(_known_grounds(sky), _ground_features(image))
    solids = tuple(sorted(_solids(image, ground, sky), key=lambda solid: solid.x))
    return Reading(ground, sky, solids)


CATEGORIES = ("ground", "sky", "count", "shape", "colour", "binding", "position")


def compliance(scene: Scene, reading: Reading, *, sides_are_told: bool = True) -> dict[str, bool]:
    """Whether a picture shows what a scene has, by category.

    `shape` and `colour` ask whether the same ones are there, `binding` whether each shape has its own colour, and
    `position` whether they also stand where they should: a single one in its part of the picture, several in their
    order from left to right, or in the opposite one where the caption does not tell sides; where one is in front of
    another, it is lower, and captions do not tell their order. Of pictures with another count all of these are wrong.
    """
    expected = sorted(scene.solids, key=lambda solid: solid.x)
    same_count = len(expected) == len(reading.solids)

    def same(*names: str, in_order: bool = False) -> bool:
        ours, theirs = (
            [tuple(getattr(s, name) for name in names) for s in group] for group in (expected, reading.solids)
        )
        return same_count and (ours == theirs if in_order else sorted(ours) == sorted(theirs))

    front = scene.near
    if front is not None:
        position = same("shape", "colour") and _kind(max(reading.solids, key=lambda found: found.foot)) == _kind(front)
    elif len(expected) == 1:
        position = same_count and _slot_of(reading.solids[0]) == expected[0].slot
    else:
        position = same("shape", "colour", in_order=True)
        if not sides_are_told and not position:
            position = [*map(_kind, expected)] == [*map(_kind, reversed(reading.solids))]
    return {
        "ground": scene.ground == reading.ground,
        "sky": scene.sky == reading.sky,
        "count": same_count,
        "shape": same("shape"),
        "colour": same("colour"),
        "binding": same("shape", "colour"),
        "position": position,
    }


def _kind(solid: Solid | Found) -> tuple[str, str]:
    return solid.shape, solid.colour


def _slot_of(found: Found) -> str:
    return "left" if found.x < 0.4 else "right" if found.x > 0.6 else "middle"


def _resized(pixels: NDArray[np.uint8]) -> Array:
    height, width = pixels.shape[:2]
    scale = _SIDE / min(height, width)
    if scale != 1:
        size = (round(width * scale), round(height * scale))
        pixels = np.asarray(
            Image.fromarray(pixels).resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
        )
    return pixels.astype(np.float64) / 255


@functools.cache
def _empty(ground: str, sky: str) -> Array:
    """The place without solids."""
    return _resized(render(Scene(ground, sky, (), moon=(9.0, 9.0)), (_SIDE, _SIDE), samples=1))


def _sky_features(image: Array) -> Array:
    return np.median(image[: _SIDE // 8].reshape(-1, 3), axis=0)


def _ground_features(image: Array) -> Array:
    rows = image[-_SIDE // 7 :]
    light = rows.mean(axis=2)
    return np.concatenate([np.median(rows.reshape(-1, 3), axis=0), [2.5 * light.std()]])


@functools.cache
def _known_skies() -> dict[str, Array]:
    return {sky: _sky_features(_empty("snow", sky)) for sky in SKIES}


@functools.cache
def _known_grounds(sky: str) -> dict[str, Array]:
    return {ground: _ground_features(_empty(ground, sky)) for ground in GROUNDS}


def _nearest(known: dict[str, Array], found: Array) -> str:
    return min(known, key=lambda name: float(np.abs(found - known[name]).sum()))


@functools.cache
def _background(ground: str, sky: str) -> Array:
    """Chroma of every row of the place without solids, [rows, 3]."""
    return np.median(_chroma(_empty(ground, sky)), axis=1)


def _chroma(image: Array) -> Array:
    return image / (image.sum(axis=-1, keepdims=True) + 0.06)


def _solids(image: Array, ground: str, sky: str) -> list[Found]:
    height, width = image.shape[:2]
    rows = np.linspace(0, _SIDE - 1, height).round().astype(int)
    away = _chroma(image) - _background(ground, sky)[rows][:, None]
    # Tints of the whole sky or ground are no solids.
    above, below = (np.median(away[part], axis=(0, 1)) for part in (slice(height // 8), slice(-height // 7, None)))
    tint = above + np.linspace(0, 1, height)[:, None] * (below - above)
    distance = np.linalg.norm(away - tint[:, None], axis=-1)
    mask = distance > _MIN_DISTANCE[sky]
    if sky == "night":  # the moon, and its glow
        top = slice(0, height // 4)
        mask[top] &= ~ndimage.binary_dilation(image[top].min(axis=-1) > 0.6, iterations=_SIDE // 14)
    mask = ndimage.binary_closing(ndimage.binary_opening(mask, iterations=2), iterations=4)  # gleams are no gaps
    colours, light = _colour_map(image, sky), image.mean(axis=-1)
    labels, count = ndimage.label(mask)
    patches: dict[int, list[NDArray[np.bool_]]] = {}
    for label in range(1, count + 1):
        for part, colour in _split(labels == label, colours):
            if part.sum() >= _MIN_PATCH * _SIDE * _SIDE:
                patches.setdefault(colour, []).append(part)
    found = []
    for colour, own in patches.items():
        for whole in _joined(own):
            _, bottom, middle = _extent(whole)
            if bottom >= _HORIZON * height and whole.sum() >= _MIN_AREA * _SIDE * _SIDE:  # else in the sky, or noise
                shape = _shape_of(whole, colours == colour, light)
                found.append(Found(shape, list(COLOURS)[colour], middle / width, bottom / height))
    return found


def _joined(patches: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """The solids of one colour: patches that look like one solid together are one, which a gleam or the sky's own
    colour parts."""
    if len(patches) > 1:
        together = _hull(np.logical_or.reduce(patches))
        if _is_one(together):
            return [together]
    return patches


def _is_one(mask: NDArray[np.bool_]) -> bool:
    """Whether it looks like one solid."""
    return max(_likenesses(mask).values()) >= _MIN_JOINED


def _hull(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The smallest convex mask around one: all solids look convex."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return mask
    try:
        corners = ConvexHull(np.stack([columns, rows], axis=1)).vertices
    except QhullError:  # a line
        return mask
    drawn = Image.new("1", mask.shape[::-1])
    ImageDraw.Draw(drawn).polygon([(int(columns[i]), int(rows[i])) for i in corners], fill=1, outline=1)
    return np.asarray(drawn)


def _split(mask: NDArray[np.bool_], colours: NDArray[np.int64]) -> list[tuple[NDArray[np.bool_], int]]:
    """The solids of one connected patch: solids may touch or overlap, and one may mirror others."""
    counts = np.bincount(colours[mask], minlength=len(COLOURS))
    parts: list[tuple[NDArray[np.bool_], int]] = []
    if not _is_one(_hull(mask)):
        for colour in map(int, np.argsort(-counts)):
            if counts[colour] < _MIN_SHARE * counts.sum():
                break
            own = [part for large in _large_parts(mask & (colours == colour)) for part in _at_necks(large)]
            if all(_overlap(_span(part), _span(other)) < 0.6 for part in own for other, _ in parts):
                parts += [(part, colour) for part in own]
    if len(parts) < 2:
        return [(ndimage.binary_fill_holes(mask), int(counts.argmax()))]
    return [(ndimage.binary_fill_holes(ndimage.binary_closing(part, iterations=3)), colour) for part, colour in parts]


def _large_parts(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected parts, those that are much smaller than the largest left out."""
    labels, count = ndimage.label(ndimage.binary_opening(mask, iterations=2))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [labels == 1 + i for i in np.flatnonzero(sizes >= _MIN_PART * sizes.max(initial=1))]


def _at_necks(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Its parts when it is cut where it is narrow, if they look like solids: soft edges run into each other."""
    cores, count = ndimage.label(ndimage.binary_erosion(mask, iterations=_SIDE // 24))
    if count < 2:
        return [mask]
    nearest = ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    parts = [mask & (cores[tuple(nearest)] == label) for label in range(1, count + 1)]
    return parts if all(map(_is_one, parts)) else [mask]


def _span(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Columns between which most of a mask lies."""
    columns = np.repeat(np.arange(mask.shape[1]), mask.sum(axis=0))
    return float(np.quantile(columns, 0.05)), float(np.quantile(columns, 0.95))


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Shared width over that of the narrower."""
    shared = min(a[1], b[1]) - max(a[0], b[0])
    return max(shared, 0.0) / max(min(a[1] - a[0], b[1] - b[0]), 1.0)


@functools.cache
def _known_colours(sky: str) -> Array:
    """Chroma of every colour under a sky, in its light and out of it, matte and glossy: [colours, shades, 3]."""
    shades = [[surface_colour(colour, sky, *shade) for shade in _SHADES] for colour in COLOURS]
    return _chroma(np.array(shades, np.float64) / 255)


def _colour_map(image: Array, sky: str) -> NDArray[np.int64]:
    """Index of the nearest colour of every pixel."""
    known = _known_colours(sky)
    distance = cdist(known.reshape(-1, 3), _chroma(image).reshape(-1, 3))
    return distance.reshape(*known.shape[:2], *image.shape[:2]).min(axis=1).argmin(axis=0)


def _shape_of(mask: NDArray[np.bool_], has_colour: NDArray[np.bool_], light: Array) -> str:
    """The one with the likest silhouette; between several like ones, by its tip and by how the light runs."""
    surely = functools.reduce(np.logical_or, _large_parts(mask & has_colour), np.zeros_like(mask))
    tried = [_likenesses(outline) for outline in (mask, _hull(mask), _hull(surely)) if outline.any()]
    likeness = {shape: max(own[shape] for own in tried) for shape in SHAPES}
    best = max(SHAPES, key=lambda shape: likeness[shape])
    likely = {shape for shape in SHAPES if likeness[shape] > likeness[best] - _MIN_LEAD}
    if likeness[best] >= _MIN_LIKENESS or len(likely) == 1:
        return best
    (box,) = ndimage.find_objects(mask.astype(int))
    widths = _hull(mask)[box].sum(axis=1)
    widths = widths / widths.max()
    height = len(widths)

    def width_at(share: float) -> float:
        return float(np.median(widths[max(int(height * (share - 0.04)), 0) : int(height * (share + 0.04)) + 1]))

    if "cone" in likely and width_at(0.08) < 0.4 and width_at(0.35) < 0.65:
        return "cone"
    if {"cube", "cylinder"} <= likely:
        return "cube" if _is_flat(mask[box], light[box]) else "cylinder"
    return best


def _likenesses(mask: NDArray[np.bool_]) -> dict[str, float]:
    """By shape: the greatest over how it may be turned."""
    turns = {shape: _TURNS if shape == "cube" else _TURNS[:1] for shape in SHAPES}
    return {shape: max(_likeness(mask, shape, turn) for turn in turns[shape]) for shape in SHAPES}


def _likeness(mask: NDArray[np.bool_], shape: str, turn: float) -> float:
    """Of a silhouette to that of a solid of the same area and place: intersection over union.

    Not of the same height: tips and corners are what a soft picture loses first.
    """
    height, width = mask.shape
    _, bottom, middle = _extent(mask)
    x, z = ground_point((middle, bottom), (height, width))
    foot_x, foot_z, radius = x, z, 1.0
    for last in (False, False, False, True):
        drawn = silhouette(
            Scene("sand", "day", (Solid(shape, "red", "matte", "middle", x, z, radius, turn),)), mask.shape
        )
        if not drawn.any():
            return 0.0
        if last:
            break
        radius = float(np.clip(radius * np.sqrt(mask.sum() / drawn.sum()), 0.2, 4.0))
        _, own_bottom, own_middle = _extent(drawn)
        own_x, own_z = ground_point((own_middle, own_bottom), (height, width))
        x, z = x + foot_x - own_x, z + foot_z - own_z
    away = np.subtract(ndimage.center_of_mass(mask), ndimage.center_of_mass(drawn))
    drawn = ndimage.shift(drawn, away.round(), order=0)
    return float((drawn & mask).sum() / (drawn | mask).sum())


def _extent(mask: NDArray[np.bool_]) -> tuple[int, int, float]:
    """First row, the row after the last, and the middle column."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, (int(columns[0]) + int(columns[-1]) + 1) / 2


def _is_flat(mask: NDArray[np.bool_], light: Array) -> bool:
    """Whether a solid has faces rather than running round: by the light across it, and by its lower edge."""
    height = len(mask)
    rows = slice(int(0.35 * height), int(0.8 * height))
    columns = np.flatnonzero(mask[rows].mean(axis=0) > 0.9)
    if len(columns) < 12:
        return False
    columns = columns[len(columns) // 12 : len(columns) - len(columns) // 12]
    profile = np.median(light[rows][:, columns], axis=0)
    edge = height - 1 - np.argmax(mask[::-1][:, columns], axis=0).astype(float)
    x = np.linspace(-1, 1, len(columns))

    def residual(values: Array, degree: int) -> float:
        """Of a polynomial: the mean square."""
        return float(((values - np.polyval(np.polyfit(x, values, degree), x)) ** 2).mean())

    def broken(values: Array, degree: int) -> float:
        """Of two, one beside the other, at the best place."""
        count = len(values)
        best = residual(values, degree)
        for i in range(4, count - 4, 2):
            parts = 0.0
            for part in (slice(None, i), slice(i, None)):
                fitted = np.polyval(np.polyfit(x[part], values[part], degree), x[part])
                parts += float(((values[part] - fitted) ** 2).sum())
            best = min(best, parts / count)
        return best

    noise = 1e-5
    by_light = np.log((broken(profile, 0) + noise) / (residual(profile, 3) + noise))
    by_edge = np.log((broken(edge, 1) + 0.05) / (residual(edge, 2) + 0.05))
    return bool(by_light + by_edge < 0)
