"""The machinery of ``nox -s mutants``: faults apply, are planted, and one that changes nothing survives."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mutants.faults import FAULTS, Fault
from mutants.run import StaleFaultError, backend_with, mutated_source, try_fault

SOURCES = Path(__file__).parent / "third_party" / "acme-q" / "src"


@pytest.fixture(autouse=True, scope="module")
def third_party_backend() -> Iterator[None]:
    """The backend importable from its sources; the session has its wheel."""
    sys.path.insert(0, str(SOURCES))
    yield
    sys.path.remove(str(SOURCES))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.op}: {fault.what}")
def test_fault_applies_and_compiles(fault: Fault) -> None:
    compile(mutated_source(fault), fault.module, "exec")


def test_there_are_enough_of_them_and_each_is_another() -> None:
    assert len(FAULTS) >= 25
    assert set(Counter((fault.module, fault.before, fault.after) for fault in FAULTS).values()) == {1}


def test_a_fault_is_caught_and_then_gone() -> None:
    fault = next(fault for fault in FAULTS if "tie" in fault.what)
    assert try_fault(fault, examples=2).caught_by == ("test_samples",)
    with backend_with(replace(fault, after=fault.before)) as name:
        assert name == "acme"
    assert not [name for name in sys.modules if name.endswith("__mutant")]


def test_what_is_no_fault_survives() -> None:
    harmless = Fault("quantize_blockwise", "quantize", "nothing", "np.float32(2)", "np.float32(2.0)")
    assert try_fault(harmless, examples=2).caught_by == ()


def test_a_fault_whose_text_is_gone_is_an_error() -> None:
    with pytest.raises(StaleFaultError, match="quantize_blockwise, gone: 'no such line' occurs 0 times in quantize"):
        try_fault(Fault("quantize_blockwise", "quantize", "gone", "no such line", ""))
