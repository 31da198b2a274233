"""Discovery, order, capability, fallback: with backends made up for the test."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import q_core
from q_core import Availability, Backend, BackendConflictError, BackendError, NoBackendError, impl, ops, use_backends
from q_core.reference import norm as reference_norm
from q_core.testing import family_module, installed_backends

X = torch.randn(3, 8)
W = torch.randn(8)


def says(name: str, *, accepts: Callable[..., str | None] | None = None) -> Callable[..., Any]:
    """An rms_norm that can be told by its result: all values are the name's length."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.full_like(x, len(name))

    return impl(accepts=accepts)(rms_norm)


class Kit:
    """Makes backends whose family modules last as long as the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._count = 0

    def backend(self, name: str, *functions: Callable[..., Any], **settings: Any) -> Backend:
        self._count += 1
        families = (self._stack.enter_context(family_module(f"made_up_family_{self._count}", *functions)),) if functions else ()
        defaults: dict[str, Any] = {
            "device_types": ("cpu",),
            "surface_version": 1,
            "priority": 100,
            "probe": lambda: Availability(True, "made up"),
            "families": families,
        }
        return Backend(name=name, **(defaults | settings))


@pytest.fixture
def kit() -> Iterator[Kit]:
    with ExitStack() as stack:
        yield Kit(stack)


def result() -> float:
    """Which backend served, by the length of its name."""
    return float(ops.rms_norm(X, W)[0, 0])


def expect_reference() -> None:
    torch.testing.assert_close(ops.rms_norm(X, W), reference_norm.rms_norm(X, W, 1e-6))


def test_the_highest_priority_serves(kit: Kit) -> None:
    low, high = kit.backend("low", says("low"), priority=1), kit.backend("higher", says("higher"), priority=2)
    for order in ((low, high), (high, low)):
        with installed_backends(*order):
            assert result() == len("higher")
    expect_reference()


def test_a_predicate_declines_and_the_next_serves(kit: Kit) -> None:
    picky = kit.backend("picky", says("picky", accepts=lambda eps: None if eps > 1e-6 else "eps is too small"), priority=2)
    with installed_backends(picky, kit.backend("low", says("low"), priority=1)):
        assert result() == len("low")
        assert float(ops.rms_norm(X, W, eps=1e-3)[0, 0]) == len("picky")


def test_the_reference_serves_last_and_says_so_once_an_op(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    picky = kit.backend("picky", says("picky", accepts=lambda x: None if x.dim() == 9 else "only nine axes"))
    with caplog.at_level(logging.WARNING, "q"), installed_backends(picky):
        expect_reference()
        expect_reference()
        ops.silu_and_mul(X)
    assert [r.getMessage() for r in caplog.records] == [
        "rms_norm on cpu: no backend serves this call (picky: only nine axes); the reference serves it, slowly.",
        "silu_and_mul on cpu: no backend serves this call (none is installed for it); the reference serves it, slowly.",
    ]


def test_fallback_can_be_refused(kit: Kit) -> None:
    picky = kit.backend("picky", says("picky", accepts=lambda x: None if x.dim() == 9 else "only nine axes"))
    with installed_backends(picky, fallback="error"):
        with pytest.raises(NoBackendError, match=r"rms_norm on cpu: .*picky: only nine axes.*Q_FALLBACK=error"):
            ops.rms_norm(X, W)
        assert ops.rms_norm(X.view(3, *[1] * 7, 8), W).shape[-1] == 8


def test_nobody_serves(kit: Kit) -> None:
    picky = kit.backend("picky", says("picky", accepts=lambda x: "never"))
    with installed_backends(picky, reference=False):
        with pytest.raises(NoBackendError, match=r"rms_norm on cpu: no backend serves this call \(picky: never\)"):
            ops.rms_norm(X, W)
        with pytest.raises(NoBackendError, match=r"silu_and_mul on cpu: .*none is installed"):
            ops.silu_and_mul(X)


def test_equal_priorities_are_an_error_that_names_both(kit: Kit) -> None:
    one, two = kit.backend("one", says("one")), kit.backend("two", says("two"))
    with installed_backends(one, two):
        with pytest.raises(BackendConflictError, match=r"rms_norm on cpu: backends 'one' and 'two' both have priority 100"):
            ops.rms_norm(X, W)
        with use_backends("one"):
            assert result() == len("one")
        ops.silu_and_mul(X)
    with installed_backends(one, two, selected=("two",)):
        assert result() == len("two")


def test_backends_of_other_devices_are_not_asked(kit: Kit) -> None:
    with installed_backends(kit.backend("gpu", says("gpu"), device_types=("cuda",))):
        expect_reference()
        explanation = q_core.explain("rms_norm")
        assert explanation.served_by == "reference"
        assert "gpu: declines: it serves cuda, not cpu" in str(explanation)
        assert q_core.explain("rms_norm", device="cuda").served_by == "gpu"


def test_a_backend_may_leave_out_an_argument_that_has_a_neutral_value(kit: Kit) -> None:
    @impl
    def rotary_embedding(q_THD: Tensor, k_TGD: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q_THD), torch.zeros_like(k_TGD)

    q, k, table = torch.ones(2, 1, 4), torch.ones(2, 1, 4), torch.ones(3, 2)
    with installed_backends(kit.backend("older", rotary_embedding)):
        assert ops.rotary_embedding(q, k, torch.tensor([0, 1]), table, table)[0].sum() == 0
        assert ops.rotary_embedding(q, k, torch.tensor([0, 1]), table, table, interleaved=True)[0].sum() != 0
        reason = q_core.explain("rotary_embedding", interleaved=True).verdicts[0].reason
        assert reason == "it doesn't know the argument interleaved"


def test_arguments_may_come_in_any_order(kit: Kit) -> None:
    @impl
    def rms_norm(eps: float, weight: Tensor, x: Tensor) -> Tensor:
        return x * 0 + eps

    with installed_backends(kit.backend("other_order", rms_norm)):
        assert float(ops.rms_norm(X, W, eps=0.5)[0, 0]) == 0.5


def _not_an_op(x: Tensor) -> Tensor:
    return x


def refused() -> list[tuple[str, Callable[..., Any], str]]:
    def rms_norm_default(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        return x

    def rms_norm_stars(*x: Any) -> Any:
        return x

    def rms_norm_keyword(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        return x

    def rms_norm_misspelled(x: Tensor, wieght: Tensor, eps: float) -> Tensor:
        return x

    def rms_norm_short(x: Tensor, eps: float) -> Tensor:
        return x

    functions = {
        "must be a plain name: no default": rms_norm_default,
        r"parameter \*x.* must be a plain name": rms_norm_stars,
        "not keyword-only": rms_norm_keyword,
        "'wieght' is not an argument of the op": rms_norm_misspelled,
        "leaves out 'weight', which has no neutral value": rms_norm_short,
    }
    for function in functions.values():
        function.__name__ = "rms_norm"
    _not_an_op.__name__ = "rms_nrom"
    return [(message, impl(f), message) for message, f in functions.items()] + [
        ("rms_nrom is not an op of the surface", impl(_not_an_op), "rms_nrom is not an op of the surface"),
        ("its predicate asks for 'epsilon'", says("x", accepts=lambda epsilon: None), "predicate asks for 'epsilon'"),
    ]


@pytest.mark.parametrize(("message", "function"), [(m, f) for _, f, m in refused()])
def test_what_breaks_the_contract_is_refused_with_names(kit: Kit, message: str, function: Callable[..., Any]) -> None:
    with installed_backends(kit.backend("acme", function)) as registry:
        loaded = registry.backends[-1]
        assert loaded.state == "refused" and loaded.traceback
        assert re.search(message, loaded.reason), loaded.reason
        assert loaded.reason.startswith("acme: ")
        expect_reference()


def test_a_function_named_as_an_op_and_not_marked_is_refused(kit: Kit) -> None:
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x

    with installed_backends(kit.backend("acme", rms_norm)) as registry:
        assert registry.backends[-1].state == "refused"
        assert re.search(r"\.rms_norm has the name of an op; mark it with @impl, or rename it", registry.backends[-1].reason)


def test_wrappers_are_refused(kit: Kit) -> None:
    import pluggy

    @pluggy.HookimplMarker("q")(wrapper=True)
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Any:
        return (yield)

    with installed_backends(kit.backend("acme", rms_norm)) as registry:
        assert registry.backends[-1].state == "refused"
        assert "wrappers are not part of the contract" in registry.backends[-1].reason


def test_a_broken_backend_is_kept_with_its_traceback_and_breaks_no_other(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    def explode() -> object:
        raise OSError("libacme.so: cannot open shared object file")

    def bad_probe() -> Availability:
        raise ZeroDivisionError("in the probe")

    good = kit.backend("good", says("good"))
    with caplog.at_level(logging.WARNING, "q"):
        context = installed_backends(
            explode, kit.backend("probing", probe=bad_probe), kit.backend("missing", families=("no.such.module",)), good
        )
        with context as registry:
            assert result() == len("good")
            by_name = {loaded.name: loaded for loaded in registry.backends}
    assert [by_name[n].state for n in ("entry_0", "probing", "missing", "good")] == ["failed", "failed", "failed", "available"]
    assert "libacme.so" in by_name["entry_0"].reason and "explode" in (by_name["entry_0"].traceback or "")
    assert len(caplog.records) == 3


def test_what_is_not_a_backend_or_a_second_of_its_name_is_refused(kit: Kit) -> None:
    with installed_backends(lambda: "text", kit.backend("twin"), kit.backend("twin")) as registry:
        states = [(loaded.name, loaded.state) for loaded in registry.backends[1:]]
    assert states == [("entry_0", "refused"), ("twin", "available"), ("twin", "refused")]


def test_a_newer_surface_is_refused_and_an_unavailable_one_says_why(kit: Kit) -> None:
    newer = kit.backend("newer", says("newer"), surface_version=2)
    absent = kit.backend("absent", says("absent"), probe=lambda: Availability(False, "no device"))
    with installed_backends(newer, absent) as registry:
        assert registry.backends[1].state == "refused" and "written for surface version 2" in registry.backends[1].reason
        assert registry.backends[2].state == "unavailable" and registry.backends[2].reason == "no device"
        expect_reference()
        assert "absent: declines: unavailable: no device" in str(q_core.explain("rms_norm"))


def test_an_exception_of_an_implementation_reaches_the_caller(kit: Kit) -> None:
    @impl
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise MemoryError("no room")

    with installed_backends(kit.backend("acme", rms_norm)), pytest.raises(MemoryError, match="no room"):
        ops.rms_norm(X, W)


def test_a_backend_description_is_validated() -> None:
    make = functools.partial(Backend, device_types=("cpu",), surface_version=1, probe=lambda: Availability(True, ""))
    with pytest.raises(BackendError, match="not a Python identifier"):
        make(name="q-acme", priority=1)
    with pytest.raises(BackendError, match="has priority -1; backends have 0 or more"):
        make(name="acme", priority=-1)


def test_use_backends_refuses_names_that_cannot_serve(kit: Kit) -> None:
    with installed_backends(kit.backend("absent", probe=lambda: Availability(False, "no device"))):
        with pytest.raises(ValueError, match="backend 'absent' is unavailable: no device"), use_backends("absent"):
            pass
        with (
            pytest.raises(ValueError, match="backend 'nope' is not installed, expected one of: absent, reference"),
            use_backends("nope"),
        ):
            pass
        with pytest.raises(ValueError, match="no names given"), use_backends():
            pass
        expect_reference()


def test_use_backends_around_compiled_code(kit: Kit) -> None:
    compiled = torch.compile(lambda x: ops.rms_norm(x, W), fullgraph=True, backend="aot_eager")
    with installed_backends(kit.backend("other", says("other"))):
        assert float(compiled(X)[0, 0]) == len("other")
        with use_backends("reference"):
            torch.testing.assert_close(compiled(X), reference_norm.rms_norm(X, W, 1e-6))
        assert float(compiled(X)[0, 0]) == len("other")
    torch.compiler.reset()


def test_predicates_of_explain_see_meta_tensors(kit: Kit) -> None:
    seen: list[Tensor] = []

    def accepts(x: Tensor) -> str | None:
        seen.append(x)
        return None

    with installed_backends(kit.backend("acme", says("acme", accepts=accepts))):
        assert q_core.explain("rms_norm", dtype=torch.bfloat16).served_by == "acme"
    assert seen[0].device.type == "meta" and seen[0].dtype is torch.bfloat16


def test_explain_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="rms_norm has no argument 'bias'"):
        q_core.explain("rms_norm", bias=None)
    with pytest.raises(ValueError, match="unknown op 'rms'"):
        q_core.explain("rms")
    with pytest.raises(ValueError, match="device is 'gpu'"):
        q_core.explain("rms_norm", device="gpu")
