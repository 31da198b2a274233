"""q-serve: an LLM serving engine over the ops of q-core.

Importing this package imports neither torch nor the engine, so that ``q-serve --help`` answers at once.
"""

from __future__ import annotations

__version__ = "0.1.0"
