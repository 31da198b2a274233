"""Calls of every op: the corner cases of its record, and the same at the sizes of a model's layers.

The record's sample generator says how a call hangs together; sizes are asked of its :class:`~q_core.samples.make.Make`, so one with other
answers gives the calls of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from q_core.record import OpRecord
from q_core.samples.attention import Batch
from q_core.samples.make import Case, Make
from q_core.samples.moe import Layer
from q_core.specs import RECORDS
from q_core.testing.agreement import Outputs, map_call, run
from q_core.testing.calls import Call, sample_calls

K, N, TOKENS = 4096, 14336, 512

MATRICES = ((TOKENS, K), (3, K + 5))
PRODUCTS = tuple(((T,), 4096, K) for T in (1, 4, 16, TOKENS, 1, TOKENS))
PARAMETERS = (((1024, K), (K,), (33, 7)),)
HEADS = {"H": 32, "G": 8, "D": 128, "S": 16}
BATCHES = (
    Batch((1,) * 6, (1, 15, 700, 4096, 4097, 9000), **HEADS),
    Batch((256, 1, 37), (1024, 900, 37), **HEADS),
)
CACHES = ((90, 8, 128, 16), (TOKENS, 8, 128, 128))
LAYERS = (Layer(1, 8, 2, 2048, 4096), Layer(64, 32, 4, 1024, 768))

SIZES: Mapping[str, Iterable[Any]] = {
    "quantize_blockwise": MATRICES,
    "dequantize_blockwise": MATRICES,
    "quantize_4bit": MATRICES,
    "dequantize_4bit": MATRICES,
    "quantize_int8_rowwise": MATRICES,
    "gemm": PRODUCTS,
    "gemm_4bit": PRODUCTS,
    "int8_gemm": PRODUCTS,
    "gemm_int8_weight": PRODUCTS,
    "prepack_weight": ((64, K),),
    "unpack_weight": ((64, K),),
    "optimizer_step_8bit": PARAMETERS,
    "optimizer_step_32bit": PARAMETERS,
    "write_kv": CACHES,
    "paged_attention": BATCHES,
    "copy_kv_blocks": ((200, 8, 128, 16),),
    "route_topk": LAYERS,
    "fused_moe": LAYERS,
    "rms_norm": MATRICES,
    "add_rms_norm": MATRICES,
    "rotary_embedding": ((TOKENS, 32, 8, 128, 64),),
    "silu_and_mul": ((TOKENS, 2 * N),),
}
"""What each op's generator asks :meth:`Make.cases` for."""

assert SIZES.keys() == RECORDS.keys()


class _Sized(Make):
    """A :class:`Make` that answers with sizes which were given to it."""

    def __init__(self, sizes: Iterable[Any]) -> None:
        super().__init__()
        self._sizes = sizes

    def cases(self, table: Iterable[Case], draw: Callable[[Make], Case]) -> Iterable[Case]:
        return self._sizes


def model_calls(record: OpRecord, device: torch.device) -> Iterable[Call]:
    """Calls at a model's sizes in bfloat16, made one by one."""
    for call in record.samples(_Sized(SIZES[record.name]), torch.bfloat16):
        yield Call(map_call(lambda tensor: tensor.to(device), call))


def corner_calls(record: OpRecord, device: torch.device) -> list[Call]:
    """The record's own samples in bfloat16."""
    return sample_calls(record, torch.bfloat16, str(device))


def run_public(record: OpRecord, call: Mapping[str, Any]) -> Outputs:
    """Outputs by name of the public function on this very call: what it returns, or what it mutated."""
    return run(record, lambda *values: record.public(**dict(zip(record.arguments, values, strict=True))), dict(call))


_IN_THEIR_PLACE = {"code", "code1", "code2", "block_tables", "query_start"}
"""Sorted, or of one piece with other arguments."""


def altered(call: Mapping[str, Any]) -> Call:
    """The same call on other values, as valid: rows take each other's places."""

    def roll(tensor: Tensor) -> Tensor:
        if not tensor.dim() or not tensor.numel():
            return tensor.clone()
        plain = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        return plain.roll(1, 0).view(tensor.dtype)

    moved = map_call(roll, call)
    kept = map_call(Tensor.clone, {name: value for name, value in call.items() if name in _IN_THEIR_PLACE | {"seq_lens"}})
    if "seq_lens" in call:  # each a token less, where that leaves as many as there are queries
        kept["seq_lens"] = torch.maximum(call["seq_lens"] - 1, call["query_start"].diff()).clamp_min(1)
    return Call(moved | kept)
