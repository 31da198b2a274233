"""What is declared of an op, once: documentation, fake kernel, autograd, autocast, tests and benchmarks all read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from q_core import hookspecs
from q_core.samples.make import Make

Arguments = dict[str, Any]
"""A call's arguments by name, every argument of the hook."""


class Context(Protocol):
    """What a gradient formula uses of ``torch.autograd.function.FunctionCtx``, and the attributes it sets for itself."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Gradient:
    """A gradient formula.

    Attributes:
        save: called after the forward with the context, the op's arguments and its output.
        backward: from the context and the gradients of the outputs to one gradient an argument, or ``None``.
        inputs: arguments that there is a gradient to.
    """

    save: Callable[[Any, tuple[Any, ...], Any], None]
    backward: Callable[..., tuple[Tensor | None, ...]]
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OpRecord:
    """An op, declared once.

    Attributes:
        name: name of the hook, of the torch op ``q::name`` and of the public function.
        family: module name in ``specs``, ``ops``, ``reference``, ``gradients`` and in every backend.
        check: validates the arguments; shared by the public function and the fake kernel.
        fake: outputs without data, for tracing; validates first.
        samples: yields calls that together touch the contract's corners, for float dtypes.
        bound: elementwise error that an implementation may have against the float64 reference, from the arguments and the expected
            output; ``None`` where the result is exact.
        mutates: arguments that the op writes to.
        neutral: arguments that a backend may leave out, with the value at which that makes no difference.
        gradient: formula; without one, a backward through the op raises.
        autocast: arguments that are cast to autocast's dtype.
    """

    name: str
    family: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    samples: Callable[[Make, torch.dtype], Iterator[Arguments]]
    bound: Callable[[Arguments, Any], Any] | None = None
    mutates: tuple[str, ...] = ()
    neutral: Mapping[str, Any] = field(default_factory=dict)
    gradient: Gradient | None = None
    autocast: tuple[str, ...] = ()

    @property
    def hook(self) -> Callable[..., Any]:
        """The annotated hook specification."""
        function: Callable[..., Any] = getattr(hookspecs, self.name)
        return function

    @property
    def arguments(self) -> tuple[str, ...]:
        """The hook's argument names, in order."""
        return tuple(inspect.signature(self.hook).parameters)

    @property
    def summary(self) -> str:
        """The hook's line of documentation."""
        return inspect.getdoc(self.hook) or ""
