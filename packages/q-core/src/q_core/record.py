"""What is declared of an op, once: documentation, fake kernel, autograd, autocast, tests and benchmarks all read it."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from q_core import hookspecs
from q_core.operand import Declared, Operand, forms_of
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
class Row:
    """A line of the table of an op's tensors, for whoever shows it.

    Attributes:
        tensor: the argument or the result.
        operand: its dtypes and axes.
        place: of the tensor in a list that consists of several, such as ``[0]``.
        formats: values of ``format`` that this holds for; empty where it holds for all.
        mutated: the op writes to it.
        optional: it may be ``None`` (where formats are given, they decide).
        neutral: where a backend may leave it out, the value with which it makes no difference, as text.
    """

    tensor: str
    operand: Operand
    place: str = ""
    formats: str = ""
    mutated: bool = False
    optional: bool = False
    neutral: str | None = None


@dataclass(frozen=True, slots=True)
class OpRecord:
    """An op, declared once.

    Attributes:
        name: name of the hook, of the torch op ``q::name`` and of the public function.
        family: module name in ``specs``, ``ops``, ``reference``, ``gradients`` and in every backend.
        check: validates the arguments; shared by the public function and the fake kernel.
        fake: outputs without data, for tracing; validates first.
        operands: dtypes and axes of each argument that is a tensor, may be one, or is a list of them.
        outputs: those of the results, in order, by the names that the documentation has for them.
        sizes: arguments that are not tensors and give sizes, as ``operands`` write them: ``"shape": "N, K"``.
        samples: yields calls that together touch the contract's corners, for float dtypes.
        bound: elementwise error that an implementation may have against the float64 reference, from the arguments and the expected
            output; ``None`` where the result is exact.
        mutates: arguments that the op writes to.
        neutral: arguments that a backend may leave out, with the value at which that makes no difference.
        gradient: formula; without one, a backward through the op raises.
        autocast: arguments that are cast to autocast's dtype, unless they are codes.
    """

    name: str
    family: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    operands: Mapping[str, Declared]
    samples: Callable[[Make, torch.dtype], Iterator[Arguments]]
    outputs: Mapping[str, Declared] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
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

    @property
    def tensors(self) -> tuple[str, ...]:
        """The arguments that are a tensor, may be one, or are a list of them."""
        hints = typing.get_type_hints(self.hook)
        return tuple(name for name in self.arguments if Tensor in (hints[name], *typing.get_args(hints[name])))

    @property
    def lists(self) -> tuple[str, ...]:
        """The arguments that are lists of tensors."""
        hints = typing.get_type_hints(self.hook)
        return tuple(name for name in self.tensors if hints[name] == Sequence[Tensor])

    @property
    def optional(self) -> tuple[str, ...]:
        """The tensors that may be ``None``."""
        hints = typing.get_type_hints(self.hook)
        return tuple(name for name in self.tensors if type(None) in typing.get_args(hints[name]))

    @property
    def reference(self) -> Callable[..., Any]:
        """The op in plain PyTorch, that others are compared with."""
        function: Callable[..., Any] = getattr(importlib.import_module(f"q_core.reference.{self.family}"), self.name)
        return function

    @property
    def public(self) -> Callable[..., Any]:
        """The function of :mod:`q_core.ops`, which validates; importing it defines the torch ops."""
        function: Callable[..., Any] = getattr(importlib.import_module("q_core.ops"), self.name)
        return function

    @property
    def contract(self) -> str:
        """The whole contract: the docstring of the public function."""
        return inspect.getdoc(self.public) or ""

    def argument_rows(self) -> Iterator[Row]:
        """The table of the tensors that go in."""
        for name, declared in self.operands.items():
            for place, formats, operand in forms_of(declared):
                yield Row(
                    name,
                    operand,
                    place,
                    formats,
                    mutated=name in self.mutates,
                    optional=not formats and name in self.optional,
                    neutral=repr(self.neutral[name]) if name in self.neutral else None,
                )

    def result_rows(self) -> Iterator[Row]:
        """The table of the tensors that come out."""
        for name, declared in self.outputs.items():
            yield from (Row(name, operand, place, formats) for place, formats, operand in forms_of(declared))
