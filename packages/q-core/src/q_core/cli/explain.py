"""``q-core explain``: who serves an op, and why the others decline."""

from __future__ import annotations

import argparse
import json

from q_core.cli.options import add_device, add_json

HELP = "who serves an op, and why the others decline"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", help="name of the op, such as gemm_4bit")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add_device(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from q_core.explanation import explain

    explanation = explain(arguments.op, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    print(json.dumps(dataclasses.asdict(explanation), indent=2) if arguments.json else explanation)
    return 0
