"""Scenes as pictures: an analytic ray tracer in numpy, the same picture at any resolution.

Solids of four shapes stand on a textured ground under a sky, lit by one soft light, the sky and the ground. Colours are
linear inside, and have a gamma of 2.2 in the picture.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvar_trt.tools.scenes.world import Scene, Solid

Array = NDArray[Any]  # of float32

_CAMERA = np.array([0.0, 2.0, -7.4], np.float32)
_PITCH = -0.155  # radians
_FOCAL = 2.0  # of half the picture's shorter side
_FAR = np.float32(1e6)
_LIGHT_SIZE = 0.14  # radius of the light, at distance 1: how soft shadows are
_LIGHT_SAMPLES = 9

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.72, 0.02, 0.02),
    "orange": (0.90, 0.22, 0.01),
    "yellow": (0.88, 0.66, 0.02),
    "green": (0.02, 0.36, 0.05),
    "blue": (0.02, 0.09, 0.72),
    "purple": (0.26, 0.03, 0.48),
}
_GROUND: Mapping[str, tuple[float, float, float]] = {
    "grass": (0.10, 0.26, 0.03),
    "sand": (0.66, 0.45, 0.20),
    "snow": (0.82, 0.87, 0.93),
    "tiles": (0.42, 0.38, 0.35),
}


@dataclasses.dataclass(frozen=True)
class _Air:
    """A sky: its colours at the zenith and the horizon, its light, and what the shade gets."""

    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    light: tuple[float, float, float]
    shade: tuple[float, float, float]


_AIR: Mapping[str, _Air] = {
    "day": _Air((0.05, 0.20, 0.72), (0.58, 0.78, 0.95), (1.00, 0.95, 0.85), (0.30, 0.36, 0.45)),
    "sunset": _Air((0.10, 0.05, 0.24), (1.00, 0.34, 0.08), (1.00, 0.55, 0.28), (0.26, 0.16, 0.20)),
    "night": _Air((0.003, 0.006, 0.03), (0.02, 0.035, 0.11), (0.26, 0.32, 0.52), (0.07, 0.085, 0.14)),
}


def render(scene: Scene, size: tuple[int, int], *, samples: int = 2) -> NDArray[np.uint8]:
    """A picture.

    Args:
        scene: what is in it.
        size: height and width in pixels.
        samples: rays per pixel and axis.

    Returns:
        uint8 [height, width, 3], RGB.
    """
    height, width = size
    directions = _rays(height * samples, width * samples)
    linear = _trace(scene, directions)
    return _encoded(linear.reshape(height, samples, width, samples, 3).mean(axis=(1, 3)))


def silhouette(scene: Scene, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where solids are: bool [height, width]."""
    directions = _rays(*size)
    mask = np.zeros(size, bool)
    for solid in map(_Placed.of, scene.solids):
        window = solid.window(directions)
        if window is not None:
            mask[window] |= solid.hit(_CAMERA, directions[window])[0] < _FAR
    return mask


def ground_point(pixel: tuple[float, float], size: tuple[int, int]) -> tuple[float, float]:
    """Where the ground lies behind a pixel below the horizon: x and z.

    Args:
        pixel: column and row.
        size: height and width of the picture.
    """
    height, width = size
    half = min(height, width) / 2
    x, y = (pixel[0] - width / 2) / half, (height / 2 - pixel[1]) / half
    cos, sin = np.cos(_PITCH), np.sin(_PITCH)
    below = min(float(y * cos + _FOCAL * sin), -1e-3)
    reach = -float(_CAMERA[1]) / below
    return float(_CAMERA[0]) + reach * x, float(_CAMERA[2]) + reach * float(-y * sin + _FOCAL * cos)


def surface_colour(colour: str, sky: str, lit: float, mirrored: float = 0.0) -> NDArray[np.uint8]:
    """What a surface looks like under a sky that reaches it: uint8 [3].

    Args:
        colour, sky: of `world.COLOURS`, `world.SKIES`.
        lit: share of the light that reaches it.
        mirrored: share of the horizon's colour in what is seen.
    """
    air = _AIR[sky]
    own = np.array(COLOURS[colour]) * (np.array(air.light) * lit + np.array(air.shade))
    return _encoded(own * (1 - mirrored) + np.array(air.horizon) * mirrored)


def _encoded(linear: Array) -> NDArray[np.uint8]:
    return (np.clip(linear, 0, 1) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)


@functools.lru_cache(maxsize=2)
def _rays(height: int, width: int) -> Array:
    """Unit directions [height, width, 3]."""
    half = min(height, width) / 2
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / half
    y = (height / 2 - np.arange(height, dtype=np.float32) - 0.5) / half
    cos, sin = np.cos(_PITCH), np.sin(_PITCH)
    d = np.empty((height, width, 3), np.float32)
    d[..., 0] = x
    d[..., 1] = (y * cos + _FOCAL * sin)[:, None]
    d[..., 2] = (-y * sin + _FOCAL * cos)[:, None]
    return d / np.linalg.norm(d, axis=-1, keepdims=True)


def _trace(scene: Scene, d: Array) -> Array:
    """Linear colours [height, width, 3] of what rays from the camera meet."""
    air, light = _AIR[scene.sky], _light(scene)
    placed = [_Placed.of(solid) for solid in scene.solids]
    image = _sky(scene, d)
    nearest = np.full(d.shape[:2], _FAR)
    below = d[..., 1] < -1e-3
    rows = np.flatnonzero(below.any(axis=1))
    if len(rows):
        top = rows[0]
        part = d[top:]
        t = np.where(part[..., 1] < -1e-3, -_CAMERA[1] / np.minimum(part[..., 1], -1e-3), _FAR)
        colour = _ground(scene, placed, part, t, air, light)
        image[top:] = np.where((t < _FAR)[..., None], colour, image[top:])
        nearest[top:] = t
    for solid in placed:
        window = solid.window(d)
        if window is None:
            continue
        part = d[window]
        t, normals = solid.hit(_CAMERA, part)
        mine = t < nearest[window]
        if not mine.any():
            continue
        points = _CAMERA + t[mine][:, None] * part[mine]
        lit = _unshaded(points, [other for other in placed if other is not solid], light)
        colour = _surface(solid, scene, part[mine], normals()[mine], lit, air, light)
        image[window][mine] = colour
        nearest[window][mine] = t[mine]
    return image


def _light(scene: Scene) -> Array:
    """Unit vector towards the light."""
    azimuth, elevation = scene.light
    flat = np.cos(elevation)
    return np.array([flat * np.sin(azimuth), np.sin(elevation), -flat * np.cos(azimuth)], np.float32)


def _sky_light(sky: str, d: Array) -> Array:
    """Colours of the air along d [..., 3]."""
    air = _AIR[sky]
    height = np.clip(d[..., 1:2] / 0.5, 0, 1) ** (0.55 if sky == "sunset" else 0.75)
    return np.array(air.horizon, np.float32) * (1 - height) + np.array(air.zenith, np.float32) * height


def _sky(scene: Scene, d: Array) -> Array:
    """The air, and at night the moon."""
    colour = _sky_light(scene.sky, d)
    if scene.sky == "night":
        rows, columns = d.shape[:2]
        half = min(rows, columns) / 2
        x = (np.arange(columns) + 0.5 - columns / 2) / half
        y = (rows / 2 - np.arange(rows) - 0.5) / half
        away = np.hypot(x[None] - scene.moon[0], y[:, None] - scene.moon[1]).astype(np.float32)
        disc = np.clip((0.09 - away) * half / 2 + 0.5, 0, 1)[..., None]
        glow = 0.10 * np.exp(-((away / 0.18) ** 2))[..., None]
        moon = np.array([0.88, 0.84, 0.66], np.float32)
        colour = (colour + glow * moon) * (1 - disc) + moon * disc
    return colour.astype(np.float32)


def _ground(scene: Scene, solids: list[_Placed], d: Array, t: Array, air: _Air, light: Array) -> Array:
    """Colours of the plane y = 0 at the distances t."""
    reach = np.minimum(t, 80)
    x, z = d[..., 0] * reach, _CAMERA[2] + d[..., 2] * reach
    near = np.exp(-reach / 16)  # texture fades before it is finer than a pixel
    base = np.array(_GROUND[scene.ground], np.float32) * _TEXTURES[scene.ground](x, z, near)[..., None]
    lit = np.ones(t.shape, np.float32)
    close = np.ones(t.shape, np.float32)
    for solid in solids:
        # What stands on the ground takes the sky's light from it around its foot.
        away = ((x - solid.x) ** 2 + (z - solid.z) ** 2) / solid.radius**2
        close *= 1 - 0.55 * np.exp(-0.9 * away)
        affected = (away < 30) & (t < _FAR)
        points = np.stack([x[affected], np.zeros(int(affected.sum()), np.float32), z[affected]], axis=-1)
        lit[affected] *= _unshaded(points, [solid], light)
    direct = np.array(air.light, np.float32) * max(float(light[1]), 0.2)
    colour = base * (direct * lit[..., None] + np.array(air.shade, np.float32) * close[..., None])
    fog = (1 - np.exp(-((reach / 34) ** 1.6)))[..., None]
    return colour * (1 - fog) + 0.9 * np.array(air.horizon, np.float32) * fog


def _grass(x: Array, z: Array, near: Array) -> Array:
    waves = np.sin(5.3 * x + 2 * np.sin(3.9 * z)) * np.sin(4.7 * z + 1.7 * np.sin(3.3 * x))
    return 1 + 0.22 * waves * near


def _sand(x: Array, z: Array, near: Array) -> Array:
    return 1 + 0.09 * np.sin(4.2 * z + 1.3 * np.sin(1.1 * x)) * near


def _snow(x: Array, z: Array, near: Array) -> Array:
    return 1 + 0.03 * np.sin(0.9 * x + 0.7 * z) * near


def _tiles(x: Array, z: Array, near: Array) -> Array:
    sharp = np.tanh(14 * np.sin(np.pi * x / 1.3) * np.sin(np.pi * z / 1.3) * near)
    return 1 + 0.42 * sharp * near**0.5


_TEXTURES: Mapping[str, Callable[[Array, Array, Array], Array]] = {
    "grass": _grass,
    "sand": _sand,
    "snow": _snow,
    "tiles": _tiles,
}


def _unshaded(points: Array, solids: list[_Placed], light: Array) -> Array:
    """Share of the light [N] that reaches points [N, 3] past some solids."""
    reached = np.ones(len(points), np.float32)
    # Only where a solid's surrounding ball reaches into the cone from the point to the light.
    near = np.zeros(len(points), bool)
    for solid in solids:
        to_solid = solid.centre - points
        along = to_solid @ light
        aside = np.einsum("ni,ni->n", to_solid, to_solid) - along**2  # squared
        widest = solid.reach + 1.1 * _LIGHT_SIZE * (np.abs(along) + solid.reach)
        near |= (along > -solid.reach) & (aside < widest**2)
    points = points[near]
    if not len(points):
        return reached
    side = np.cross(light, np.array([0.0, 1.0, 0.0]))
    side /= np.linalg.norm(side)
    up = np.cross(side, light)
    clear_rays = np.zeros(len(points), np.float32)
    for i in range(_LIGHT_SAMPLES):  # a sunflower on the light's disc
        r, angle = _LIGHT_SIZE * np.sqrt((i + 0.5) / _LIGHT_SAMPLES), 2.39996 * i
        towards = light + r * (np.cos(angle) * side + np.sin(angle) * up)
        towards = (towards / np.linalg.norm(towards)).astype(np.float32)
        clear = np.ones(len(points), bool)
        start = points + 1e-3 * towards
        for solid in solids:
            clear &= solid.hit(start, np.broadcast_to(towards, points.shape))[0] >= _FAR
        clear_rays += clear
    reached[near] = clear_rays / _LIGHT_SAMPLES
    return reached


def _surface(solid: _Placed, scene: Scene, d: Array, n: Array, lit: Array, air: _Air, light: Array) -> Array:
    """Colours [N, 3] of a solid's surface, seen along d, with normals n."""
    base = np.array(COLOURS[solid.colour], np.float32)
    towards = (n @ light)[:, None]
    direct = np.array(air.light, np.float32) * np.clip(0.9 * towards + 0.1, 0, None) * lit[:, None]
    up = n[:, 1:2]
    bounce = np.array(_GROUND[scene.ground], np.float32) * np.array(air.shade, np.float32)
    shade = np.array(air.shade, np.float32) * (0.75 + 0.35 * up) + bounce * 0.5 * np.clip(1 - up, 0, None)
    colour = base * (direct + shade)
    half = light - d
    half /= np.linalg.norm(half, axis=-1, keepdims=True)
    gleam = np.clip((n * half).sum(-1, keepdims=True), 0, 1)
    if solid.material == "glossy":
        mirrored = d - 2 * (n * d).sum(-1, keepdims=True) * n
        share = np.clip(mirrored[:, 1:2] / 0.5 + 0.5, 0, 1)  # of the sky: a surface that is not quite a mirror
        around = _sky_light(scene.sky, mirrored) * share + 2 * bounce * (1 - share)
        fresnel = 0.06 + 0.5 * np.clip(1 + (n * d).sum(-1, keepdims=True), 0, 1) ** 4
        colour = colour * (1 - fresnel) + around * fresnel
        return colour + np.array(air.light, np.float32) * (0.5 * gleam**70) * lit[:, None]
    return colour + np.array(air.light, np.float32) * (0.05 * gleam**12) * lit[:, None]


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A solid in the world: its foot's centre, its size, and what rays meet of it."""

    shape: str
    colour: str
    material: str
    x: float
    z: float
    radius: float
    turn: float

    @classmethod
    def of(cls, solid: Solid) -> _Placed:
        return cls(solid.shape, solid.colour, solid.material, solid.x, solid.z, solid.radius, solid.turn)

    @property
    def centre(self) -> Array:
        """Of a ball around it, [3]."""
        return np.array([self.x, self.radius, self.z], np.float32)

    @property
    def reach(self) -> float:
        """Radius of that ball."""
        return 1.75 * self.radius

    def window(self, d: Array) -> tuple[slice, slice] | None:
        """Rows and columns of rays that may meet it."""
        centre = self.centre - _CAMERA
        distance = float(np.linalg.norm(centre))
        reach = math.sqrt(max(1 - (self.reach / distance) ** 2, 0.0))
        inside = d @ (centre / distance).astype(np.float32) > reach
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        if not len(rows):
            return None
        return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)

    def hit(self, origin: Array, d: Array) -> tuple[Array, Callable[[], Array]]:
        """What rays from origin [3] or [..., 3] along d [..., 3] meet.

        Returns:
            distances [...], `_FAR` for none; and what computes the normals [..., 3] there, which few ask for.
        """
        o = np.broadcast_to(origin - np.array([self.x, 0, self.z], np.float32), d.shape)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            t, normals = getattr(self, f"_{self.shape}")(o, d)
        return np.where(np.isfinite(t) & (t > 1e-4), t, _FAR).astype(np.float32), lambda: normals().astype(np.float32)

    def _sphere(self, o: Array, d: Array) -> tuple[Any, Callable[[], Any]]:
        r = self.radius
        o = o - np.array([0, r, 0], np.float32)
        b, c = (o * d).sum(-1), (o * o).sum(-1) - r * r
        t = -b - np.sqrt(b * b - c)
        return t, lambda: _along(o, d, t) / r

    def _cube(self, o: Array, d: Array) -> tuple[Any, Callable[[], Any]]:
        h = 0.72 * self.radius
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        turned = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float32)
        o, d = (o - np.array([0, h, 0], np.float32)) @ turned.T, d @ turned.T
        inverse = 1 / np.where(np.abs(d) < 1e-7, 1e-7, d)
        middle, spread = -o * inverse, np.abs(h * inverse)
        enter, leave = (middle - spread), (middle + spread)
        # In pairs: numpy is slow at reducing axes of three.
        t = np.maximum(np.maximum(enter[..., 0], enter[..., 1]), enter[..., 2])
        left = np.minimum(np.minimum(leave[..., 0], leave[..., 1]), leave[..., 2])

        def normals() -> Array:
            return np.where(np.arange(3) == enter.argmax(-1)[..., None], -np.sign(d), 0) @ turned

        return np.where(t < left, t, np.nan), normals

    def _cylinder(self, o: Array, d: Array) -> tuple[Any, Callable[[], Any]]:
        r, h = 0.62 * self.radius, 2.0 * self.radius
        a, b, c = _quadratic(o, d, r)
        t = (-b - np.sqrt(b * b - a * c)) / a
        y = o[..., 1] + t * d[..., 1]
        t = np.where((y > 0) & (y < h), t, np.nan)
        lid = (h - o[..., 1]) / d[..., 1]
        x, z = (o[..., i] + lid * d[..., i] for i in (0, 2))
        on_lid = (x * x + z * z < r * r) & (lid > 0) & ~(t < lid)
        t = np.where(on_lid, lid, t)

        def normals() -> Array:
            side = _along(o, d, t) / r * np.array([1, 0, 1], np.float32)
            return np.where(on_lid[..., None], np.broadcast_to(np.array([0, 1, 0], np.float32), side.shape), side)

        return t, normals

    def _cone(self, o: Array, d: Array) -> tuple[Any, Callable[[], Any]]:
        r, h = 1.05 * self.radius, 2.1 * self.radius
        k = (r / h) ** 2  # x^2 + z^2 = k (h - y)^2
        below = h - o[..., 1]
        a = d[..., 0] ** 2 + d[..., 2] ** 2 - k * d[..., 1] ** 2
        b = o[..., 0] * d[..., 0] + o[..., 2] * d[..., 2] + k * below * d[..., 1]
        c = o[..., 0] ** 2 + o[..., 2] ** 2 - k * below**2
        root = np.sqrt(b * b - a * c)
        best = np.full(a.shape, np.nan, np.float32)
        for sign in (-1, 1):  # of the two cones, the lower one
            t = (-b + sign * root) / a
            y = o[..., 1] + t * d[..., 1]
            t = np.where((y > 0) & (y < h) & (t > 0), t, np.nan)
            best = np.fmin(best, t)

        def normals() -> Array:
            point = _along(o, d, best)
            slope = np.stack([point[..., 0], k * (h - point[..., 1]), point[..., 2]], axis=-1)
            return slope / np.maximum(np.linalg.norm(slope, axis=-1, keepdims=True), 1e-6)

        return best, normals


def _along(o: Array, d: Array, t: Array) -> Array:
    """Points [..., 3] of rays at distances t [...]; their origins where they meet nothing."""
    return o + np.where(np.isfinite(t), t, 0)[..., None] * d


def _quadratic(o: Array, d: Array, r: float) -> tuple[Any, Any, Any]:
    """Of an upright cylinder: a t^2 + 2 b t + c = 0."""
    a = d[..., 0] ** 2 + d[..., 2] ** 2
    b = o[..., 0] * d[..., 0] + o[..., 2] * d[..., 2]
    return a, b, o[..., 0] ** 2 + o[..., 2] ** 2 - r * r
