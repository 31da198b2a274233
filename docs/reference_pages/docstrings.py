"""Docstrings in Google's style, and signatures, as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from textwrap import dedent

SECTIONS = {"Args": "Arguments", "Attributes": "Attributes", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}
"""Titles of a docstring's sections, and how they are called on a page."""

_SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):$", re.MULTILINE)
_ENTRY = re.compile(r"^(?P<names>[\w*]+(?:, [\w*]+)*): (?P<text>.*)", re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?(?P<target>[\w.]+)`")
_ARXIV = re.compile(r"\barXiv (\d{4}\.\d{4,5})")


def sections(docstring: str) -> dict[str, str]:
    """The text before the sections under "", then each section's, dedented, by its title."""
    first, *rest = _SECTION.split(docstring)
    return {"": first.strip()} | {
        title: dedent(body.strip("\n")).strip() for title, body in zip(rest[::2], rest[1::2], strict=True)
    }


def entries(section: str) -> list[str]:
    """A section's entries, each on one line: one starts where a line isn't indented."""
    found: list[str] = []
    for line in section.splitlines():
        if line and not line[0].isspace():
            found.append(line)
        elif found:
            found[-1] += f" {line.strip()}"
    return found


def inline(text: str, link: Callable[[str], str | None] = lambda target: None) -> str:
    """Roles, literals and sources of a docstring's text as Markdown.

    Args:
        text: of a docstring.
        link: where a dotted name is described, if anywhere.
    """

    def role(match: re.Match[str]) -> str:
        name = match["target"].rpartition(".")[2]
        where = link(match["target"])
        return f"[`{name}`]({where})" if where else f"`{match['target']}`"

    text = _ROLE.sub(role, text).replace("``", "`").replace("::\n", ":\n")
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def cell(text: str) -> str:
    """A docstring's text on one line, for a cell of a table."""
    return inline(text).replace("|", "\\|").replace("\n", " ")


def to_markdown(docstring: str, link: Callable[[str], str | None] = lambda target: None, *, heading: str = "##") -> str:
    """A whole docstring as Markdown: the text, and a list for each section."""
    parts = []
    for title, body in sections(docstring).items():
        if not title:
            parts.append(inline(body, link))
            continue
        items = entries(body)
        listed = all(_ENTRY.match(item) for item in items)
        text = "\n".join(f"- {_item(item)}" for item in items) if listed else body
        parts.append(f"{heading} {SECTIONS[title]}\n\n{inline(text, link)}")
    return "\n\n".join(parts)


def _item(entry: str) -> str:
    match = _ENTRY.match(entry)
    assert match is not None
    names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
    return f"{names}: {match['text']}"


def signature_of(described: Callable[..., object]) -> str:
    """The signature of a function or a dataclass with an argument a line, annotations as they are in the source."""
    signature = inspect.signature(described)
    lines = []
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("    *,")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"    {parameter.name}: {parameter.annotation}{default.replace('<factory>', '…')},")
    returned = "" if inspect.isclass(described) else f" -> {signature.return_annotation}"
    return "\n".join([f"{described.__name__}(", *lines, f"){returned}"])
