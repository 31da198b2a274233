"""What a vendor declares to the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The backend under test, and what is known not to hold of it.

    What a backend *can't* do is not declared here but beside the code, by the ``accepts`` predicate of an implementation: a call that it
    declines is not tested, and the reason is reported. An op that it doesn't implement is not tested at all.

    Attributes:
        backend: name of the backend, as ``q-core doctor`` prints it.
        device: torch device on which the calls are made, such as "npu:0".
        ops: ops that the backend promises to implement, so that one which got lost by accident is a failure; ``None`` promises nothing
            and tests whatever is implemented.
        known_failures: reasons by "test[op]" (``{"test_gradients[gemm_4bit]": "…"}``), where conformance isn't reached yet. Such a test is
            a strict xfail: it fails once it passes, so that the list can't grow stale.
        examples: calls that hypothesis makes for an op and a test.
    """

    backend: str
    device: str = "cpu"
    ops: tuple[str, ...] | None = None
    known_failures: Mapping[str, str] = field(default_factory=dict)
    examples: int = 30

    def __post_init__(self) -> None:
        for test, reason in self.known_failures.items():
            if not reason.strip():
                raise ValueError(
                    f"Capabilities: known_failures[{test!r}] is empty, expected the reason why the test can't pass yet."
                )
