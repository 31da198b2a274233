"""Errors that the command line turns into one line and exit code 2."""

from __future__ import annotations


class ModelError(ValueError):
    """A directory can't be served: it is no model, or one that needs what this engine doesn't do. The message says what and why."""
