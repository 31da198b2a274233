"""Every op on tensors that end, or begin, at a page that no one may read or write: the interpreter alone would read past an end.

The calls are the samples of the ops' records: odd, zero and partial sizes. What the host functions allocate is laid so, too. An overrun
ends the process; a worker of pytest-xdist that ends so fails its test.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from q_core.testing.calls import sample_calls
from q_core.testing.capabilities import Capabilities
from q_core.testing.guard_pages import Guarded, run_guarded
from q_core.testing.target import chosen, implementations, target_of
from q_triton.environment import interpreted_target
from q_triton.targets import target_named

CAPABILITIES = Capabilities(backend=f"q_{target_named(interpreted_target() or '').platform}")
ALLOCATIONS = ("empty", "empty_like", "zeros", "zeros_like", "full")
PLACERS = {"end": Guarded(at_end=True), "begin": Guarded(at_end=False)}
"""For as long as the process lives: what a host function allocates it may keep."""


@pytest.fixture(params=PLACERS)
def guarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """Lays what is given to it, and what torch allocates."""
    placer = PLACERS[request.param]

    def laid(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*arguments: Any, **options: Any) -> Tensor:
            tensor = allocate(*arguments, **options)
            return placer.place(tensor) if tensor.device.type == "cpu" else tensor

        return allocated

    for name in ALLOCATIONS:
        monkeypatch.setattr(torch, name, laid(getattr(torch, name)))
    return placer


@pytest.fixture(autouse=True)
def _this_package_serves() -> Iterator[None]:
    with chosen(CAPABILITIES):
        yield


@pytest.mark.parametrize("op", implementations(CAPABILITIES))
def test_no_op_touches_what_lies_beyond_its_tensors(op: str, guarded: Guarded) -> None:
    target = target_of(CAPABILITIES, op)
    target.for_each(lambda call: run_guarded(target, call, guarded), sample_calls(target.record, torch.bfloat16))
    assert target.served, target.reasons()


@pytest.mark.parametrize(("statement", "passed"), [("tl.load(x + 7)", []), ("tl.store(x - 1, 1.0)", ["at the end"])])
def test_one_element_beyond_ends_the_process(statement: str, passed: list[str], tmp_path: Path) -> None:
    script = tmp_path / "overrun.py"
    script.write_text(OVERRUN.replace("STATEMENT", statement))
    ended = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGSEGV, ended.stderr
    assert ended.stdout.splitlines() == passed


OVERRUN = """
import torch, triton, triton.language as tl
from q_core.testing.guard_pages import Guarded

@triton.jit
def kernel(x):
    STATEMENT

for at_end in (True, False):
    guarded = Guarded(at_end=at_end)
    kernel[(1,)](guarded.place(torch.zeros(7)))
    print("at the end" if at_end else "at the beginning", flush=True)
"""
