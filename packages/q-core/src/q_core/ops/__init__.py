"""The ops of the surface, as functions.

Each validates its arguments, then calls the torch op ``q::<name>``, which the dispatcher takes to the backend that serves it.
Code above the backends calls these, or, on a hot path where the arguments are known to be right, :func:`q_core.dispatch.bound`.
"""

from q_core.ops.attention import copy_kv_blocks, paged_attention, write_kv
from q_core.ops.gemm import gemm, gemm_4bit, gemm_int8_weight, int8_gemm, prepack_weight, unpack_weight
from q_core.ops.moe import fused_moe, route_topk
from q_core.ops.norm import add_rms_norm, rms_norm, rotary_embedding, silu_and_mul
from q_core.ops.optim import optimizer_step_8bit, optimizer_step_32bit
from q_core.ops.quantize import (
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
    quantize_int8_rowwise,
)

__all__ = [
    "add_rms_norm",
    "copy_kv_blocks",
    "dequantize_4bit",
    "dequantize_blockwise",
    "fused_moe",
    "gemm",
    "gemm_4bit",
    "gemm_int8_weight",
    "int8_gemm",
    "optimizer_step_8bit",
    "optimizer_step_32bit",
    "paged_attention",
    "prepack_weight",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_int8_rowwise",
    "rms_norm",
    "rotary_embedding",
    "route_topk",
    "silu_and_mul",
    "unpack_weight",
    "write_kv",
]
