"""Plain-text tables for terminals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under a header: columns of words aligned left, those of numbers right; the first always left."""
    cells = [list(header), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    is_left = [i == 0 or _are_words(row[i] for row in cells[1:]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_left, strict=True)
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _are_words(cells: Iterable[str]) -> bool:
    return all(cell[:1].isalpha() for cell in cells)
