"""Records of the norm family."""

from __future__ import annotations

import torch
from torch import Tensor

from q_core.gradients import norm as gradients
from q_core.operand import Operand
from q_core.record import OpRecord
from q_core.samples import norm as samples
from q_core.specs import bounds, check


def _check_norm(op: str, x: Tensor, weight: Tensor, eps: float) -> None:
    check.floating(op, "x", x)
    check.same_dtype(op, "weight", weight, "x", x.dtype)
    if x.dim() == 0:
        check.wrong_shape(op, "x", check.shape_of(x), "[..., K]")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        check.wrong_shape(op, "weight", check.shape_of(weight), f"[{x.shape[-1]}], as x's last axis")
    if not 0.0 <= eps < float("inf"):
        check.wrong_value(op, "eps", eps, "a finite number, 0 or more")


def check_rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    check.one_device("rms_norm", ("x", "weight"), x, weight)
    _check_norm("rms_norm", x, weight, eps)


def check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    op = "add_rms_norm"
    check.one_device(op, ("x", "residual", "weight"), x, residual, weight)
    _check_norm(op, x, weight, eps)
    check.same_dtype(op, "residual", residual, "x", x.dtype)
    if residual.shape != x.shape:
        check.wrong_shape(op, "residual", check.shape_of(residual), f"x's {check.shape_of(x)}")


def check_rotary_embedding(q_THD: Tensor, k_TGD: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    op = "rotary_embedding"
    check.one_device(op, ("q_THD", "k_TGD", "positions", "cos", "sin"), q_THD, k_TGD, positions, cos, sin)
    check.floating(op, "q_THD", q_THD)
    check.same_dtype(op, "k_TGD", k_TGD, "q_THD", q_THD.dtype)
    if q_THD.dim() != 3:
        check.wrong_shape(op, "q_THD", check.shape_of(q_THD), "[T, H, D]")
    T, _, D = q_THD.shape
    if k_TGD.dim() != 3 or k_TGD.shape[0] != T or k_TGD.shape[2] != D:
        check.wrong_shape(op, "k_TGD", check.shape_of(k_TGD), f"[{T}, G, {D}], as q_THD has T and D")
    check.exact_dtype(op, "positions", positions, torch.int64)
    if positions.dim() != 1 or positions.shape[0] != T:
        check.wrong_shape(op, "positions", check.shape_of(positions), f"[{T}], one a token")
    check.exact_dtype(op, "cos", cos, torch.float32)
    check.exact_dtype(op, "sin", sin, torch.float32)
    if cos.dim() != 2 or 2 * cos.shape[1] > D:
        check.wrong_shape(op, "cos", check.shape_of(cos), f"[P, F] with 2F of at most D = {D}")
    if sin.shape != cos.shape:
        check.wrong_shape(op, "sin", check.shape_of(sin), f"cos's {check.shape_of(cos)}")


def check_silu_and_mul(x: Tensor) -> None:
    check.one_device("silu_and_mul", ("x",), x)
    check.floating("silu_and_mul", "x", x)
    if x.dim() == 0 or x.shape[-1] % 2:
        check.wrong_shape("silu_and_mul", "x", check.shape_of(x), "[..., 2N], gate and up side by side")


def fake_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_rms_norm(x, weight, eps)
    return x.new_empty(x.shape)


def fake_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_add_rms_norm(x, residual, weight, eps)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def fake_rotary_embedding(
    q_THD: Tensor, k_TGD: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    check_rotary_embedding(q_THD, k_TGD, positions, cos, sin, interleaved)
    return q_THD.new_empty(q_THD.shape), k_TGD.new_empty(k_TGD.shape)


def fake_silu_and_mul(x: Tensor) -> Tensor:
    check_silu_and_mul(x)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


RECORDS = (
    OpRecord(
        name="rms_norm",
        family="norm",
        check=check_rms_norm,
        fake=fake_rms_norm,
        operands={
            "x": Operand(check.FLOATS, "..., K"),
            "weight": Operand(("x",), "K"),
        },
        outputs={"output": Operand(("x",), "..., K")},
        samples=samples.rms_norm,
        bound=bounds.rms_norm,
        gradient=gradients.rms_norm,
    ),
    OpRecord(
        name="add_rms_norm",
        family="norm",
        check=check_add_rms_norm,
        fake=fake_add_rms_norm,
        operands={
            "x": Operand(check.FLOATS, "..., K"),
            "residual": Operand(("x",), "..., K"),
            "weight": Operand(("x",), "K"),
        },
        outputs={
            "normed": Operand(("x",), "..., K"),
            "total": Operand(("x",), "..., K"),
        },
        samples=samples.add_rms_norm,
        bound=bounds.add_rms_norm,
        gradient=gradients.add_rms_norm,
    ),
    OpRecord(
        name="rotary_embedding",
        family="norm",
        check=check_rotary_embedding,
        fake=fake_rotary_embedding,
        operands={
            "q_THD": Operand(check.FLOATS, "T, H, D"),
            "k_TGD": Operand(("q_THD",), "T, G, D"),
            "positions": Operand((torch.int64,), "T"),
            "cos": Operand((torch.float32,), "P, F"),
            "sin": Operand((torch.float32,), "P, F"),
        },
        outputs={
            "q": Operand(("q_THD",), "T, H, D"),
            "k": Operand(("q_THD",), "T, G, D"),
        },
        samples=samples.rotary_embedding,
        bound=bounds.rotary_embedding,
        neutral={"interleaved": False},
        gradient=gradients.rotary_embedding,
    ),
    OpRecord(
        name="silu_and_mul",
        family="norm",
        check=check_silu_and_mul,
        fake=fake_silu_and_mul,
        operands={
            "x": Operand(check.FLOATS, "..., 2N"),
        },
        outputs={"output": Operand(("x",), "..., N")},
        samples=samples.silu_and_mul,
        bound=bounds.silu_and_mul,
        gradient=gradients.silu_and_mul,
    ),
)
