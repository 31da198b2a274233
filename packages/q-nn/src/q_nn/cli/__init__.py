"""The ``q-nn`` command: one module a subcommand.

A subcommand's module has ``HELP``, a line; ``configure(parser)``, which adds its arguments; and ``run(arguments)``, which returns the exit
code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import q_nn
from q_nn.cli import estimate, quantize

COMMANDS: dict[str, ModuleType] = {"quantize": quantize, "estimate": estimate}


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    command = argparse.ArgumentParser(prog="q-nn", description="Quantize models on disk, and say beforehand what memory they take.")
    command.add_argument("--version", action="version", version=f"q-nn {q_nn.__version__}")
    subcommands = command.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        subcommand = subcommands.add_parser(name, help=module.HELP, description=module.HELP)
        module.configure(subcommand)
        subcommand.set_defaults(run=module.run)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 for arguments and files that mean nothing."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `q-nn estimate … | head` has read enough; what is left would fail again when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"q-nn: {error}", file=sys.stderr)
        return 2
    return code
