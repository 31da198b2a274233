"""The conformance suite: what each op of a backend has to hold, as pytest tests.

A vendor's whole test file::

    from q_core.testing.suite import *

    CAPABILITIES = Capabilities(backend="acme")

Every test is run for every op that the backend implements, on calls of the op's record: odd and zero sizes, partial blocks, any layout.
A test may not be overridden, removed or skipped; what isn't right yet is named in ``Capabilities.known_failures``.
Extra: ``q-core[testing]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from q_core.specs import RECORDS
from q_core.testing.capabilities import Capabilities
from q_core.testing.standard import applies, arguments, composition, gradients, layouts, memory, repetition, values
from q_core.testing.target import Target, chosen, implementations, target_of

pytest_plugins = ["q_core.testing.collection"]

STANDARD: dict[str, Callable[..., None]] = {
    name: test
    for module in (values, memory, repetition, arguments, composition, gradients, layouts)
    for name, test in vars(module).items()
    if name.startswith("test_")
}
"""The standard tests of an op, by name."""

globals().update(STANDARD)


def _capabilities(module: ModuleType) -> Capabilities:
    declared = getattr(module, "CAPABILITIES", None)
    if not isinstance(declared, Capabilities):
        raise pytest.UsageError(f'{module.__name__}: CAPABILITIES is missing; write CAPABILITIES = Capabilities(backend="…").')
    return declared


def ops_of(test: Callable[..., None], module: ModuleType) -> list[str]:
    """The ops that a standard test of a vendor's module is run for."""
    try:
        implemented = implementations(_capabilities(module))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    return [op for op, implementation in implemented.items() if applies.applies(test, RECORDS[op], implementation.backend)]


EXCUSES = ("skip", "skipif", "xfail")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.function.__name__
    if name not in __all__:
        return
    for mark in metafunc.definition.iter_markers():
        if mark.name in EXCUSES:
            raise pytest.UsageError(
                f"{metafunc.module.__name__}: {name} is marked {mark.name}; a backend declines calls by its predicate, and what "
                "isn't right yet is named in Capabilities.known_failures."
            )
    if "op" in metafunc.fixturenames:
        known = _capabilities(metafunc.module).known_failures
        marks = {op: known.get(f"{name}[{op}]") for op in ops_of(metafunc.function, metafunc.module)}
        metafunc.parametrize(
            "op", [pytest.param(op, marks=[pytest.mark.xfail(reason=why, strict=True)] if why else []) for op, why in marks.items()]
        )


@pytest.fixture
def target(op: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Target]:
    """The op of the backend under test, chosen to serve."""
    capabilities = _capabilities(request.module)
    with chosen(capabilities):
        made = target_of(capabilities, op)
        yield made
    if made.declined:
        record_property("declined", made.reasons())


def test_promised_ops_are_implemented(request: pytest.FixtureRequest) -> None:
    """The backend implements what ``Capabilities.ops`` promises, and something at all.

    Mend: is the function marked with ``@impl``, in a module of ``Backend.families``, and named as the op?
    """
    capabilities = _capabilities(request.module)
    implemented = set(implementations(capabilities))
    assert implemented, f"{capabilities.backend} implements no op"
    if capabilities.ops is not None:
        lost, unnamed = sorted(set(capabilities.ops) - implemented), sorted(implemented - set(capabilities.ops))
        assert not lost, f"{capabilities.backend} doesn't implement {', '.join(lost)}, which Capabilities.ops promises"
        assert not unnamed, f"{capabilities.backend} implements {', '.join(unnamed)}, which Capabilities.ops doesn't name: add it"


def test_no_standard_test_is_overridden(request: pytest.FixtureRequest) -> None:
    """The module has every standard test, as it is here, and names no known failure that isn't one of them.

    Mend: take the override away; name what fails, with its reason, in ``Capabilities.known_failures``.
    """
    for name in __all__:
        if name.startswith(("test_", "pytest_")) or name == "target":
            assert getattr(request.module, name, None) is getattr(_THIS, name), f"{name} is overridden or removed"
    known = _capabilities(request.module).known_failures
    standard = {f"{name}[{op}]" for name, test in STANDARD.items() for op in RECORDS if applies.applies(test, RECORDS[op])}
    unknown = set(known) - standard
    assert not unknown, f"known_failures names {sorted(unknown)}, expected «test[op]», such as 'test_agreement[gemm_4bit]'"


_THIS = sys.modules[__name__]

__all__ = ["Capabilities", "pytest_generate_tests", "pytest_plugins", "target"]
__all__ += [name for name in list(globals()) if name.startswith("test_")]
