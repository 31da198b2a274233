"""Runs the conformance suite on a backend and tells the result op by op: what ``q-core conformance`` prints."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from q_core.specs import RECORDS, record_of
from q_core.testing.capabilities import Capabilities
from q_core.testing.target import implementations

State = Literal["pass", "declined", "failed"]

SETTINGS = "[pytest]\naddopts =\n"


@dataclass(frozen=True, slots=True)
class Failure:
    """A test that failed: its name and what it said."""

    test: str
    message: str


@dataclass(frozen=True, slots=True)
class OpResult:
    """How an op fared.

    Attributes:
        op: its name.
        state: "failed" if any test failed; "declined" if every call was declined; else "pass".
        passed: number of tests that passed.
        declined: why calls were declined, in the backend's words.
        failures: tests that failed.
        known: tests that failed as ``Capabilities.known_failures`` says, with the reason that is given there.
    """

    op: str
    state: State
    passed: int
    declined: tuple[str, ...]
    failures: tuple[Failure, ...]
    known: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A backend's conformance.

    Attributes:
        backend: its name.
        device: torch device of the calls.
        ops: results of the ops that it implements.
        absent: ops that it doesn't implement.
        failures: failures of tests that are about no op.
    """

    backend: str
    device: str
    ops: tuple[OpResult, ...]
    absent: tuple[str, ...]
    failures: tuple[Failure, ...]

    @property
    def failed(self) -> bool:
        return bool(self.failures) or any(result.failures for result in self.ops) or not self.ops

    def __str__(self) -> str:
        width = max([len(result.op) for result in self.ops], default=0)
        lines = [f"{self.backend} on {self.device}"]
        for result in self.ops:
            declined = f"; declined: {'; '.join(result.declined)}" if result.declined else ""
            lines.append(f"  {result.op:<{width}}  {result.state:<8}  {result.passed} tests passed{declined}")
            lines += [f"  {'':<{width}}    {failure.test}: {failure.message}" for failure in result.failures]
            lines += [f"  {'':<{width}}    {failure.test}: known to fail: {failure.message}" for failure in result.known]
        lines += [f"  {failure.test}: {failure.message}" for failure in self.failures]
        if self.absent:
            lines.append(f"not implemented, the next backend serves: {', '.join(self.absent)}")
        verdicts = [result.state for result in self.ops]
        lines.append(", ".join(f"{verdicts.count(state)} {word}" for state, word in _VERDICTS))
        return "\n".join(lines)


_VERDICTS: tuple[tuple[State, str], ...] = (("pass", "passed"), ("declined", "declined"), ("failed", "failed"))


class _Collector:
    """A pytest plugin that keeps what was said of each op."""

    def __init__(self, ops: Collection[str]) -> None:
        self._ops = ops
        self.passed: dict[str | None, int] = {}
        self.declined: dict[str | None, dict[str, None]] = {}
        self.failures: dict[str | None, list[Failure]] = {}
        self.known: dict[str | None, list[Failure]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if not hasattr(item, "callspec") or item.callspec.params["op"] in self._ops]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, rest = report.nodeid.rpartition("::")[2].partition("[")
        op = rest.removesuffix("]") or None
        for key, value in report.user_properties if report.when == "teardown" else ():
            if key == "declined" and isinstance(value, list):
                self.declined.setdefault(op, {}).update(dict.fromkeys(map(str, value)))
        if report.failed:
            self.failures.setdefault(op, []).append(Failure(test, _message(report.longrepr)))
        elif report.skipped and hasattr(report, "wasxfail"):
            self.known.setdefault(op, []).append(Failure(test, report.wasxfail))
        elif report.passed and report.when == "call":
            self.passed[op] = self.passed.get(op, 0) + 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.setdefault(None, []).append(Failure("collection", str(report.longrepr)))


def _message(longrepr: Any) -> str:
    """The first line of what was raised, without the traceback."""
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(longrepr)
    return str(text).removeprefix("AssertionError: ").split("\n", 1)[0]


def conformance(capabilities: Capabilities, *, ops: Sequence[str] | None = None, stop: bool = False) -> Report:
    """Run the suite as a vendor's test file would.

    Args:
        capabilities: the backend and what is known of it.
        ops: only these of its ops.
        stop: at the first failure.

    Raises:
        ValueError: the backend is not available, or doesn't implement one of ``ops``.
    """
    implemented = list(implementations(capabilities))
    for op in ops or ():
        if record_of(op).name not in implemented:
            raise ValueError(f"{capabilities.backend} doesn't implement {op}, expected of: {', '.join(implemented) or 'nothing'}.")
    chosen = [op for op in implemented if ops is None or op in ops]
    collector = _Collector(chosen)
    with _test_file(capabilities) as file:
        arguments = [str(file), "-q", "-c", str(file.parent / "pytest.ini"), "--import-mode=importlib", "-p", "no:cacheprovider"]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = pytest.main([*arguments, *(["--maxfail=1"] if stop else [])], plugins=[collector])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        collector.failures.setdefault(None, []).append(Failure("pytest", output.getvalue()))
    return Report(
        backend=capabilities.backend,
        device=capabilities.device,
        ops=tuple(_result(op, collector) for op in chosen),
        absent=tuple(op for op in RECORDS if op not in implemented),
        failures=tuple(collector.failures.get(None, ())),
    )


def _result(op: str, collector: _Collector) -> OpResult:
    failures = tuple(collector.failures.get(op, ()))
    declined = tuple(collector.declined.get(op, ()))
    served = collector.passed.get(op, 0)
    agreed = op not in collector.declined or served > len(_WITHOUT_CALLS)
    state: State = "failed" if failures else "pass" if agreed else "declined"
    return OpResult(op, state, served, declined, failures, tuple(collector.known.get(op, ())))


_WITHOUT_CALLS = ("test_bad_arguments", "test_predicate_answers_without_values")
"""Tests that pass even where every call is declined."""


@contextlib.contextmanager
def _test_file(capabilities: Capabilities) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pytest.ini").write_text(SETTINGS)
        # Another name each time: pytest would take a module that it imported before for this one.
        file = Path(folder) / f"test_conformance_{uuid.uuid4().hex}.py"
        file.write_text(f"from q_core.testing.suite import *\n\nCAPABILITIES = {capabilities!r}\n")
        try:
            yield file
        finally:
            sys.modules.pop(file.stem, None)
