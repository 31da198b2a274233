"""Quantization and its inverse, in flat blocks and in rows.

Block-wise formats share one rule.  A tensor is read flat, row-major, in blocks of ``blocksize`` (the last may be partial; blocks may
straddle rows).  In float32, each step rounded: ``absmax = max |x|`` of the block and ``s = x * (1 / absmax)`` clamped to [-1, 1], or
``s = x / absmax`` where absmax is below the smallest normal float32.  The code is that of the nearest code-book entry by the float32
midpoints ``(c[i] + c[i+1]) / 2``; on a tie the lower entry.  So codes are bit-equal on every backend.  The code books of the 4-bit
types are in :mod:`q_core.formats.codebooks`; one that a caller passes is sorted and holds 0 (the caller's promise).

Two 4-bit types have scales of a smaller set, which can be stored in a byte; their "absmax" is the scale times the largest value of the
code book, and what lies beyond is clamped:

- "mxfp4": ``6 * 2^e`` with the smallest e in -127…125 for which that is not below the block's absmax (OCP Microscaling Formats 1.0, with
  the exponent rounded up, so that nothing is clamped).
- "nvfp4": ``6 * (t * d)``: t = the tensor's largest finite absmax / 2688, d = absmax / (6 t) rounded to E4M3, from 2^-9 to 448.

"int4" has plain scales; its codes are the integers plus 8. In all formats:

- A block of zeros has absmax 0 and the code of 0; zero always encodes to the code of 0.
- A non-finite value poisons its block, visibly: absmax is NaN if any element is NaN, else infinity, every code is that of 0, and the
  block decodes to NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from q_core import hookspecs
from q_core.dispatch import bound
from q_core.formats.codebooks import FourBitType, dynamic_map
from q_core.specs import quantize as spec

_quantize_blockwise = bound(hookspecs.quantize_blockwise)
_dequantize_blockwise = bound(hookspecs.dequantize_blockwise)
_quantize_4bit = bound(hookspecs.quantize_4bit)
_dequantize_4bit = bound(hookspecs.dequantize_4bit)
_quantize_int8_rowwise = bound(hookspecs.quantize_int8_rowwise)


def quantize_blockwise(A: Tensor, code: Tensor | None = None, *, blocksize: int = 256) -> tuple[Tensor, Tensor]:
    """Quantize flat blocks of ``A`` to the nearest entries of a code book.

    Args:
        A: float32, bfloat16 or float16, any shape and strides.
        code: float32 [2…256], sorted ascending, on A's device; by default the signed dynamic map (arXiv 2110.02861).
        blocksize: elements a block, a power of two in 32…4096.

    Returns:
        codes: uint8, A's shape, contiguous.
        absmax: float32 [ceil(numel / blocksize)].

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
    """
    if code is None:
        code = dynamic_map(signed=True, device=A.device)
    spec.check_quantize_blockwise(A, code, blocksize)
    return _quantize_blockwise(A, code, blocksize)


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor | None = None,
    *,
    blocksize: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode what :func:`quantize_blockwise` made: ``code[codes] * absmax`` in float32, rounded once to ``dtype``.

    Args:
        codes: uint8, any shape and strides; an index beyond the code book is the caller's fault and undefined.
        absmax: float32 [ceil(numel / blocksize)].
        code: float32 [2…256]; by default the signed dynamic map.
        blocksize: elements a block, a power of two in 32…4096.
        dtype: float32, bfloat16 or float16.

    Returns:
        Tensor of codes' shape and ``dtype``, contiguous.
    """
    if code is None:
        code = dynamic_map(signed=True, device=codes.device)
    spec.check_dequantize_blockwise(codes, absmax, code, blocksize, dtype)
    return _dequantize_blockwise(codes, absmax, code, blocksize, dtype)


def quantize_4bit(A: Tensor, *, blocksize: int = 64, quant_type: FourBitType = "nf4") -> tuple[Tensor, Tensor]:
    """Quantize flat blocks of ``A`` to a 4-bit format, two codes a byte.

    Byte i is ``code[2i] << 4 | code[2i+1]``: the first element in the high nibble. An odd count is padded with the code of 0.

    Args:
        A: float32, bfloat16 or float16, any shape and strides.
        blocksize: elements a block: 32 for "mxfp4", 16 for "nvfp4", for the others a power of two in 32…4096.
        quant_type: "nf4" (arXiv 2305.14314), "fp4" (bitsandbytes' FP4), "int4", "mxfp4" (blocks of 32) or "nvfp4" (blocks of 16). Where a
            book has two zeros, code 8 is never made.

    Returns:
        packed: uint8 [ceil(numel / 2)].
        absmax: float32 [ceil(numel / blocksize)].
    """
    spec.check_quantize_4bit(A, blocksize, quant_type)
    return _quantize_4bit(A, blocksize, quant_type)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    blocksize: int = 64,
    quant_type: FourBitType = "nf4",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode what :func:`quantize_4bit` made: ``book[code] * absmax`` in float32, rounded once to ``dtype``.

    Args:
        packed: uint8, ceil(numel / 2) elements in any shape, read flat.
        absmax: float32 [ceil(numel / blocksize)].
        shape: shape of the result.
        blocksize: elements a block, as the type has it.
        quant_type: as in :func:`quantize_4bit`.
        dtype: float32, bfloat16 or float16.

    Returns:
        Tensor of ``shape`` and ``dtype``, contiguous.
    """
    spec.check_dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)
    return _dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)


def quantize_int8_rowwise(A_TK: Tensor, *, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows to int8, one scale a row, with LLM.int8()'s outlier columns set aside (arXiv 2208.07339).

    A column is an outlier if any ``|x| >= threshold`` in it. An element at or above the threshold doesn't count towards its row's
    absmax; outlier columns are zero in the codes. In float32, each step rounded: ``q = round_half_even(x * (127 / absmax))``, or
    ``round_half_even(x / absmax * 127)`` where 127 / absmax overflows, clamped to ±127; ``x ≈ q * absmax / 127``. A row whose absmax is
    zero has all codes 0, and so has one whose absmax is not finite (NaN if any counted element is NaN, else infinity): it decodes to NaN.

    Args:
        A_TK: float32, bfloat16 or float16 [..., K], any strides.
        threshold: 0 for no outliers, or positive (Hugging Face's default is 6.0).

    Returns:
        q: int8 [..., K], contiguous.
        absmax: float32 [...], the row scales.
        outliers: bool [K], True at outlier columns. A mask and not indices, so that its shape depends on no value and the op can be
            compiled and captured.
    """
    spec.check_quantize_int8_rowwise(A_TK, threshold)
    return _quantize_int8_rowwise(A_TK, threshold)
