"""What several subcommands take: how to quantize."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from q_nn.config import DEFAULT_SKIP, QConfig
from q_nn.rules import FORMATS, QRule

_KEEP = "none"


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`config_of` reads, but for the format."""
    parser.add_argument(
        "--blocksize", type=int, metavar="N", help="elements a scale of a 4-bit format (64; mxfp4 has 32, nvfp4 16)"
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="quantize the scales of nf4, fp4 and int4 too (the default)",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="X", help="of int8: activations from which on columns aren't rounded (6)"
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help=f"leave these modules as they are, beside {', '.join(DEFAULT_SKIP)}; names, suffixes or regular expressions; repeatable",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        type=_rule,
        metavar="PATTERN=FORMAT",
        help=f"another format for some modules, or {_KEEP!r}; the first that means a module holds, before --skip; repeatable",
    )


def config_of(arguments: argparse.Namespace) -> QConfig:
    """The configuration that the arguments mean."""
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in ("format", "blocksize", "double_quant", "threshold")}
    skip: Sequence[str] = arguments.skip
    return QConfig(**settings, skip=(*DEFAULT_SKIP, *skip), rules=tuple(arguments.rule))


def _rule(text: str) -> QRule:
    pattern, equals, format = text.rpartition("=")
    if not equals or not pattern or format not in (*FORMATS, _KEEP):
        raise argparse.ArgumentTypeError(f"{text!r} is no PATTERN=FORMAT with a format of {', '.join((*FORMATS, _KEEP))}")
    try:
        return QRule.from_dict({"pattern": pattern, "format": None if format == _KEEP else format})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
