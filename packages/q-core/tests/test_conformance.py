"""The reference passes the suite that it is the oracle of: memory, determinism, gradients and torch's checks are not its own word."""

from __future__ import annotations

from q_core.testing.suite import *  # noqa: F403
from q_core.testing.suite import Capabilities

CAPABILITIES = Capabilities(backend="reference")
