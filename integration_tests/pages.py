"""Tables in Markdown, and places for them in files that people write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def write_between(path: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what a Markdown file has between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
        ValueError: it hasn't these two lines, once.
    """
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->\n)", re.DOTALL)
    text, count = marks.subn(lambda found: "\n".join((found[1], *lines, "", found[2])), path.read_text())
    if count != 1:
        raise ValueError(f"{path} has {count} places between <!-- {name} --> and <!-- end of {name} -->, expected one")
    path.write_text(text)
