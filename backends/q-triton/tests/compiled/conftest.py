"""These tests need Triton's compiler: without it, or where kernels are interpreted, none of them is collected."""

from __future__ import annotations

import pytest

from q_triton import availability
from q_triton.environment import interpreted

MISSING = "kernels are interpreted" if interpreted() else "" if (found := availability()) else found.reason
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.write_line(f"q-triton/tests/compiled: not collected, {MISSING}: nox -s kernels-aot")
