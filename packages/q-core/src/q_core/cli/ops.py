"""``q-core ops``: the surface, op by op."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from q_core.cli.options import add_json

if TYPE_CHECKING:
    from q_core.record import Row

HELP = "every op of the surface; of one its schema and contract, dtypes and axes, what it mutates, what a backend may leave out"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", help="one op only, with its whole contract and what holds for its family")
    add_json(parser)


def report(op: str | None) -> list[dict[str, Any]]:
    """The records of all ops, or of one, as plain data."""
    import importlib
    import inspect

    import torch

    import q_core.dispatch  # noqa: F401  # defines the torch ops, whose schemas are shown
    from q_core.specs import RECORDS, record_of

    return [
        {
            "op": record.name,
            "family": record.family,
            "summary": record.summary,
            "schema": str(getattr(torch.ops.q, record.name).default._schema),
            "operands": [_plain(row) for row in record.argument_rows()],
            "outputs": [_plain(row) for row in record.result_rows()],
            "mutates": list(record.mutates),
            "neutral": {name: repr(value) for name, value in record.neutral.items()},
            "gradient": record.gradient is not None,
            "exact": record.bound is None,
            "contract": record.contract,
            "holds": inspect.getdoc(importlib.import_module(f"q_core.ops.{record.family}")),
        }
        for record in (RECORDS.values() if op is None else [record_of(op)])
    ]


def _plain(row: Row) -> dict[str, Any]:
    return {
        "tensor": row.tensor + row.place,
        "formats": row.formats.split(", ") if row.formats else [],
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in row.operand.dtypes],
        "axes": row.operand.axes,
        "flat": row.operand.flat,
        "mutated": row.mutated,
        "optional": row.optional,
        "neutral": row.neutral,
        "text": f"{row.operand.dtype_text} {row.operand.axes_text}{', or None' if row.optional else ''}",
    }


def _print_tensors(title: str, rows: list[dict[str, Any]]) -> None:
    """A line a tensor: its name, the formats that it is of, dtypes and axes, and whether it is written to."""
    if not rows:
        return
    print(f"{title}:")
    width = max(len(row["tensor"]) for row in rows)
    for row in rows:
        formats = f" ({', '.join(row['formats'])})" if row["formats"] else ""
        print(f"  {row['tensor']:<{width}}  {row['text']}{formats}{', mutated' if row['mutated'] else ''}")
    print()


def run(arguments: argparse.Namespace) -> int:
    found = report(arguments.op)
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif arguments.op:
        (op,) = found
        print(f"{op['schema']}\n\n{op['contract']}\n\n{op['family']}: {op['holds']}\n")
        _print_tensors("Tensors", op["operands"])
        _print_tensors("Results", op["outputs"])
        print(f"Mutates: {', '.join(op['mutates']) or 'nothing'}.")
        print(f"A backend may leave out: {', '.join(f'{name} ({value})' for name, value in op['neutral'].items()) or 'nothing'}.")
        print(f"Agreement with the reference: {'exact' if op['exact'] else 'within a bound, see q_core.specs.bounds'}.")
    else:
        width = max(len(op["op"]) for op in found)
        for op in found:
            print(f"{op['op']:<{width}}  {op['summary']}")
    return 0
