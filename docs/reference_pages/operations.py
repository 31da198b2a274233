"""A page an op, from its record, its hook and the docstring of its public function."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch

from q_core import hookspecs
from q_core.backend import SURFACE_VERSION
from q_core.formats import codebooks
from q_core.operand import Operand
from q_core.record import OpRecord, Row
from q_core.specs import RECORDS, bounds, record_of
from reference_pages.docstrings import cell, inline, signature_of, to_markdown

_LEGEND = re.compile(r"\b([A-Z]) ([a-z][a-z ]*?)(?=[,.])")


def names() -> list[str]:
    """The ops in the order of the surface."""
    return list(RECORDS)


def letters() -> dict[str, str]:
    """What the shape letters stand for, from the legend at the head of the hook specs."""
    legend = (hookspecs.__doc__ or "").partition("Shape letters")[2]
    return dict(_LEGEND.findall(" ".join(legend.split())))


def index() -> str:
    """The page that lists the ops, with what holds for all of them."""
    parts = [
        "# Ops",
        f"Surface version {SURFACE_VERSION}: {len(RECORDS)} ops. Each is a function of `q_core.ops`, which owns defaults and validation, "
        "and a torch op of the namespace `q`, which takes every argument by position and validates nothing.",
    ]
    for family, records in _families().items():
        rows = [f"| [`{record.name}`]({record.name}.md) | {cell(record.summary)} |" for record in records]
        parts += [f"## {family}", "\n".join(["| op | |", "|---|---|", *rows]), _text(_module(records[0]), _link)]
    parts += ["## Code books", _code_books()]
    factors = " | ".join(f"{factor:g}" for factor in bounds.FACTOR.values())
    dtypes = " | ".join(str(dtype).removeprefix("torch.") for dtype in bounds.FACTOR)
    parts += ["## Tolerances", _text(bounds), f"| | {dtypes} |\n|---|{'---|' * len(bounds.FACTOR)}\n| FACTOR | {factors} |"]
    parts += ["## Shape letters", ", ".join(f"{letter} {meaning}" for letter, meaning in letters().items()) + "."]
    return "\n\n".join(parts) + "\n"


def _code_books() -> str:
    """The values of the 4-bit types by code, as float32 prints them, and where the 8-bit maps are to be had."""
    books = codebooks.FOUR_BIT_BOOKS
    rows = [f"| {code} | {' | '.join(_float32(book.values[code]) for book in books.values())} |" for code in range(16)]
    table = "\n".join([f"| code | {' | '.join(books)} |", f"|---|{'---|' * len(books)}", *rows])
    return (
        "A value is the code's times the block's absmax. Each is the float32 nearest to what is printed. A backend may read them from "
        "`q_core.formats.codebooks`: `FOUR_BIT_BOOKS[quant_type].values` are the values by code, and `.ordered` the codes that are made, "
        "in ascending order of value.\n\n"
        f"{table}\n\n"
        "The 8-bit dynamic maps, 256 values in ascending order, are `DYNAMIC_SIGNED` and `DYNAMIC_UNSIGNED` there; a backend is given "
        "the map as an argument."
    )


def _float32(value: float) -> str:
    """The fewest digits that name a float32."""
    return str(np.float32(value))


def page(op: str) -> str:
    """An op's page."""
    record = record_of(op)
    function = record.public
    facts = "\n".join(f"| {name} | {text} |" for name, text in _facts(record))
    return (
        f"# {op}\n\n"
        f"{inline(record.summary)} Family: [{record.family}](index.md#{record.family}).\n\n"
        f"```python\nq_core.ops.{signature_of(function)}\n```\n\n"
        f"## Contract\n\n{to_markdown(record.contract, _link, heading='###')}\n\n"
        f"## What holds for the family\n\n{_text(_module(record), _link)}\n\n"
        f"## For a backend\n\n"
        f"The function that serves it is marked with `@impl` and takes these arguments by name, in any order:\n\n"
        f"```python\n{signature_of(record.hook)}\n```\n\n"
        f"{_tensors(record)}"
        f"| | |\n|---|---|\n{facts}\n\n"
        f"As a torch op: `{getattr(torch.ops.q, op).default._schema}`\n"
    )


def _tensors(record: OpRecord) -> str:
    """Tables of what goes in and what comes out, and how to read the axes."""
    tables = [
        ("argument | dtypes | axes | mutated | may be left out", [_argument(row) for row in record.argument_rows()]),
        ("result | dtypes | axes", [_shown(row) for row in record.result_rows()]),
    ]
    parts = [
        "\n".join([f"| {head} |", f"|{'---|' * (head.count('|') + 1)}", *(f"| {' | '.join(row)} |" for row in rows)])
        for head, rows in tables
        if rows
    ]
    axes = [row.operand.axes for row in (*record.argument_rows(), *record.result_rows())]
    notes = ["A letter is one size throughout a call."]
    if any("..." in of_one for of_one in axes):
        notes.append("`...` is any number of axes, the same ones throughout.")
    if any("numel" in of_one for of_one in axes):
        notes.append("`numel` is the number of elements in them.")
    if any(isinstance(record.operands[name], Operand) for name in record.lists):
        notes.append("Each tensor of a list is taken with those at the same place in the other lists.")
    if any(row.formats and row.tensor in record.optional for row in record.argument_rows()):
        notes.append("A format that is not named has no such tensor: `None`.")
    notes += [f"`{name}` is {f'({given})' if ', ' in given else f'`{given}`'}." for name, given in record.sizes.items()]
    return "\n\n".join([*parts, " ".join(notes)]) + "\n\n"


def _shown(row: Row) -> list[str]:
    formats = f" ({row.formats})" if row.formats else ""
    return [
        f"`{row.tensor}{row.place}`{formats}",
        f"{row.operand.dtype_text}{', or None' if row.optional else ''}",
        f"`{row.operand.axes_text}`",
    ]


def _argument(row: Row) -> list[str]:
    return [*_shown(row), "yes" if row.mutated else "", f"at `{row.neutral}`" if row.neutral is not None else ""]


def _facts(record: OpRecord) -> Iterator[tuple[str, str]]:
    """What the record says beyond the contract, as rows of a table."""
    used = _letters_of(record)
    yield "Axes", ", ".join(f"{letter} {meaning}" for letter, meaning in letters().items() if letter in used) or "any"
    yield "Mutates", _listed(record.mutates) or "nothing; outputs are new and contiguous"
    neutral = ", ".join(f"`{name}` ({value!r})" for name, value in record.neutral.items())
    yield "May be left out", f"{neutral}: it is asked only where the value is that one" if neutral else "nothing"
    if record.bound is None:
        yield "Agreement with the reference", "exact, bit for bit"
    else:
        rule = " ".join((inspect.getdoc(record.bound) or "").split())
        yield "Agreement with the reference", f"within a [bound](index.md#tolerances). {cell(rule)}"
    yield "Gradient", _gradient(record)
    yield "Cast by autocast", _listed(record.autocast) or "nothing"


def _gradient(record: OpRecord) -> str:
    if record.mutates:
        return "none: it writes to its arguments; outside of `torch.no_grad()` the torch op refuses those that require one"
    if record.gradient is None:
        return "none: a backward through it raises"
    return "q-core's formula; a backend has none to write"


def _letters_of(record: OpRecord) -> set[str]:
    """Letters in the suffixes of its arguments and in the axes that are declared."""
    suffixes = [re.findall(r"_([A-Z]+)$", name) for name in record.arguments]
    axes = [
        re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", row.operand.axes) for row in (*record.argument_rows(), *record.result_rows())
    ]
    return {letter for found in (*suffixes, *axes) for letters in found for letter in letters}


def _families() -> dict[str, list[OpRecord]]:
    families: dict[str, list[OpRecord]] = {}
    for record in RECORDS.values():
        families.setdefault(record.family, []).append(record)
    return families


def _module(record: OpRecord) -> object:
    return importlib.import_module(f"q_core.ops.{record.family}")


def _text(described: object, link: Callable[[str], str | None] = lambda target: None) -> str:
    return to_markdown(inspect.getdoc(described) or "", link, heading="###")


def _link(target: str) -> str | None:
    name = target.rpartition(".")[2]
    if target == "q_core.formats.codebooks":
        return "index.md#code-books"
    return f"{name}.md" if name in RECORDS else None


def _listed(arguments: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in arguments)
