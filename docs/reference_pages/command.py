"""The page of the ``q-core`` command, from its own help."""

from __future__ import annotations

import contextlib
import io
import os
import re

from q_core.cli import main

_COMMAND = re.compile(r"^    ([a-z][a-z-]+)(?: |$)", re.MULTILINE)
_WIDTH = "96"


def help_of(*command: str) -> str:
    """What ``q-core COMMAND --help`` prints."""
    said = io.StringIO()
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ.update(COLUMNS=_WIDTH, NO_COLOR="1")  # argparse asks for them
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return said.getvalue().rstrip()


def commands() -> list[str]:
    """The subcommands, in the order of the help."""
    return _COMMAND.findall(help_of())


def page() -> str:
    """The page."""
    parts = ["# The q-core command", f"```text\n{help_of()}\n```"]
    for name in commands():
        parts += [f"## {name}", f"```text\n{help_of(name)}\n```"]
    return "\n\n".join(parts) + "\n"
