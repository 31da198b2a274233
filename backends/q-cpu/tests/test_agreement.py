"""Agreement with q-core's reference over the samples of its op records, through q-core's dispatch."""

from __future__ import annotations

import pytest
import torch

from q_core import bound, use_backends
from q_core.testing.agreement import disagreements

pytestmark = pytest.mark.usefixtures("isa")

OPS = (
    "quantize_blockwise",
    "dequantize_blockwise",
    "quantize_4bit",
    "dequantize_4bit",
    "quantize_int8_rowwise",
    "gemm",
    "gemm_4bit",
    "int8_gemm",
    "gemm_int8_weight",
    "optimizer_step_8bit",
    "optimizer_step_32bit",
    "write_kv",
    "paged_attention",
    "copy_kv_blocks",
    "rms_norm",
    "add_rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "route_topk",
    "fused_moe",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_agrees_with_the_reference(op, dtype):
    with use_backends("q_cpu", "reference"):
        assert list(map(str, disagreements(op, bound(op), dtype))) == []
