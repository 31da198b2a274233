"""The surface hangs together: every hook has all that it should have, and its signature doesn't change unnoticed."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import pluggy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import hookspecs, ops
from q_core.backend import SURFACE_VERSION
from q_core.operand import Operand
from q_core.record import OpRecord
from q_core.samples.make import Make
from q_core.specs import RECORDS, record_of
from q_core.specs.check import FLOATS, short
from q_core.testing.agreement import tensors_of
from q_core.testing.calls import calls as drawn_calls
from q_core.testing.operands import departure

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
    "Tensor(a5!)[] state3, Tensor(a6!)[] absmax1, Tensor(a7!)[] absmax2, Tensor(a8!)[] absmax3, Tensor(a9!)[] skipped, "
    "Tensor code1, Tensor code2, float lr, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, "
    "float dampening, bool nesterov, "
    "float trust_coefficient, SymInt step, SymInt blocksize) -> ()",
    "optimizer_step_32bit": "(str name, Tensor(a1!)[] params, Tensor[] grads, Tensor(a3!)[] state1, Tensor(a4!)[] state2, "
    "Tensor(a5!)[] state3, Tensor(a6!)[] skipped, float lr, float beta1, float beta2, float beta3, float alpha, float eps, "
    "float weight_decay, "
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
    for function in (record.reference, record.check, record.fake):
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


DTYPES = (*FLOATS, torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


def sample_calls(record: OpRecord) -> Iterator[dict[str, Any]]:
    return (call for dtype in FLOATS for call in record.samples(Make(), dtype))


@pytest.mark.parametrize("op", RECORDS)
def test_every_tensor_is_declared_and_nothing_else(op: str) -> None:
    record = record_of(op)
    assert set(record.operands) == set(record.tensors)
    assert set(record.sizes) <= set(record.arguments) - set(record.tensors)
    returned = typing.get_type_hints(record.hook)["return"]
    count = 0 if returned is type(None) else len(typing.get_args(returned)) if typing.get_origin(returned) is tuple else 1
    assert len(record.outputs) == count
    named = {
        dtype for row in (*record.argument_rows(), *record.result_rows()) for dtype in row.operand.dtypes if isinstance(dtype, str)
    }
    assert named <= set(record.arguments)


@pytest.mark.parametrize("op", RECORDS)
def test_samples_and_their_results_are_as_declared(op: str) -> None:
    record = record_of(op)
    for call in sample_calls(record):
        results = record.fake(**call)
        assert departure(record, call, results if isinstance(results, tuple) else (results,) if record.outputs else ()) is None


@pytest.mark.parametrize("op", RECORDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_drawn_calls_are_as_declared(op: str, data: st.DataObject) -> None:
    record = record_of(op)
    assert departure(record, data.draw(drawn_calls(record))) is None


@pytest.mark.parametrize("op", RECORDS)
def test_every_declared_dtype_occurs_in_a_sample(op: str) -> None:
    record = record_of(op)
    calls = list(sample_calls(record))
    for row in record.argument_rows():
        formats = row.formats.split(", ")
        seen = {t.dtype for call in calls if not row.formats or call["format"] in formats for t in tensors_of(call[row.tensor])}
        assert {dtype for dtype in row.operand.dtypes if isinstance(dtype, torch.dtype)} <= seen, row.tensor


def altered(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The call with one of its tensors in another dtype, or with one of its axes longer."""
    for name, value in call.items():
        for i, tensor in enumerate(tensors_of(value)):
            longer = [[size + (axis == at) for axis, size in enumerate(tensor.shape)] for at in range(tensor.dim())]
            others = [tensor.to(dtype) for dtype in DTYPES if dtype != tensor.dtype] + [tensor.new_zeros(shape) for shape in longer]
            for other in others:
                yield call | {name: [*value[:i], other, *value[i + 1 :]] if isinstance(value, list) else other}


def refuses(record: OpRecord, call: dict[str, Any]) -> bool:
    try:
        record.check(**call)
    except (TypeError, ValueError):
        return True
    return False


@pytest.mark.parametrize("op", RECORDS)
def test_what_is_not_as_declared_is_refused(op: str) -> None:
    record = record_of(op)
    refused = 0
    for call in record.samples(Make(), torch.float32):
        for bad in altered(call):
            if said := departure(record, bad):
                refused += 1
                assert refuses(record, bad), said
    assert refused


def described(record: OpRecord) -> dict[str, str]:
    """What the public function's documentation says of each argument."""
    section = re.split(r"^(?:Args|Returns|Raises):$", record.contract, flags=re.MULTILINE)[1]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def names_axes(text: str, operand: Operand) -> bool:
    """A bracket with the same axes; of a flat operand the count; for any axes the word shape will do."""
    return operand.axes in text if operand.flat else f"[{operand.axes}]" in text or (operand.axes == "..." and "shape" in text)


@pytest.mark.parametrize("op", RECORDS)
def test_the_documentation_names_the_same_dtypes_and_axes(op: str) -> None:
    record = record_of(op)
    texts = described(record)
    for row in record.argument_rows():
        text = texts[row.tensor]
        assert names_axes(text, row.operand), f"{row.tensor}: {row.operand.axes_text} is not in {text!r}"
        assert ("mutated" in text) == row.mutated, row.tensor
        if not any(isinstance(dtype, str) for dtype in row.operand.dtypes):
            assert all(short(dtype) in text for dtype in row.operand.dtypes if isinstance(dtype, torch.dtype)), row.tensor
    for name, axes in record.sizes.items():
        assert axes in texts[name] or (axes == "..." and "shape" in texts[name]), name
    returned = re.split(r"^(?:Args|Returns|Raises):$", record.contract, flags=re.MULTILINE)[2:]
    for row in record.result_rows():
        assert row.formats or names_axes(returned[0], row.operand), f"{row.tensor}: {row.operand.axes_text}"


def test_departures_are_found() -> None:
    record = record_of("gemm_4bit")
    call = next(record.samples(Make(), torch.float32))
    assert departure(record, call) is None
    for change, said in (
        ({"x_TK": torch.zeros(2, 63)}, "where K is declared"),
        ({"absmax": torch.zeros(3)}, r"where ceil(N * K / blocksize) is declared"),
        ({"packed": torch.zeros(9, dtype=torch.int8)}, "packed is torch.int8, declared is uint8"),
        ({"bias": torch.zeros(2, 2)}, "bias has axes [2, 2], declared are [N]"),
    ):
        assert said in (departure(record, call | change) or "")
    assert "where others have" in (departure(record, call, (torch.zeros(3, 4, 32),)) or "")


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"unknown op 'gemm_3bit', expected one of: .*gemm_4bit"):
        record_of("gemm_3bit")
