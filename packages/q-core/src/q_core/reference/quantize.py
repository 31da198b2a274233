"""Reference of the quantize family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.backend import impl
from q_core.formats.codebooks import FOUR_BIT_BOOKS, book_tensor

SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal


def in_blocks(flat: Tensor, blocksize: int) -> Tensor:
    """[n] → [blocks, blocksize], the last one filled up with zeros."""
    return F.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def scale_blocks(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Blocks [blocks, blocksize] over their scales, clamped to [-1, 1]; zero where a scale is zero or not finite."""
    divisor = absmax.unsqueeze(1)
    scaled = torch.where(divisor < SMALLEST_NORMAL, blocks / divisor, blocks * (1 / divisor)).clamp(-1, 1)
    return torch.where((divisor > 0) & divisor.isfinite(), scaled, 0.0)


def power_of_two_scale(absmax: Tensor) -> Tensor:
    """6 * 2^e with the smallest e in -127…125 for which that is not below absmax; zero and non-finite ones stay."""
    mantissa, exponent = torch.frexp(absmax)
    exponent = torch.where(mantissa <= 0.75, exponent - 3, exponent - 2).clamp(-127, 125)
    # In two factors, neither of which is subnormal or overflows.
    half = exponent // 2
    scale = 6 * torch.ldexp(torch.ones_like(absmax), half) * torch.ldexp(torch.ones_like(absmax), exponent - half)
    return torch.where((absmax > 0) & absmax.isfinite(), scale, absmax)


def e4m3_scale(absmax: Tensor) -> Tensor:
    """6 * t * d, with t = max absmax / 2688 of the tensor and d = absmax / (6 t) rounded to E4M3, at least its smallest."""
    finite = absmax.isfinite()
    largest = torch.where(finite, absmax, 0.0).amax() if absmax.numel() else absmax.new_zeros(())
    tensor_scale = largest / torch.full_like(largest, 2688)
    ratio = absmax / torch.where(tensor_scale > 0, 6 * tensor_scale, 1.0)
    block_scale = ratio.clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
    return torch.where((absmax > 0) & finite, 6 * (tensor_scale * block_scale), absmax)


SCALE_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "absmax": lambda absmax: absmax,
    "e8m0": power_of_two_scale,
    "e4m3": e4m3_scale,
}


def nearest(scaled: Tensor, ordered: Tensor) -> Tensor:
    """Index of the nearest entry of an ascending book by float32 midpoints, the lower one on a tie."""
    return torch.bucketize(scaled, (ordered[:-1] + ordered[1:]) / 2, out_int32=True)


def decode(codes: Tensor, absmax: Tensor, book: Tensor, blocksize: int) -> Tensor:
    """Flat codes to float32 values."""
    values = book.index_select(0, codes.reshape(-1).int())
    return (in_blocks(values, blocksize) * absmax.reshape(-1, 1)).view(-1)[: values.numel()]


@impl
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    blocks = in_blocks(A.reshape(-1).float(), blocksize)
    absmax = blocks.abs().amax(1)
    scaled = scale_blocks(blocks, absmax).view(-1)[: A.numel()]
    return nearest(scaled, code).to(torch.uint8).view(A.shape), absmax


@impl
def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return decode(codes, absmax, code, blocksize).to(dtype).view(codes.shape)


@impl
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    book = FOUR_BIT_BOOKS[quant_type]
    code_of_rank = torch.tensor(book.ordered, dtype=torch.uint8, device=A.device)
    values = book_tensor(quant_type, A.device)
    blocks = in_blocks(A.reshape(-1).float(), blocksize)
    absmax = SCALE_RULES[book.scale](blocks.abs().amax(1))
    scaled = scale_blocks(blocks, absmax).view(-1)[: A.numel()]
    codes = code_of_rank[nearest(scaled, values[code_of_rank.int()])]
    codes = F.pad(codes, (0, codes.numel() % 2), value=book.zero_code)
    return codes[0::2] << 4 | codes[1::2], absmax


def unpack_4bit(packed: Tensor, numel: int) -> Tensor:
    """Bytes to codes, the high nibble first."""
    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 15), 1).view(-1)[:numel]


@impl
def dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    codes = unpack_4bit(packed, torch.Size(shape).numel())
    return decode(codes, absmax, book_tensor(quant_type, packed.device), blocksize).to(dtype).view(tuple(shape))


@impl
def quantize_int8_rowwise(A_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    x = A_TK.float()
    magnitude = x.abs()
    is_outlier = magnitude >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
    outliers = is_outlier.reshape(x.shape[:-1].numel(), x.shape[-1]).any(0)
    magnitude = magnitude.masked_fill(is_outlier, 0.0)
    absmax = magnitude.amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    divisor = absmax.unsqueeze(-1)
    factor = torch.full_like(divisor, 127) / divisor  # a number over a tensor would be rounded twice: reciprocal, product
    codes = torch.where(factor.isfinite(), x * factor, x / divisor * 127).round().clamp(-127, 127)
    keep = (divisor > 0) & divisor.isfinite() & ~outliers
    return torch.where(keep, codes, 0.0).to(torch.int8), absmax, outliers
