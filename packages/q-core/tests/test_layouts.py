"""Private weight layouts, with a backend made up for the test whose layout is the canonical one backwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import q_core
from q_core import Availability, Backend, BackendError, NoBackendError, impl, ops
from q_core.layouts import CANONICAL
from q_core.reference import gemm as reference
from q_core.testing import family_module, installed_backends

LAYOUT = "acme.backwards"


def turn(tensor: Tensor) -> Tensor:
    return tensor.view(-1).flip(0).view(tensor.shape)


def accepts(layout: str) -> str | None:
    return None if layout == LAYOUT else f"layout {layout!r}, only {LAYOUT}"


@pytest.fixture(autouse=True)
def acme() -> Iterator[None]:
    @impl(accepts=accepts)
    def prepack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
        return [turn(tensor) for tensor in tensors]

    @impl(accepts=accepts)
    def unpack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
        return [turn(tensor) for tensor in tensors]

    @impl(accepts=accepts)
    def gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        return reference.gemm(x_TK, turn(w_NK), bias, CANONICAL)

    @impl(accepts=accepts)
    def gemm_4bit(
        x_TK: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int],
        bias: Tensor | None, layout: str,
    ) -> Tensor:  # fmt: skip
        return reference.gemm_4bit(x_TK, turn(packed), turn(absmax), blocksize, quant_type, shape, bias, "native", CANONICAL)

    backend = Backend(
        name="acme", device_types=("cpu",), surface_version=1, priority=100, probe=lambda: Availability(True, ""),
        families=("acme_layouts",), layouts=(LAYOUT,),
    )  # fmt: skip
    with family_module("acme_layouts", prepack_weight, unpack_weight, gemm, gemm_4bit), installed_backends(backend):
        yield


W = torch.randn(6, 64)


def test_exact_both_ways() -> None:
    for format, tensors in (("dense", [W]), ("nf4", list(ops.quantize_4bit(W))), ("int8", list(ops.quantize_int8_rowwise(W)[:2]))):
        settings: dict[str, Any] = {"format": format, "shape": (6, 64), "layout": LAYOUT}
        packed = ops.prepack_weight(tensors, **settings)
        assert any(not torch.equal(a, b) for a, b in zip(packed, tensors, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(ops.unpack_weight(packed, **settings), tensors, strict=True))


def test_products_and_gradients_are_those_of_the_canonical_weight() -> None:
    packed, absmax = ops.quantize_4bit(W)
    private = ops.prepack_weight([packed, absmax], format="nf4", shape=(6, 64), layout=LAYOUT)
    (dense,) = ops.prepack_weight([W], format="dense", shape=(6, 64), layout=LAYOUT)
    x = torch.randn(3, 64, requires_grad=True)
    pairs = [
        (ops.gemm_4bit(x, *private, shape=(6, 64), layout=LAYOUT), ops.gemm_4bit(x, packed, absmax, shape=(6, 64))),
        (ops.gemm(x, dense, layout=LAYOUT), ops.gemm(x, W)),
    ]
    for got, expected in pairs:
        assert torch.equal(got, expected)
        ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected))
        assert torch.equal(ours, theirs)


def test_no_other_backend_touches_a_private_layout() -> None:
    with pytest.raises(
        NoBackendError, match=r"int8_gemm on cpu: .*reference: layout 'acme.backwards' is private to another backend"
    ):
        ops.int8_gemm(
            torch.zeros(1, 8, dtype=torch.int8), torch.zeros(2, 8, dtype=torch.int8), torch.ones(1), torch.ones(2), layout=LAYOUT
        )
    with pytest.raises(NoBackendError, match=r"layout 'nobody\.knows' is private"):
        ops.prepack_weight([W], format="dense", shape=(6, 64), layout="nobody.knows")
    assert "acme: declines: layout 'canonical', only acme.backwards" in str(q_core.explain("gemm"))


def test_int8_activations_go_to_who_knows_them() -> None:
    packed, absmax = ops.quantize_4bit(W)
    private = ops.prepack_weight([packed, absmax], format="nf4", shape=(6, 64), layout=LAYOUT)
    with pytest.raises(NoBackendError, match="acme: it doesn't know the argument activations"):
        ops.gemm_4bit(torch.randn(1, 64), *private, shape=(6, 64), layout=LAYOUT, activations="int8")


def test_a_private_dense_weight_does_not_train() -> None:
    (dense,) = ops.prepack_weight([W], format="dense", shape=(6, 64), layout=LAYOUT)
    with pytest.raises(RuntimeError, match=r"gemm has no gradient to a weight in the layout 'acme\.backwards'"):
        ops.gemm(torch.randn(1, 64), dense.requires_grad_(), layout=LAYOUT)


def test_names_of_layouts_carry_their_backend() -> None:
    with pytest.raises(BackendError, match=r"backend 'acme' has a layout 'other.x'; its layouts are named 'acme.<name>'"):
        Backend("acme", ("cpu",), 1, 100, lambda: Availability(True, ""), layouts=("other.x",))
