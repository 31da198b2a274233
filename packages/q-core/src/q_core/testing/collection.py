"""A plugin of pytest that the suite loads: a standard test that is about none of a backend's ops is not collected, rather than skipped."""

from __future__ import annotations

import pytest

from q_core.testing.suite import STANDARD, ops_of


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> list[pytest.Item] | None:
    """No items for such a test; any other is left to pytest."""
    test = STANDARD.get(name)
    if test is None or obj is not test or not isinstance(collector, pytest.Module):
        return None
    return None if ops_of(test, collector.obj) else []
