"""Quantization and its inverse. Contracts: :mod:`q_core.ops.quantize`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from q_core.backend import impl
from q_cpu.runtime import native
from q_cpu.support import decline_dtype


def _accepts_input(A: Tensor) -> str | None:
    return decline_dtype("A", A.dtype)


def _accepts_rows(A_TK: Tensor) -> str | None:
    return decline_dtype("A_TK", A_TK.dtype)


def _accepts_output(dtype: torch.dtype) -> str | None:
    return decline_dtype("dtype", dtype)


@impl(accepts=_accepts_input)
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize flat blocks of ``A`` to the nearest entries of a code book: codes, absmax."""
    A = A.contiguous()
    codes = torch.empty_like(A, dtype=torch.uint8)
    absmax = torch.empty(-(-A.numel() // blocksize), dtype=torch.float32)
    native.quantize_blockwise(A, code.contiguous(), blocksize, codes, absmax)
    return codes, absmax


@impl(accepts=_accepts_output)
def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Decode what ``quantize_blockwise`` made."""
    codes = codes.contiguous()
    out = torch.empty_like(codes, dtype=dtype)
    native.dequantize_blockwise(codes, absmax.contiguous(), code.contiguous(), blocksize, out)
    return out


@impl(accepts=_accepts_input)
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Quantize flat blocks of ``A`` to a 4-bit format: packed codes, absmax."""
    A = A.contiguous()
    packed = torch.empty((A.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-A.numel() // blocksize), dtype=torch.float32)
    native.quantize_4bit(A, blocksize, quant_type, packed, absmax)
    return packed, absmax


@impl(accepts=_accepts_output)
def dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Decode what ``quantize_4bit`` made."""
    out = torch.empty(tuple(shape), dtype=dtype)
    native.dequantize_4bit(packed.contiguous(), absmax.contiguous(), blocksize, quant_type, out)
    return out


@impl(accepts=_accepts_rows)
def quantize_int8_rowwise(A_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows to int8 with one scale a row, outlier columns set aside: codes, row absmax, outlier mask."""
    A_TK = A_TK.contiguous()
    *leading, K = A_TK.shape
    q = torch.empty_like(A_TK, dtype=torch.int8)
    absmax = torch.empty(leading, dtype=torch.float32)
    outliers = torch.empty(K, dtype=torch.bool)
    native.quantize_int8_rowwise(A_TK, threshold, q, absmax, outliers)
    return q, absmax, outliers
