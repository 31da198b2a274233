"""The mended interpreter: bfloat16 as a GPU has it or not at all, and NaN in maxima.

All bit patterns, beside torch, whose conversions round to nearest, ties to even.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as tritons

from q_triton import interpreter

interpreter.install()

PATTERNS = torch.arange(2**16, dtype=torch.int32)
BETWEEN = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
"""What float32 has beyond bfloat16's bits: nothing, little, and both sides of half-way."""


def every_bfloat16() -> Tensor:
    return PATTERNS.to(torch.int16).view(torch.bfloat16)


def float32_about_every_bfloat16() -> Tensor:
    return torch.cat([(PATTERNS << 16) | low for low in BETWEEN]).view(torch.float32)


def same(a: Tensor, b: Tensor) -> bool:
    """Bits, of -0 too; NaN is like any other."""
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < n, 0.0).to(out.dtype.element_ty), at < n)


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    copy_kernel[(1,)](x, out, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return out


def test_widening_is_exact() -> None:
    x = every_bfloat16()
    assert same(torch.from_numpy(interpreter.widened(x.view(torch.int16).numpy())), x.float())
    assert same(copied(x, torch.float32), x.float())


def test_narrowing_rounds_to_nearest_ties_to_even() -> None:
    x = float32_about_every_bfloat16()
    bits = torch.from_numpy(interpreter.narrowed(x.numpy()).view(np.int16))
    assert same(bits.view(torch.bfloat16), x.bfloat16())
    assert same(copied(x, torch.bfloat16), x.bfloat16())


def test_halves_are_as_torchs() -> None:
    x = float32_about_every_bfloat16()
    assert same(copied(x, torch.float16), x.half())


@triton.jit
def dot_kernel(a, b, c, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    left = tl.load(a + rows * K + inner[None, :])
    right = tl.load(b + inner[:, None] * N + columns)
    total = tl.dot(left, right, tl.load(c + rows * N + columns))
    tl.store(out + rows * N + columns, total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_multiplies_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    c, out = torch.randn(32, 32, generator=generator), torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, out, M=32, N=32, K=32)
    exact = a.double() @ b.double() + c.double()
    magnitude = a.double().abs() @ b.double().abs() + c.double().abs()
    assert ((out - exact).abs() <= 33 * 2**-24 * magnitude).all()


@triton.jit
def operation_kernel(x, out, OPERATION: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    if OPERATION == "add":
        value = value + value
    elif OPERATION == "multiply":
        value = value * 2.0
    elif OPERATION == "negate":
        value = -value
    elif OPERATION == "compare":
        value = tl.where(value < value, 1.0, 0.0)
    elif OPERATION == "maximum":
        value = tl.maximum(value, value)
    elif OPERATION == "abs":
        value = tl.abs(value)
    elif OPERATION == "exp":
        value = tl.exp(value)
    elif OPERATION == "fma":
        value = tl.fma(value, value, value)
    elif OPERATION == "sum":
        value = value.to(tl.float32) + tl.sum(value, 0)
    elif OPERATION == "max":
        value = value.to(tl.float32) + tl.max(value, 0)
    elif OPERATION == "cumsum":
        value = tl.cumsum(value, 0)
    elif OPERATION == "from integer":
        value = at.to(tl.bfloat16)
    elif OPERATION == "from unsigned":
        value = at.to(tl.uint8).to(tl.bfloat16)
    tl.store(out + at, value.to(tl.float32))


OPERATIONS = (
    "add", "multiply", "negate", "compare", "maximum", "abs", "exp", "fma", "sum", "max", "cumsum", "from integer", "from unsigned",
)  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_arithmetic_of_bfloat16_is_refused_or_right(operation: str) -> None:
    x = torch.arange(16).bfloat16() / 16
    try:
        operation_kernel[(1,)](x, out := torch.empty(16), OPERATION=operation, N=16)
    except Exception as error:
        assert any(word in str(error) for word in ("bfloat16", "bf16"))  # noqa: PT017 — either is right
    else:
        operation_kernel[(1,)](x.float(), expected := torch.empty(16), OPERATION=operation, N=16)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ("add", "binary_op of bfloat16 in a kernel"), ("abs", "create_fabs of bfloat16"), ("fma", "create_fma of bfloat16"),
        ("sum", "reduction or scan of bfloat16"),
        ("from integer", "an integer is made bfloat16"), ("from unsigned", "an integer is made bfloat16"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_mend(operation: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        operation_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), torch.empty(16), OPERATION=operation, N=16)


@triton.jit
def extrema_kernel(a, b, low, high, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(low + at, tl.minimum(x, y))
    tl.store(high + at, tl.maximum(x, y))


def test_maximum_and_minimum_of_a_number_and_nan_are_the_number() -> None:
    a = torch.tensor([1.0, torch.nan, torch.nan, 2.0])
    b = torch.tensor([torch.nan, 3.0, torch.nan, -5.0])
    extrema_kernel[(1,)](a, b, low := torch.empty(4), high := torch.empty(4), N=4)
    assert same(low, torch.fmin(a, b))
    assert same(high, torch.fmax(a, b))


def test_installing_again_changes_nothing() -> None:
    builder = tritons.InterpreterBuilder
    before = dict(vars(builder)), tritons._convert_float
    interpreter.install()
    assert (dict(vars(builder)), tritons._convert_float) == before


@pytest.mark.parametrize("name", ["create_dot", "binary_op", "create_maxnumf"])
def test_an_interpreter_that_is_built_otherwise_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tritons.InterpreterBuilder, "q_mended", False)
    monkeypatch.delattr(tritons.InterpreterBuilder, name)
    with pytest.raises(RuntimeError, match=f"Triton {triton.__version__}'s interpreter has no {name}"):
        interpreter.install()
