"""Every op on arguments that end, or begin, at a page that no one may read or write; an overrun ends the process.

The calls are the conformance suite's: odd, zero and partial sizes, every dtype, any layout. What test_overrun.py does for each length of
some kernels, this does for all ops, whatever q_cpu comes to serve.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from q_core.testing.capabilities import Capabilities
from q_core.testing.guard_pages import Guarded, run_guarded
from q_core.testing.target import chosen, implementations, target_of

pytestmark = pytest.mark.usefixtures("isa")

CAPABILITIES = Capabilities(backend="q_cpu", examples=40)


@pytest.fixture(autouse=True)
def _q_cpu_serves() -> Iterator[None]:
    with chosen(CAPABILITIES):
        yield


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("op", implementations(CAPABILITIES))
def test_no_op_touches_what_lies_beyond_its_arguments(op: str, at_end: bool) -> None:
    target = target_of(CAPABILITIES, op)
    target.for_all(lambda call: run_guarded(target, call, Guarded(at_end=at_end)))
    assert target.served, target.reasons()
