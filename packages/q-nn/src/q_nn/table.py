"""Tables of figures, for people to read."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str | int]]) -> str:
    """Lay rows out in columns as wide as they need; figures are grouped by thousands and stand to the right."""
    cells = [tuple(head), *(tuple(f"{cell:,}" if isinstance(cell, int) else cell for cell in row) for row in rows)]
    figures = [all(isinstance(row[column], int) for row in rows) and bool(rows) for column in range(len(head))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, figures, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
