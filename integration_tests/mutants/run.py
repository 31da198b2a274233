"""Plants a fault in the backend's source and runs the conformance suite on the op that it is in."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

from mutants.faults import Fault
from q_core.backend import Backend
from q_core.testing import installed_backends
from q_core.testing.capabilities import Capabilities
from q_core.testing.report import conformance

PACKAGE = "acme_q"


class StaleFaultError(Exception):
    """The text that a fault changes is not there exactly once: the backend has changed, and the fault has to follow."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the suite said of a fault.

    Attributes:
        fault: the fault.
        caught_by: tests that failed; empty if it survived.
    """

    fault: Fault
    caught_by: tuple[str, ...]


def mutated_source(fault: Fault) -> str:
    """The module's source with the fault in it.

    Raises:
        StaleFaultError: the fault no longer applies.
    """
    source = inspect.getsource(importlib.import_module(f"{PACKAGE}.{fault.module}"))
    if source.count(fault.before) != 1:
        raise StaleFaultError(
            f"{fault.op}, {fault.what}: {fault.before!r} occurs {source.count(fault.before)} times in {fault.module}"
        )
    return source.replace(fault.before, fault.after)


@contextlib.contextmanager
def backend_with(fault: Fault) -> Iterator[str]:
    """Install the backend with the fault, in this process, while the context stands; its name."""
    original: Backend = importlib.import_module(f"{PACKAGE}.plugin").backend
    name = f"{PACKAGE}.{fault.module}__mutant"
    module = ModuleType(name)
    exec(compile(mutated_source(fault), name, "exec"), module.__dict__)
    sys.modules[name] = module
    try:
        families = tuple(name if family == f"{PACKAGE}.{fault.module}" else family for family in original.families)
        with installed_backends(replace(original, families=families)):
            yield original.name
    finally:
        del sys.modules[name]


def try_fault(fault: Fault, *, examples: int = 30) -> Outcome:
    """Run the suite on a backend with the fault, up to the first test that fails."""
    with backend_with(fault) as name:
        report = conformance(Capabilities(backend=name, examples=examples), ops=[fault.op], stop=True)
    if report.failures:  # the suite couldn't run, which is no proof of anything
        raise RuntimeError(f"{fault.op}, {fault.what}: {report.failures[0].message}")
    (result,) = report.ops
    return Outcome(fault, tuple(failure.test for failure in result.failures))
