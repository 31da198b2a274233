"""The surface hangs together: every hook has all that it should have, and its signature doesn't change unnoticed."""

from __future__ import annotations

import inspect
import typing

import pluggy
import pytest
import torch

from q_core import hookspecs, ops
from q_core.backend import SURFACE_VERSION
from q_core.samples.make import Make
from q_core.specs import RECORDS, record_of
from q_core.testing.agreement import reference_function

SCHEMAS = {
    "quantize_blockwise": "(Tensor A, Tensor code, SymInt blocksize) -> (Tensor, Tensor)",
    "dequantize_blockwise": "(Tensor codes, Tensor absmax, Tensor code, SymInt blocksize, ScalarType dtype) -> Tensor",
    "quantize_4bit": "(Tensor A, SymInt blocksize, str quant_type) -> (Tensor, Tensor)",
    "dequantize_4bit": "(Tensor packed, Tensor absmax, SymInt blocksize, str quant_type, SymInt[] shape, ScalarType dtype) -> Tensor",
    "quantize_int8_rowwise": "(Tensor A_TK, float threshold) -> (Tensor, Tensor, Tensor)",
    "gemm": "(Tensor x_TK, Tensor w_NK, Tensor? bias, str layout) -> Tensor",
    "gemm_4bit": "(Tensor x_TK, Tensor packed, Tensor absmax, SymInt blocksize, str quant_type, SymInt[] shape, Tensor? bias, "
    "str activations, str layout) -> Tensor",
    "int8_gemm": "(Tensor a_TK, Tensor b_NK, Tensor a_scale, Tensor b_scale, Tensor? bias, ScalarType dtype, str layout) -> Tensor",
    "gemm_int8_weight": "(Tensor x_TK, Tensor w_NK, Tensor w_scale, Tensor? bias, str layout) -> Tensor",
    "prepack_weight": "(str format, Tensor[] tensors, SymInt[] shape, SymInt blocksize, str layout) -> Tensor[]",
    "unpack_weight": "(str format, Tensor[] tensors, SymInt[] shape, SymInt blocksize, str layout) -> Tensor[]",
    "optimizer_step_8bit": "(str name, Tensor(a1!)[] params, Tensor[] grads, Tensor(a3!)[] state1, Tensor(a4!)[] state2, "
    "Tensor(a5!)[] state3, Tensor(a6!)[] absmax1, Tensor(a7!)[] absmax2, Tensor(a8!)[] absmax3, Tensor code1, Tensor code2, float lr, "
    "float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, float dampening, bool nesterov, "
    "float trust_coefficient, SymInt step, SymInt blocksize) -> ()",
    "optimizer_step_32bit": "(str name, Tensor(a1!)[] params, Tensor[] grads, Tensor(a3!)[] state1, Tensor(a4!)[] state2, "
    "Tensor(a5!)[] state3, float lr, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, "
    "float dampening, bool nesterov, float trust_coefficient, SymInt step) -> ()",
    "write_kv": "(Tensor k_TGD, Tensor v_TGD, Tensor(a2!) k_cache_BGSD, Tensor(a3!) v_cache_BGSD, Tensor slot_mapping, "
    "Tensor(a5!)? k_scale_BGS, Tensor(a6!)? v_scale_BGS) -> ()",
    "paged_attention": "(Tensor q_THD, Tensor k_cache_BGSD, Tensor v_cache_BGSD, Tensor block_tables, Tensor query_start, "
    "Tensor seq_lens, SymInt max_query_len, SymInt max_seq_len, float scale, bool causal, SymInt? window, float? softcap, "
    "Tensor? sinks_H, Tensor? k_scale_BGS, Tensor? v_scale_BGS) -> Tensor",
    "copy_kv_blocks": "(Tensor src, Tensor(a1!) dst, Tensor pairs) -> ()",
    "route_topk": "(Tensor logits_TE, SymInt k, bool renormalize, str scoring) -> (Tensor, Tensor)",
    "fused_moe": "(Tensor x_TK, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, str format, SymInt intermediate_size, "
    "Tensor? w13_scale, Tensor? w2_scale, SymInt blocksize) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rotary_embedding": "(Tensor q_THD, Tensor k_TGD, Tensor positions, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    "silu_and_mul": "(Tensor x) -> Tensor",
}
"""Surface version 1. A change here is a change of the surface: bump SURFACE_VERSION and say so in the changelog."""


def hooks() -> set[str]:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    return {name for name in dir(hookspecs) if manager.parse_hookspec_opts(hookspecs, name) is not None}


def test_version_1_is_frozen() -> None:
    assert SURFACE_VERSION == 1
    defined = {name: str(getattr(torch.ops.q, name).default._schema) for name in RECORDS}
    assert defined == {name: f"q::{name}{schema}" for name, schema in SCHEMAS.items()}


def test_every_hook_has_a_record_and_the_other_way_round() -> None:
    assert hooks() == set(RECORDS) == set(ops.__all__)


@pytest.mark.parametrize("op", RECORDS)
def test_hook(op: str) -> None:
    record = record_of(op)
    parameters = inspect.signature(record.hook).parameters
    assert all(p.default is p.empty for p in parameters.values()), "defaults belong to the public function"
    assert record.summary.count("\n") == 0 and record.summary.endswith("."), "one line a hook"
    assert set(record.neutral) <= set(parameters) and set(record.mutates) <= set(parameters)
    assert set(record.autocast) <= set(parameters)


@pytest.mark.parametrize("op", RECORDS)
def test_reference_check_and_fake_take_the_hooks_arguments(op: str) -> None:
    record = record_of(op)
    for function in (reference_function(record), record.check, record.fake):
        assert tuple(inspect.signature(function).parameters) == record.arguments


@pytest.mark.parametrize("op", RECORDS)
def test_public_function(op: str) -> None:
    record = record_of(op)
    function = getattr(ops, op)
    signature = inspect.signature(function)
    assert set(signature.parameters) == set(record.arguments)
    documentation = inspect.getdoc(function) or ""
    sections = ["Args:", *([] if record.mutates else ["Returns:"])]
    assert all(section in documentation for section in sections)
    for argument in record.arguments:
        assert argument in documentation, f"{argument} is not documented"
    hints = typing.get_type_hints(record.hook)
    keyword_only = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    floats_and_ints = {name for name, hint in hints.items() if hint in (float, int, bool) and name != "return"}
    assert floats_and_ints <= keyword_only, "settings are keyword-only after the tensors"


@pytest.mark.parametrize("op", RECORDS)
def test_samples_pass_their_own_check(op: str) -> None:
    record = record_of(op)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        calls = list(record.samples(Make(), dtype))
        assert calls
        for call in calls:
            assert set(call) == set(record.arguments)
            record.check(**call)


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"unknown op 'gemm_3bit', expected one of: .*gemm_4bit"):
        record_of("gemm_3bit")
