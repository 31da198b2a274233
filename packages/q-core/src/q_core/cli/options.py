"""Arguments that several subcommands take."""

from __future__ import annotations

import argparse


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="torch device type (default: %(default)s)")


def positive(text: str) -> int:
    """A number of things of which there is at least one."""
    number = int(text)  # argparse says what isn't one
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
