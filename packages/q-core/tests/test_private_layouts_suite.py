"""The suite's test of private layouts can fail: faults that only a private layout shows."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from q_core import Availability, Backend, impl
from q_core.reference import gemm as reference
from q_core.testing import Capabilities, family_module, installed_backends, suite
from q_core.testing.private_layout import private_layout
from q_core.testing.standard import layouts as standard
from q_core.testing.target import chosen, target_of

LAYOUT = "acme.rotated"
OPS = ("gemm", "prepack_weight", "unpack_weight")
Turn = Callable[[Tensor], Tensor]


def rotate(tensor: Tensor, by: int = 1) -> Tensor:
    return tensor.reshape(-1).roll(by).view(tensor.shape)


def back(tensor: Tensor) -> Tensor:
    return rotate(tensor, -1)


@contextlib.contextmanager
def backend(pack: Turn = rotate, unpack: Turn = back, read: Turn = back, layouts: tuple[str, ...] = (LAYOUT,)) -> Iterator[None]:
    """A backend whose layout is rotated by an element, and that packs, unpacks and reads it so."""

    def accepts(layout: str) -> str | None:
        return None if layout == LAYOUT else f"layout {layout!r}, only {LAYOUT}"

    @impl(accepts=accepts)
    def prepack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
        return [pack(tensor) for tensor in tensors]

    @impl(accepts=accepts)
    def unpack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
        return [unpack(tensor) for tensor in tensors]

    @impl(accepts=accepts)
    def gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        return reference.gemm(x_TK, read(w_NK), bias, "canonical")

    described = Backend("acme", ("cpu",), 1, 100, lambda: Availability(True, ""), families=("acme_rotated",), layouts=layouts)
    with family_module("acme_rotated", prepack_weight, unpack_weight, gemm), installed_backends(described):
        yield


def said(op: str) -> str:
    """What test_private_layouts says of an op of acme, "" where it passes."""
    capabilities = Capabilities("acme")
    with chosen(capabilities):
        try:
            standard.test_private_layouts(target_of(capabilities, op))
        except AssertionError as failure:
            return str(failure)
    return ""


def test_one_that_is_right_passes() -> None:
    with backend():
        assert not any(map(said, OPS))


def test_so_does_each_product_in_the_layout_made_up_for_tests() -> None:
    with private_layout():
        assert not any(map(said, ("gemm", "gemm_4bit", "int8_gemm", "gemm_int8_weight", "prepack_weight", "unpack_weight")))


def test_it_is_run_where_there_is_something_to_hold() -> None:
    def ops_of(name: str) -> list[str]:
        return suite.ops_of(standard.test_private_layouts, cast(ModuleType, SimpleNamespace(CAPABILITIES=Capabilities(name))))

    with backend():
        assert ops_of("acme") == list(OPS) and not ops_of("reference")
    with backend(layouts=()):
        assert ops_of("acme") == ["prepack_weight", "unpack_weight"]


@pytest.mark.parametrize(
    ("faults", "ops", "message"),
    [
        ({"unpack": rotate}, {"prepack_weight", "unpack_weight", "gemm"}, "unpack_weight doesn't give back the same bits"),
        ({"read": lambda w: w}, {"gemm"}, r"gemm\(.*layout='acme\.rotated'.* misses in"),
        ({"pack": lambda w: rotate(w).to(torch.float64)}, {"prepack_weight", "unpack_weight", "gemm"}, r"gives torch\.float64"),
        ({"layouts": ()}, {"prepack_weight", "unpack_weight", "gemm"}, "acme has .*, and Backend.layouts names no layout"),
    ],
)
def test_a_fault_in_it_fails(faults: dict[str, Any], ops: set[str], message: str) -> None:
    with backend(**faults):
        failures = {op: said(op) for op in OPS}
    assert {op for op, failure in failures.items() if failure} == ops
    assert all(re.search(message, failures[op]) for op in ops), failures
