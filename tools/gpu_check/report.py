"""What a check found, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvar_trt.tools.files import write_text
from fastvar_trt.tools.gpu_check.sections import Section
from fastvar_trt.tools.sheets import saved_figure
from fastvar_trt.tools.tables import format_table

FILES = ("gpu_check.json", "gpu_check.md", "gpu_check.png")


def write_report(sections: Sequence[Section], out: Path) -> str:
    """Write what there is so far; returns the Markdown."""
    machine = {"python": platform.python_version(), "system": platform.platform()}
    data = {"machine": machine, "sections": [dataclasses.asdict(section) for section in sections]}
    text = _to_markdown(sections, machine)
    write_text(out / FILES[0], json.dumps(data, indent=1) + "\n")
    write_text(out / FILES[1], text)
    return text


def _to_markdown(sections: Sequence[Section], machine: dict[str, str]) -> str:
    lines = ["# GPU check", "", ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    for section in sections:
        lines += [f"## {section.name}", "", f"{section.seconds:.0f} s", ""]
        if section.skipped:
            lines += [f"Skipped: {section.skipped}", ""]
        if section.failed:
            lines += [f"**Failed**: {section.failed}", ""]
        if section.results:
            # Tables in a cell have no place here: the JSON has them.
            header = [key for key, value in section.results[0].items() if key != "ok" and not isinstance(value, dict)]
            rows = [[result[key] for key in header] for result in section.results]
            lines += ["```", format_table(header, rows), "```", ""]
    return "\n".join(lines)


def plot(speeds: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Bars: the time of every variant, model by model."""
    height = sum(len(rows) for rows in speeds.values())
    with saved_figure(path, (8, 1.2 + 0.32 * height + 0.6 * len(speeds))) as figure:
        ratios = [len(rows) for rows in speeds.values()]
        axes = figure.subplots(len(speeds), height_ratios=ratios, squeeze=False)
        for (title, rows), ax in zip(speeds.items(), axes[:, 0], strict=True):
            names = [row["variant"] for row in rows]
            colours = ["tab:grey" if name.startswith("PyTorch") else "tab:blue" for name in names]
            bars = ax.barh(names, [row["ms"] for row in rows], color=colours)
            ax.bar_label(bars, fmt="%.1f", padding=3)
            ax.margins(x=0.12)
            ax.invert_yaxis()
            ax.set_title(title)
        axes[-1, 0].set_xlabel("ms per image, medians")
