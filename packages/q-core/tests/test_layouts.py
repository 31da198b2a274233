"""Private weight layouts, with a backend made up for the test whose layout is the canonical one backwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import q_core
from q_core import Availability, Backend, BackendError, NoBackendError, ops
from q_core.testing.private_layout import LAYOUT, private_layout


@pytest.fixture(autouse=True)
def acme() -> Iterator[None]:
    with private_layout():
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
    codes, scale, _ = ops.quantize_int8_rowwise(W)
    int8 = ops.prepack_weight([codes, scale], format="int8", shape=(6, 64), layout=LAYOUT)
    pairs = [
        (ops.gemm_4bit(x, *private, shape=(6, 64), layout=LAYOUT), ops.gemm_4bit(x, packed, absmax, shape=(6, 64))),
        (ops.gemm(x, dense, layout=LAYOUT), ops.gemm(x, W)),
        (ops.gemm_int8_weight(x, *int8, layout=LAYOUT), ops.gemm_int8_weight(x, codes, scale)),
    ]
    for got, expected in pairs:
        assert torch.equal(got, expected)
        ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected))
        assert torch.equal(ours, theirs)


def test_no_other_backend_touches_a_private_layout() -> None:
    a, b, scale = torch.zeros(1, 8, dtype=torch.int8), torch.zeros(2, 8, dtype=torch.int8), torch.ones(2)
    with pytest.raises(
        NoBackendError, match=r"int8_gemm on cpu: .*reference: layout 'nobody\.knows' is private to another backend"
    ):
        ops.int8_gemm(a, b, scale[:1], scale, layout="nobody.knows")
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
