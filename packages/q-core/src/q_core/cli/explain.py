"""``q-core explain``: who serves an op, and why the others decline."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from typing import Any

from q_core.cli.options import add_device, add_json

HELP = "who serves an op, and why the others decline; exit code 1 if nobody does"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", help="name of the op, such as gemm_4bit")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="NAME=VALUE",
        help="settings of the call asked about, such as quant_type=fp4 blocksize=128; the others are those of a sample",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of its floating tensors")
    add_device(parser)
    add_json(parser)


def setting(text: str) -> tuple[str, Any]:
    """``name=value``, where a value is a Python literal or else a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"explain: {text!r} is no setting, expected NAME=VALUE, such as quant_type=fp4.")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def run(arguments: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from q_core.backend import BackendError
    from q_core.explanation import explain

    settings = dict(map(setting, arguments.settings))
    try:
        explanation = explain(arguments.op, device=arguments.device, dtype=getattr(torch, arguments.dtype), **settings)
    except BackendError as fault:
        print(f"q-core: {fault}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(explanation), indent=2) if arguments.json else explanation)
    return 0 if explanation.served_by else 1
