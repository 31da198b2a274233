"""What stands between a call and its kernel: modes and transforms see the op once; a switch of backends disturbs no call."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from q_core import Availability, Backend, impl, ops, use_backends
from q_core.dispatch import bound
from q_core.testing import family_module, installed_backends

X, W = torch.randn(3, 8), torch.randn(8)


def backend(name: str, family: str) -> Backend:
    return Backend(
        name=name, device_types=("cpu",), surface_version=1, priority=1, probe=lambda: Availability(True, ""), families=(family,)
    )


class Seen(TorchDispatchMode):
    """Notes the ops of q that reach torch's dispatch modes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "q":
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_dispatch_mode_sees_the_op_once(context: Any, requires_grad: bool) -> None:
    with context(), Seen() as seen:
        ops.rms_norm(X.clone().requires_grad_(requires_grad), W)
    assert seen.ops == ["q.rms_norm.default"]


def test_fake_tensors_reach_the_fake_kernel_in_every_mode() -> None:
    with FakeTensorMode() as mode:
        x, weight = mode.from_tensor(X), mode.from_tensor(W)
        for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with context():
                assert isinstance(ops.rms_norm(x, weight), FakeTensor)
    assert ops.rms_norm(X.to("meta"), W.to("meta")).is_meta


def test_a_kernel_records_nothing_of_its_own() -> None:
    """The formula is the gradient; what the kernel computes with torch must not enter the graph beside it."""
    seen: list[Tensor] = []

    @impl
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        seen.append(x * 2)
        return seen[-1].clone()

    with family_module("records_nothing", rms_norm) as family, installed_backends(backend("acme", family)):
        result = ops.rms_norm(X.clone().requires_grad_(), W)
    assert result.requires_grad and not seen[0].requires_grad


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_switch_of_backends_leaves_a_call_under_way_alone(context: Any) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def accepts(eps: float) -> str | None:
        arrived.set()
        go_on.wait(20)
        return "declined, late"

    @impl(accepts=accepts)
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise AssertionError("declined")

    @impl
    def second(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.full_like(x, 2.0)

    second.__name__ = "rms_norm"
    results: list[float] = []

    def call() -> None:
        with context():
            results.append(float(ops.rms_norm(X, W)[0, 0]))

    with family_module("late_first", rms_norm) as first_family, family_module("late_second", second) as second_family:
        slow = Backend("slow", ("cpu",), 1, 2, lambda: Availability(True, ""), families=(first_family,))
        with installed_backends(slow, backend("quick", second_family)):
            thread = threading.Thread(target=call)
            thread.start()
            assert arrived.wait(20)
            with use_backends("reference"):
                reference = ops.rms_norm(X, W)
                go_on.set()
                thread.join()
    assert results == [2.0]
    assert float(reference[0, 0]) != 2.0


def test_the_function_that_torch_holds_stays_the_same() -> None:
    from q_core.dispatch import _trampolines

    before = {id(trampoline.function) for trampoline in _trampolines}
    with use_backends("reference"):
        bound("rms_norm")(X, W, 1e-6)
    assert {id(trampoline.function) for trampoline in _trampolines} == before


def test_repeated_switches_leave_nothing_behind() -> None:
    from q_core.dispatch import _trampolines

    (trampoline,) = (t for t in _trampolines if (t.op, t.device_type) == ("rms_norm", "cpu"))
    sizes = set()
    for _ in range(6):
        with use_backends("reference"):
            ops.rms_norm(X, W)
        ops.rms_norm(X, W)
        sizes.add(len(trampoline.function.__globals__))
    assert len(sizes) <= 2
