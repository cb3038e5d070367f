"""Infinity's scale schedules: token maps (height, width) per scale, for every size and aspect ratio.

The 13 scales per ratio are those of `dynamic_resolution.py` of Infinity; smaller sizes are their beginnings. `2K`
appends one scale, as FastVAR does; `4M` (2048x2048) is this project's extension.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastvar_trt.runtime.errors import ExportError

_SAME_RATIO = 0.02  # 16:9 is Infinity's 7:4
Schedule = tuple[tuple[int, int], ...]

# Height over width >= 1 -> (height, width) per scale; the inverse ratios swap the two.
_TALL: Mapping[float, str] = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
NUM_SCALES: Mapping[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
# What is appended to the 13 scales, per size and ratio.
_EXTENSIONS: Mapping[str, Mapping[float, Schedule]] = {
    "2K": {1.0: ((84, 84),), 1.333: ((84, 63),), 2.0: ((120, 60),), 0.5: ((60, 120),)},
    "4M": {1.0: ((96, 96), (128, 128))},
}
SIZES = (*NUM_SCALES, *_EXTENSIONS)


def _full_schedules() -> dict[float, Schedule]:
    schedules: dict[float, Schedule] = {}
    for ratio, text in _TALL.items():
        tall = tuple((int(h), int(w)) for h, w in (size.split("x") for size in text.split()))
        schedules[ratio] = tall
        if ratio != 1.0:
            schedules[int(1 / ratio * 1000) / 1000] = tuple((w, h) for h, w in tall)  # Infinity's names: 0.666, 0.333
    return schedules


_FULL = _full_schedules()


def ratios(size: str) -> tuple[float, ...]:
    """Heights over width that a size has, rising."""
    return tuple(sorted(_EXTENSIONS.get(size, _FULL)))


def schedule(size: str, h_div_w: float) -> tuple[Schedule, tuple[int, int]]:
    """The token maps of a size and aspect ratio.

    Args:
        size: one of `SIZES`, Infinity's `pn`.
        h_div_w: height over width, as Infinity names it; it must be one of `ratios(size)`, up to 2 %.

    Returns:
        (height, width) per scale, and the map whose corners the rotary grid spans: the last scale of the full
        schedule, also for sizes that stop before it.

    Raises:
        ExportError: an unknown size, or a ratio that it does not have.
    """
    if size not in SIZES:
        raise ExportError(f"--pn {size}: expected one of {', '.join(SIZES)}")
    ratio = min(ratios(size), key=lambda known: abs(known - h_div_w))
    if not abs(ratio - h_div_w) <= _SAME_RATIO * ratio:
        known = ", ".join(f"{value:g}" for value in ratios(size))
        raise ExportError(f"--h-div-w {h_div_w:g}: pn {size} has the ratios {known} (height over width)")
    full = _FULL[ratio] + _EXTENSIONS.get(size, {}).get(ratio, ())
    return full[: NUM_SCALES.get(size)], full[-1]
