"""Kernels at the Autograd key: a record's formula, or a backward that raises. Never a silently lost gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from q_core.record import Gradient, OpRecord


def _requires_grad(arguments: tuple[Any, ...]) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.requires_grad:
                return True
        elif isinstance(argument, list) and any(isinstance(t, Tensor) and t.requires_grad for t in argument):
            return True
    return False


def _raising(record: OpRecord) -> Gradient:
    message = f"{record.name} has no gradient: detach its inputs, or run it under torch.no_grad()."

    def save(ctx: Any, arguments: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(message)

    return Gradient(save=save, backward=backward)


def autograd_kernel(record: OpRecord, op: Any) -> Callable[..., Any]:
    """The kernel of ``op`` at the Autograd key."""
    # A Function sees no tensors inside of lists.
    if record.mutates or any(str(argument.type) == "List[Tensor]" for argument in op._schema.arguments):
        return _refusing_kernel(record, op)
    gradient = record.gradient or _raising(record)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
            gradient.save(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradient.backward(ctx, *gradients)

    Function.__name__ = record.name

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and _requires_grad(arguments):
            return Function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return kernel


def _refusing_kernel(record: OpRecord, op: Any) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and _requires_grad(arguments):
            writes = "writes to its arguments and " if record.mutates else ""
            raise RuntimeError(f"{record.name} {writes}has no gradient: run it under torch.no_grad().")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return kernel
