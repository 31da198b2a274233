"""Bad arguments: an error before any work, that names op, argument, what came and what was expected; the same traced as run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from q_core import bound, ops
from q_core.samples.make import Make
from q_core.specs import RECORDS, record_of
from q_core.testing.agreement import map_call
from q_core.testing.calls import bad_calls

E = torch.empty
META = E(3, device="meta")

BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("quantize_blockwise", {"A": E(4, dtype=torch.int32)}, TypeError, r"quantize_blockwise: A has dtype int32, expected float32"),
    ("quantize_blockwise", {"blocksize": 48}, ValueError, r"blocksize is 48, expected a power of two in 32…4096"),
    ("quantize_blockwise", {"code": E(1)}, ValueError, r"code has shape \[1\], expected \[2…256\]"),
    ("quantize_blockwise", {"code": META}, ValueError, r"A on cpu, code on meta; expected all on one device"),
    ("quantize_blockwise", {"A": None}, TypeError, r"A is NoneType, expected a torch.Tensor"),
    ("dequantize_blockwise", {"codes": E(4, 64)}, TypeError, r"codes has dtype float32, expected uint8; quantize with"),
    ("dequantize_blockwise", {"absmax": E(9)}, ValueError, r"absmax has shape \[9\], expected \[4\] for 256 elements"),
    ("dequantize_blockwise", {"dtype": torch.int8}, ValueError, r"dtype is torch.int8"),
    ("quantize_4bit", {"quant_type": "int3"}, ValueError, r"quant_type is 'int3', expected one of 'nf4', 'fp4', 'int4'"),
    ("dequantize_4bit", {"shape": [5, 64]}, ValueError, r"packed has shape \[128\], expected 160 bytes for 320 elements"),
    ("quantize_int8_rowwise", {"threshold": -1.0}, ValueError, r"threshold is -1.0"),
    ("quantize_int8_rowwise", {"threshold": float("nan")}, ValueError, r"threshold is nan"),
    ("quantize_int8_rowwise", {"A_TK": E(())}, ValueError, r"A_TK has shape \[\], expected \[..., K\]"),
    ("gemm", {"w_NK": E(32, 64, dtype=torch.float16)}, TypeError, r"w_NK has dtype float16, expected x_TK's float32; cast it"),
    ("gemm", {"x_TK": E(1, 63)}, ValueError, r"gemm: x_TK has shape \[1, 63\], expected \[..., 64\]"),
    ("gemm_4bit", {"x_TK": E(1, 63)}, ValueError, r"gemm_4bit: x_TK has shape \[1, 63\]"),
    ("gemm_4bit", {"shape": [2048]}, ValueError, r"shape is \(2048,\), expected \(N, K\)"),
    ("gemm_4bit", {"bias": E(3)}, ValueError, r"bias has shape \[3\], expected \[32\]"),
    ("gemm_4bit", {"absmax": E(32, dtype=torch.uint8)}, TypeError, r"absmax has dtype uint8, expected float32"),
    ("int8_gemm", {"b_NK": E(32, 64, dtype=torch.float16)}, TypeError,
     r"int8_gemm: b_NK has dtype float16, expected int8; quantize it with quantize_int8_rowwise first"),
    ("int8_gemm", {"a_scale": E(2)}, ValueError, r"a_scale has shape \[2\], expected \[1\], one a row of a_TK"),
    ("int8_gemm", {"a_TK": E(1, 140_000, dtype=torch.int8), "b_NK": E(32, 140_000, dtype=torch.int8)}, ValueError, "int32 sums are exact"),
    ("gemm_int8_weight", {"w_scale": E(31)}, ValueError, r"w_scale has shape \[31\], expected \[32\]"),
    ("gemm_4bit", {"activations": "int4"}, ValueError, r"activations is 'int4', expected one of 'native', 'int8'"),
    ("prepack_weight", {"format": "int9"}, ValueError, r"prepack_weight: format is 'int9', expected one of 'dense', 'int8'"),
    ("unpack_weight", {"tensors": []}, ValueError, r"unpack_weight: tensors has 0 tensors, expected 1 for a weight held as 'dense'"),
    ("optimizer_step_8bit", {"name": "adamx"}, ValueError, r"name is 'adamx', expected one of 'adam', 'adamw'"),
    ("optimizer_step_8bit", {"code2": E(16)}, ValueError, r"code2 has shape \[16\], expected \[256\]"),
    ("optimizer_step_8bit", {"lr": -1.0}, ValueError, r"lr is -1.0"),
    ("optimizer_step_8bit", {"beta2": 1.0}, ValueError, r"beta2 is 1.0"),
    ("optimizer_step_8bit", {"step": 0}, ValueError, r"step is 0"),
    ("optimizer_step_8bit", {"grads": []}, ValueError, r"grads has 0 tensors, expected 5"),
    ("optimizer_step_32bit", {"state1": [E(300), E(16, 33), E(2), E(256, 2), E(0, 5)]}, ValueError, r"state1\[2\] has shape \[2\]"),
    ("optimizer_step_32bit", {"params": [E(600)[::2], E(16, 33), E(1), E(256, 2), E(0, 5)]}, ValueError, r"params\[0\] is not contiguous"),
    ("write_kv", {"slot_mapping": E(5, dtype=torch.int32)}, TypeError, r"slot_mapping has dtype int32, expected int64"),
    ("write_kv", {"k_TGD": E(5, 3, 16)}, ValueError, r"k_TGD has shape \[5, 3, 16\], expected \[T, 2, 16\]"),
    ("write_kv", {"k_cache_BGSD": E(6, 4, 2, 16).transpose(1, 2)}, ValueError, r"k_cache_BGSD has strides"),
    ("paged_attention", {"q_THD": E(3, 3, 16)}, ValueError, r"H a multiple of the cache's 2 kv heads"),
    ("paged_attention", {"seq_lens": E(3, dtype=torch.int64)}, TypeError, r"seq_lens has dtype int64, expected int32"),
    ("paged_attention", {"query_start": E(3, dtype=torch.int32)}, ValueError, r"query_start has shape \[3\], expected \[4\]"),
    ("paged_attention", {"max_seq_len": 10_000}, ValueError, r"max_seq_len is 10000"),
    ("copy_kv_blocks", {"pairs": E(3, 3, dtype=torch.int64)}, ValueError, r"pairs has shape \[3, 3\], expected \[n, 2\]"),
    ("route_topk", {"k": 9}, ValueError, r"k is 9, expected 1…4"),
    ("route_topk", {"scoring": "tanh"}, ValueError, r"scoring is 'tanh'"),
    ("fused_moe", {"topk_ids": E(5, 2)}, TypeError, r"topk_ids has dtype float32, expected int32"),
    ("fused_moe", {"w13": E(4, 31, 32)}, ValueError, r"w13 has shape \[4, 31, 32\], expected \[4, 32, 32\]"),
    ("rms_norm", {"weight": E(63)}, ValueError, r"rms_norm: weight has shape \[63\], expected \[64\]"),
    ("rms_norm", {"eps": -1.0}, ValueError, r"eps is -1.0"),
    ("add_rms_norm", {"residual": E(4, 63)}, ValueError, r"residual has shape \[4, 63\]"),
    ("rotary_embedding", {"cos": E(32, 9)}, ValueError, r"cos has shape \[32, 9\], expected \[P, F\] with 2F of at most D = 16"),
    ("rotary_embedding", {"positions": E(5)}, TypeError, r"positions has dtype float32, expected int64"),
    ("silu_and_mul", {"x": E(4, 7)}, ValueError, r"silu_and_mul: x has shape \[4, 7\], expected \[..., 2N\]"),
]  # fmt: skip


def test_every_op_has_a_bad_call() -> None:
    assert {op for op, *_ in BAD} == set(RECORDS)


def bad_call(op: str, change: dict[str, Any]) -> dict[str, Any]:
    return next(record_of(op).samples(Make(), torch.float32)) | change


@pytest.mark.parametrize(("op", "change", "error", "message"), BAD)
def test_public_function(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(ops, op)(**bad_call(op, change))


@pytest.mark.parametrize(("op", "change", "error", "message"), [b for b in BAD if None not in b[1].values()])
def test_the_same_when_traced(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = bad_call(op, change)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return mode.from_tensor(value)
            return [fake(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], torch.Tensor) else value

        arguments = [fake(call[name]) for name in record_of(op).arguments]
        with pytest.raises((error, RuntimeError), match=message if "on meta" not in message else "device"):
            bound(op)(*arguments)


@pytest.mark.parametrize("op", RECORDS)
def test_every_bad_call_is_the_same_when_traced(op: str) -> None:
    """Otherwise a wrong K or mixed devices would pass, and a compiled graph would hand them to a kernel."""
    record = record_of(op)
    wrong = [bad for bad in bad_calls(record) if bad.what != "a number"]  # which the op's schema refuses
    assert wrong
    for bad in wrong:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            call = map_call(mode.from_tensor, bad.call)
            with pytest.raises(type(bad.error)) as raised:
                bound(op)(*(call[name] for name in record.arguments))
        assert str(raised.value) == str(bad.error), f"{bad.argument} is {bad.what}"
