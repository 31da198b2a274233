"""Quantization beside bitsandbytes, held against copying what is read and written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Target, Work
from benchmarks.gpu_cases.sizes import BITSANDBYTES, Sizes, agrees, equals
from benchmarks.gpu_clock import sets_for
from q_core import ops
from q_core.formats.codebooks import dynamic_map
from q_core.reference import quantize as reference

GATE, STRETCH = Target(fraction=0.80), Target(fraction=0.90)
FOUR_BIT = (("nf4", 64), ("fp4", 64), ("int4", 64), ("mxfp4", 32), ("nvfp4", 16))
CHECKED = 256
"""Rows whose codes are compared with the reference's."""


def cases(sizes: Sizes) -> Iterator[Case]:
    count = sets_for(2 * sizes.rows * sizes.width)
    x = [sizes.normal(sizes.rows, sizes.width) for _ in range(count)]
    some = x[0][:CHECKED]
    yield from _blockwise(sizes, x, some)
    for quant_type, blocksize in FOUR_BIT:
        yield from _four_bit(sizes, x, some, quant_type, blocksize)
    half = [each.half() for each in x] if BITSANDBYTES else []  # what its kernel takes
    yield Case(
        "quantize_int8_rowwise", _shape(sizes), "bfloat16", lambda i: ops.quantize_int8_rowwise(x[i]),
        {"bitsandbytes": lambda i: BITSANDBYTES.functional.int8_vectorwise_quant(half[i])} if BITSANDBYTES else {},
        sets=count, work=Work("copy", 3 * x[0].numel() + 4 * sizes.rows),
        check=equals(
            lambda: ops.quantize_int8_rowwise(some)[:2], lambda: reference.quantize_int8_rowwise(some.cpu(), 0.0)[:2]
        ),
    )  # fmt: skip


def _shape(sizes: Sizes) -> str:
    return f"{sizes.rows} × {sizes.width}"


def _blockwise(sizes: Sizes, x: list[Tensor], some: Tensor) -> Iterator[Case]:
    blocksize, numel = 256, x[0].numel()
    code = dynamic_map(signed=True, device=sizes.device)
    work = Work("copy", 3 * numel + 4 * numel // blocksize)
    made = [ops.quantize_blockwise(each) for each in x]
    peers: list[dict[str, Call]] = [{}, {}]
    if BITSANDBYTES:
        functional = BITSANDBYTES.functional
        theirs = [functional.quantize_blockwise(each, blocksize=blocksize) for each in x]
        peers[0]["bitsandbytes"] = lambda i: functional.quantize_blockwise(x[i], blocksize=blocksize)
        peers[1]["bitsandbytes"] = lambda i: functional.dequantize_blockwise(*theirs[i])
    yield Case(
        "quantize_blockwise", f"{_shape(sizes)}, block {blocksize}", "bfloat16", lambda i: ops.quantize_blockwise(x[i]), peers[0],
        sets=len(x), target=GATE, stretch=STRETCH, work=work,
        check=equals(
            lambda: ops.quantize_blockwise(some), lambda: reference.quantize_blockwise(some.cpu(), code.cpu(), blocksize)
        ),
    )  # fmt: skip

    def ours(i: int) -> Tensor:
        return ops.dequantize_blockwise(*made[i], code, blocksize=blocksize, dtype=torch.bfloat16)

    yield Case(
        "dequantize_blockwise", f"{_shape(sizes)}, block {blocksize}", "bfloat16", ours, peers[1],
        sets=len(x), target=GATE, stretch=STRETCH, work=work,
        check=agrees(
            lambda: ours(0),
            lambda: reference.dequantize_blockwise(*made[0], code, blocksize, torch.float32),
            torch.bfloat16,
        ),
    )  # fmt: skip


def _four_bit(sizes: Sizes, x: list[Tensor], some: Tensor, quant_type: Any, blocksize: int) -> Iterator[Case]:
    numel = x[0].numel()
    settings = {"blocksize": blocksize, "quant_type": quant_type}
    work = Work("copy", 2 * numel + numel // 2 + 4 * numel // blocksize)
    made = [ops.quantize_4bit(each, **settings) for each in x]
    peers: list[dict[str, Call]] = [{}, {}]
    if BITSANDBYTES and quant_type in ("nf4", "fp4"):
        functional = BITSANDBYTES.functional
        theirs = [functional.quantize_4bit(each, **settings) for each in x]
        peers[0]["bitsandbytes"] = lambda i: functional.quantize_4bit(x[i], **settings)
        peers[1]["bitsandbytes"] = lambda i: functional.dequantize_4bit(*theirs[i])
    yield Case(
        f"quantize_4bit [{quant_type}]", f"{_shape(sizes)}, block {blocksize}", "bfloat16",
        lambda i: ops.quantize_4bit(x[i], **settings), peers[0],
        sets=len(x), target=GATE, stretch=STRETCH, work=work,
        check=equals(lambda: ops.quantize_4bit(some, **settings), lambda: reference.quantize_4bit(some.cpu(), blocksize, quant_type)),
    )  # fmt: skip

    def ours(i: int) -> Tensor:
        return ops.dequantize_4bit(*made[i], shape=x[i].shape, **settings, dtype=torch.bfloat16)

    yield Case(
        f"dequantize_4bit [{quant_type}]", f"{_shape(sizes)}, block {blocksize}", "bfloat16", ours, peers[1],
        sets=len(x), target=GATE, stretch=STRETCH, work=work,
        check=agrees(
            lambda: ours(0),
            lambda: reference.dequantize_4bit(*made[0], blocksize, quant_type, x[0].shape, torch.float32),
            torch.bfloat16,
        ),
    )  # fmt: skip
