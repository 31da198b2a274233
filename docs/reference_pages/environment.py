"""The page of environment variables, from the one module a package that reads them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reference_pages.docstrings import cell, entries, sections

_DESCRIBED = re.compile(r"^(?:- |\w+: )?``(?P<name>[A-Z_]+)``[:,] (?P<text>.*)", re.DOTALL)
_READ = re.compile(r"""environ(?:\.get\(|\[)["'](?P<name>\w+)["']""")


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable: its name, the package that reads it, what it does."""

    name: str
    package: str
    text: str


def modules(root: Path) -> list[Path]:
    """The modules that read environment variables."""
    return sorted(root.glob("*/q-*/src/*/environment.py"))


def read_in(module: Path) -> set[str]:
    """The variables that a module reads."""
    return set(_READ.findall(module.read_text(encoding="utf-8")))


def described_in(module: Path) -> Iterator[Variable]:
    """The variables that a module's docstrings describe, with ``Q_NAME`` in front; where several do, the first of them."""
    found = set()
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for section in sections(ast.get_docstring(node) or "").values():
                for entry in entries(section):
                    match = _DESCRIBED.match(entry)
                    if match and match["name"] not in found:
                        found.add(match["name"])
                        yield Variable(match["name"], module.parent.name, match["text"])


def page(root: Path) -> str:
    """The page."""
    rows = [
        f"| `{variable.name}` | {variable.package} | {cell(variable.text)} |"
        for module in modules(root)
        for variable in described_in(module)
    ]
    table = "\n".join(["| variable | read by | |", "|---|---|---|", *rows])
    return f"# Environment variables\n\nEach package reads its own in one module, `environment.py`.\n\n{table}\n"
