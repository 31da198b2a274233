"""Codes in portable arithmetic, for every input there is, or every one that a decision hangs on."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from q_triton import interpreter
from q_triton.kernels.codes import from_bits, from_e4m3, magnitude_bits, nibble, to_e4m3

interpreter.install()

EVERY_BYTE = torch.arange(256).to(torch.uint8)


@triton.jit
def from_e4m3_kernel(codes, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, from_e4m3(tl.load(codes + at)))


def test_every_e4m3_code_is_torchs_value() -> None:
    from_e4m3_kernel[(1,)](EVERY_BYTE, out := torch.empty(256), N=256)
    expected = EVERY_BYTE.view(torch.float8_e4m3fn).float()
    assert torch.equal(out.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(out[numbers].view(torch.int32), expected[numbers].view(torch.int32))  # -0 is another code than 0


@triton.jit
def to_e4m3_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, to_e4m3(tl.load(x + at, at < n, 0.0)), at < n)


def encoded(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.uint8)
    to_e4m3_kernel[(1,)](x, out, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return out


def within_e4m3(x: Tensor) -> Tensor:
    return x[x.isfinite() & (x.abs() <= 448)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_gets_torchs_e4m3_code(dtype: torch.dtype) -> None:
    x = within_e4m3(torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float())
    assert torch.equal(encoded(x), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_e4m3_codes_change_where_torchs_do() -> None:
    values = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (values[1:] + values[:-1]) / 2  # exact in float32
    infinity = torch.tensor(torch.inf)
    about = torch.cat((values, midpoints, *(torch.nextafter(midpoints, sign * infinity) for sign in (1, -1))))
    x = within_e4m3(torch.cat((about, -about)))
    assert torch.equal(encoded(x), x.to(torch.float8_e4m3fn).view(torch.uint8))


@triton.jit
def nibble_kernel(packed, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, nibble(tl.load(packed + at // 2), at))


def test_the_first_of_two_elements_is_the_high_nibble_of_every_byte() -> None:
    nibble_kernel[(1,)](EVERY_BYTE, out := torch.empty(512, dtype=torch.int32), N=512)
    assert torch.equal(out.view(256, 2), torch.stack((EVERY_BYTE >> 4, EVERY_BYTE & 0xF), 1).int())


@triton.jit
def largest_kernel(x, out, N: tl.constexpr):
    tl.store(out, from_bits(tl.max(magnitude_bits(tl.load(x + tl.arange(0, N))), 0)))


@pytest.mark.parametrize(
    "values",
    [
        (0.0, -0.0, 0.0, 0.0),
        (1.0, -3.0, 2.0, 0.5),
        (1e-45, 0.0, -1e-44, 0.0),
        (1.0, -torch.inf, 2.0, 3.0),
        (torch.nan, torch.inf, 1.0, -2.0),
        (1.0, 2.0, -torch.nan, torch.inf),
    ],
)
def test_the_largest_magnitude_keeps_nan(values: tuple[float, ...]) -> None:
    x = torch.tensor(values)
    largest_kernel[(1,)](x, out := torch.empty(()), N=4)
    assert torch.equal(out, x.abs().max()) or (out.isnan() and x.isnan().any())
