"""Every op that acme implements, against the reference: the conformance suite of q-core."""

from q_core.testing.suite import *  # noqa: F403  (its tests become this module's)
from q_core.testing.suite import Capabilities

CAPABILITIES = Capabilities(backend="acme", ops=("quantize_blockwise", "gemm_4bit", "paged_attention"))
