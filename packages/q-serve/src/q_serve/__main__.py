"""``python -m q_serve`` is ``q-serve``."""

from __future__ import annotations

import sys

from q_serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
