"""The surface's conformance suite on every op of this package, through the backend of the target that is interpreted for.

The kernels are the same for each target; its tiles are its own. So one target gets all examples, and the others some.
"""

from __future__ import annotations

from q_core.testing.suite import *  # noqa: F403
from q_core.testing.suite import Capabilities
from q_triton.environment import interpreted_target
from q_triton.implementations import implementations
from q_triton.targets import target_named

TARGET = target_named(interpreted_target() or "")

CAPABILITIES = Capabilities(
    backend=f"q_{TARGET.platform}", ops=tuple(implementations()), examples=10 if TARGET.name == "sm_90" else 3
)
