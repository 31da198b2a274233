"""``python -m q_nn.cli``."""

from __future__ import annotations

from q_nn.cli import main

raise SystemExit(main())
