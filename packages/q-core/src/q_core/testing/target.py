"""The implementation of one op under test, reached the way users reach it: through q-core's dispatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from q_core.chain import decline_reason
from q_core.dispatch import bound, use_backends
from q_core.record import Arguments, OpRecord
from q_core.registry import Implementation, registry
from q_core.specs import RECORDS, record_of
from q_core.testing.agreement import Outputs, compare, copy_call, expected_outputs, map_call, run, tensors_of
from q_core.testing.calls import Call, calls, sample_calls
from q_core.testing.capabilities import Capabilities


def implementations(capabilities: Capabilities) -> dict[str, Implementation]:
    """What the backend implements, by op, in the surface's order.

    Raises:
        ValueError: the backend is not installed or not available; the message says why.
    """
    registry().check_names([capabilities.backend])
    (loaded,) = (loaded for loaded in registry().backends if loaded.name == capabilities.backend)
    return {op: loaded.implementations[op] for op in RECORDS if op in loaded.implementations}


@contextmanager
def chosen(capabilities: Capabilities) -> Iterator[None]:
    """Let the backend serve, and the reference what the backend declines or hasn't: a gradient may need another op."""
    with use_backends(*{capabilities.backend, "reference"}):
        yield


@dataclass(slots=True)
class Target:
    """One op of the backend under test.

    Attributes:
        record: the op's record.
        implementation: the backend's function.
        capabilities: what the vendor declares.
        declined: reasons why calls were declined, counted.
        served: calls that were not.
    """

    record: OpRecord
    implementation: Implementation
    capabilities: Capabilities
    declined: Counter[str] = field(default_factory=Counter)
    served: int = 0

    @property
    def function(self) -> Callable[..., Any]:
        """The torch op, which leads to the backend."""
        return bound(self.record.name)

    def serves(self, call: Mapping[str, Any]) -> bool:
        """Whether the backend accepts a call; a declined one is counted with its reason."""
        reason = decline_reason(self.implementation, self.record, call)
        if reason is None:
            self.served += 1
        else:
            self.declined[reason] += 1
        return reason is None

    def run(self, call: Arguments) -> Outputs:
        """The op's outputs on this very call; arguments that it mutates are mutated."""
        return run(self.record, self.function, call)

    def disagreements(self, call: Call) -> list[str]:
        """What the backend's result of a copy of the call has that the reference's hasn't."""
        on_cpu = map_call(lambda tensor: tensor.cpu(), copy_call(call))
        expected, bounds = expected_outputs(self.record, on_cpu)
        got = map_call(lambda tensor: tensor.cpu(), self.run(copy_call(call)))
        messages = ((name, compare(value, expected[name], bounds[name])) for name, value in got.items())
        return [f"{self.record.name}{call!r}: {name} {message}" for name, message in messages if message]

    def for_all(self, body: Callable[[Call], None], strategy: st.SearchStrategy[Call] | None = None) -> None:
        """Run a test body on drawn calls that the backend serves; the same calls every time."""
        drawn = calls(self.record, self.capabilities.device) if strategy is None else strategy

        @hypothesis.settings(
            max_examples=self.capabilities.examples,
            derandomize=True,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(call=drawn)
        def check(call: Call) -> None:
            if not self.serves(call):
                hypothesis.reject()  # another one is drawn in its place
            body(call)

        try:
            check()
        except hypothesis.errors.Unsatisfiable:
            assert self.declined, f"{self.record.name}: no call could be drawn"

    def for_each(self, body: Callable[[Call], None], given: list[Call]) -> None:
        """Run a test body on given calls that the backend serves."""
        for call in given:
            if self.serves(call):
                body(call)

    def first_served(self) -> list[Call]:
        """One call that the backend serves, if there is one: for what takes long, where other tests see to other shapes and dtypes."""
        samples = sample_calls(self.record, torch.float32, self.capabilities.device)
        return next(([call] for call in samples if self.serves(call)), [])

    def finish(self) -> None:
        """Skip a test whose every call was declined: then it has shown nothing."""
        if not self.served and self.declined:
            pytest.skip(f"declined: {'; '.join(self.reasons())}")

    def reasons(self) -> list[str]:
        """Why calls were declined, the most frequent first."""
        return [reason for reason, _ in self.declined.most_common()]


def target_of(capabilities: Capabilities, op: str) -> Target:
    return Target(record_of(op), implementations(capabilities)[op], capabilities)


def fill_freed_memory(outputs: Outputs) -> None:
    """Leave garbage where the next outputs will lie, so that an element which nobody writes is seen."""
    for tensor in tensors_of(list(outputs.values())):
        torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device).view(torch.uint8).fill_(1)
