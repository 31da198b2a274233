"""The comparison itself can fail: a small fault in any op's result is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from q_core import bound
from q_core.samples.make import Make
from q_core.specs import RECORDS, record_of
from q_core.testing import disagreements
from q_core.testing.agreement import compare, copy_call, tensors_of
from q_core.testing.calls import LargeMake, laid_out


def _faulty(value: Any) -> Any:
    """One element of the last tensor is off."""
    tensor: Tensor = value[-1] if isinstance(value, (list, tuple)) else value
    if tensor.numel():
        flat = (tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor).view(-1)
        if tensor.dtype is torch.bool:
            flat[-1] = ~flat[-1]
        elif flat.is_floating_point():
            flat[-1] = flat[-1] * 1.05 + 0.05
        else:
            flat[-1] += 3
    return value


@pytest.mark.parametrize("op", RECORDS)
def test_a_fault_is_seen(op: str) -> None:
    record = record_of(op)
    function = bound(op)

    def faulty(*arguments: Any) -> Any:
        result = function(*arguments)
        if record.mutates:
            _faulty(arguments[record.arguments.index(record.mutates[0])])
            return None
        return _faulty(result)

    found = list(disagreements(op, faulty, torch.float32))
    assert found and found[0].op == op and ("misses" in str(found[0]) or "differs" in str(found[0]))


@pytest.mark.parametrize("op", RECORDS)
def test_every_op_has_calls_of_drawn_sizes(op: str) -> None:
    """A sample generator that ignores ``Make.cases`` would leave conformance with the sizes of its own table."""
    record = record_of(op)
    tables, drawn = (
        [[tensor.shape for value in call.values() for tensor in tensors_of(value)] for call in record.samples(make, torch.float32)]
        for make in (Make(), LargeMake())
    )
    assert drawn and not all(shapes in tables for shapes in drawn)
    for call in record.samples(LargeMake(), torch.float32):
        record.check(**call)
        assert record.check(**laid_out(record, call, dict.fromkeys(call, "strided"))) is None


def test_layouts_keep_values_and_stay_within_the_contract() -> None:
    record = record_of("gemm")
    call = next(record.samples(Make(), torch.float32))
    for layout in ("plain", "offset", "strided", "transposed"):
        made = laid_out(record, call, {"x_TK": layout, "w_NK": layout})
        assert torch.equal(made["w_NK"], call["w_NK"])
        assert made["w_NK"].is_contiguous() == (layout in ("plain", "offset"))
        copied = copy_call(made)["w_NK"]
        assert copied.stride() == made["w_NK"].stride() and copied.storage_offset() == made["w_NK"].storage_offset()
        assert copied.data_ptr() != made["w_NK"].data_ptr() and torch.equal(copied, made["w_NK"])
    caches = ("k_cache_BGSD", "v_cache_BGSD")
    record = record_of("write_kv")
    made = laid_out(record, next(record.samples(Make(), torch.float32)), dict.fromkeys(caches, "strided"))
    assert all(made[name].is_contiguous() and made[name].storage_offset() for name in caches), (
        "the contract asks for contiguous caches"
    )


def test_a_result_is_compared_by_its_kind() -> None:
    one, nan, inf = torch.tensor([1.0]), torch.tensor([float("nan")]), torch.tensor([float("inf")])
    bound_of_one = torch.tensor([0.1])
    assert compare(one + 0.05, one.double(), bound_of_one) is None
    assert "misses" in (compare(one + 0.2, one.double(), bound_of_one) or "")
    assert "misses" in (compare(nan, one.double(), bound_of_one) or "")
    assert "is finite" in (compare(one, nan.double(), bound_of_one) or "") and "is finite" in (
        compare(one, inf.double(), bound_of_one) or ""
    )
    assert compare(one, one.double(), nan) is None and "misses" in (compare(inf, one.double(), nan) or "")
    assert compare(inf.half(), torch.tensor([1e6], dtype=torch.float64), bound_of_one) is None, "it is beyond float16"
    assert compare(nan, nan, None) is None and "differs" in (compare(one, nan, None) or "")
    assert "dtype" in (compare(one.half(), one, None) or "") and "shape" in (compare(one[None], one, None) or "")
