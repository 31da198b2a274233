"""The ``q-core`` command: one module a subcommand.

A subcommand's module has ``HELP``, a line; ``configure(parser)``, which adds its arguments; and ``run(arguments)``, which returns the exit
code. The modules are imported for help too, so what needs torch is imported inside ``run``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from q_core import __version__

COMMANDS = ("doctor", "ops", "explain", "conformance", "bench", "new-backend")
"""Subcommands in the order of the help; ``new-backend`` is the module ``new_backend``."""


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    command = argparse.ArgumentParser(prog="q-core", description="Look at the op surface and its backends, test and measure them.")
    command.add_argument("--version", action="version", version=f"q-core {__version__}")
    subcommands = command.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"q_core.cli.{name.replace('-', '_')}")
        subcommand = subcommands.add_parser(name, help=module.HELP, description=module.HELP)
        module.configure(subcommand)
        subcommand.set_defaults(run=module.run)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 where it found something wrong, 2 for arguments that mean nothing."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `q-core ops | head` has read enough; what is left would fail again when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"q-core: {error}", file=sys.stderr)
        return 2
    return code
