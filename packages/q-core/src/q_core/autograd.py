"""Kernels at the Autograd key: a record's formula, or a backward that raises. Never a silently lost gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from q_core.record import Gradient, OpRecord


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    flat = (part for argument in arguments for part in (argument if isinstance(argument, list) else (argument,)))
    return [part for part in flat if isinstance(part, Tensor)]


def _raising(record: OpRecord) -> Gradient:
    message = f"{record.name} has no gradient: detach its inputs, or run it under torch.no_grad()."

    def save(ctx: Any, arguments: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(message)

    return Gradient(save=save, backward=backward)


def _refuse_tangents(record: OpRecord, arguments: tuple[Any, ...]) -> None:
    """Forward-mode AD sees through a kernel as if its output were constant: zeros, without a word."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _tensors(arguments)):
        raise RuntimeError(
            f"{record.name} has no forward-mode derivative: use reverse mode (backward, torch.func.grad), or unpack the dual tensors first."
        )


def autograd_kernel(record: OpRecord, op: Any, device_kernels: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The kernel of ``op`` at the Autograd key; its first argument is the call's set of dispatch keys.

    Args:
        record: the op's.
        op: the torch op.
        device_kernels: what is registered for it, by dispatch key. Where nothing else stands between, it is called directly: another
            round through the dispatcher would cost as much as the first.
    """
    direct = {_keys_of_plain_tensors(name): function for name, function in device_kernels.items()}

    def below(keys: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return direct.get(keys.raw_repr(), op)(*arguments)

    record_call = _recording(record, op, below)

    def kernel(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(record, arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return record_call(keys, arguments)
        return below(keys, arguments)

    return kernel


def _keys_of_plain_tensors(device_key: str) -> int:
    """The set of dispatch keys of a call on plain tensors of a device: without a mode, a transform or a subclass."""
    # Not every device has an Autograd key of its own.
    autograd_key = torch._C._parse_dispatch_key(f"Autograd{device_key}") or torch._C.DispatchKey.AutogradOther
    key = torch._C._parse_dispatch_key(device_key)
    assert key is not None
    return (torch._C.DispatchKeySet(key) | torch._C.DispatchKeySet(autograd_key)).raw_repr()


def _recording(record: OpRecord, op: Any, below: Callable[..., Any]) -> Callable[..., Any]:
    """What runs where a gradient is asked for."""
    # A Function sees no tensors inside of lists.
    if record.mutates or any(str(argument.type) == "List[Tensor]" for argument in op._schema.arguments):

        def refuse(keys: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
            writes = "writes to its arguments and " if record.mutates else ""
            raise RuntimeError(f"{record.name} {writes}has no gradient: run it under torch.no_grad().")

        return refuse
    gradient = record.gradient or _raising(record)

    # torch.autograd.Function is this with a detour for functorch, which a kernel doesn't need: the dispatcher brings each level here.
    class Function(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *arguments_and_keys: Any) -> Any:
            *arguments, keys = arguments_and_keys
            if torch._C._are_functorch_transforms_active():
                with torch.enable_grad():  # the levels below record, too
                    output = below(keys, arguments)
            else:
                output = below(keys, arguments)
            gradient.save(ctx, tuple(arguments), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *gradient.backward(ctx, *gradients), None

    Function.__name__ = record.name

    def apply(keys: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return Function.apply(*arguments, keys)  # type: ignore[attr-defined]  # of the C++ base, which has no stub
        return Function.apply(*arguments, keys)  # type: ignore[attr-defined]

    return apply
