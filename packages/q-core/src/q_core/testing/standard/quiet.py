"""Torch's own warnings, which are no fault of a backend whose tests run with ``-W error``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def without_torchs_warnings() -> Iterator[None]:
    """Ignore what torch deprecates of itself, and that ``vmap`` of an operator is a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield
