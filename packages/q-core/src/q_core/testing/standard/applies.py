"""Standard tests that are about some ops only."""

from __future__ import annotations

from collections.abc import Callable

from q_core.backend import Backend
from q_core.record import OpRecord

Test = Callable[..., None]


def only_ops(condition: Callable[[OpRecord], bool]) -> Callable[[Test], Test]:
    """Run a test for some ops only, by their records."""

    def mark(test: Test) -> Test:
        test.applies = condition  # type: ignore[attr-defined]
        return test

    return mark


def only_where(condition: Callable[[OpRecord, Backend], bool]) -> Callable[[Test], Test]:
    """Run a test for some ops of some backends only."""

    def mark(test: Test) -> Test:
        test.concerns = condition  # type: ignore[attr-defined]
        return test

    return mark


def applies(test: Test, record: OpRecord, backend: Backend | None = None) -> bool:
    """Whether a test is about an op, of a backend or, with ``None``, of any."""
    condition: Callable[[OpRecord], bool] = getattr(test, "applies", lambda _: True)
    concerns: Callable[[OpRecord, Backend], bool] = getattr(test, "concerns", lambda *_: True)
    return condition(record) and (backend is None or concerns(record, backend))
