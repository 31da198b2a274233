"""The surface's conformance suite on the native kernels."""

from __future__ import annotations

from q_core.testing.suite import *  # noqa: F403
from q_core.testing.suite import Capabilities

CAPABILITIES = Capabilities(backend="q_cpu")
