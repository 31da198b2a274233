"""The only module that reads environment variables."""

from __future__ import annotations

import os


def api_key() -> str | None:
    """``Q_SERVE_API_KEY``: the API key, for those who don't want it in a command line, where every user of the machine can read it."""
    return os.environ.get("Q_SERVE_API_KEY")
