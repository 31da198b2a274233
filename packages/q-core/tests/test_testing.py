"""The tools of the suite can fail: a small fault in any op's result is seen, and calls touch the corners that they are there for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from q_core import bound
from q_core.samples.make import Make
from q_core.specs import RECORDS, record_of
from q_core.testing import disagreements
from q_core.testing.agreement import compare, copy_call, same_bits, tensors_of
from q_core.testing.calls import LAYOUTS, LargeMake, bad_calls, laid_out, sample_calls


def _faulty(value: Any) -> Any:
    """One element of the last tensor that has any is off."""
    for tensor in [tensor for tensor in tensors_of(value) if tensor.numel()][-1:]:
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


def corners(call: Mapping[str, Any]) -> set[str]:
    tensors = tensors_of(dict(call))
    seen = {
        "zero-size": any(not t.numel() for t in tensors),
        "odd": any(size % 2 and size > 1 for t in tensors for size in t.shape),
        "strided": any(not t.is_contiguous() for t in tensors),
        "misaligned": any(t.storage_offset() * t.element_size() % 16 for t in tensors),
        "expanded": any(t.numel() and t.stride(0) == 0 and t.shape[0] > 1 for t in tensors if t.dim() > 1),
        "partial block": any(t.numel() % call.get("blocksize", 1) for t in tensors),
    }
    return {corner for corner, touched in seen.items() if touched}


@pytest.mark.parametrize("op", RECORDS)
def test_the_corners_are_touched(op: str) -> None:
    """By the table of samples in each layout alone, before anything is drawn."""
    record = record_of(op)
    calls = sample_calls(record, torch.float32)
    laid = [laid_out(record, call, dict.fromkeys(tensor_names(call), layout)) for call in calls[:2] for layout in LAYOUTS[1:]]
    expected = {"zero-size", "odd", "strided", "misaligned"}
    if "blocksize" in record.arguments:
        expected.add("partial block")
    # Weights, codes and caches are not expanded: a broadcast one would be another, smaller weight.
    if any(t.dim() > 1 and t.is_floating_point() and t.shape[0] > 1 for t in tensors_of(calls[0]) + tensors_of(calls[1])) and not (
        record.mutates and op != "write_kv"
    ):
        expected.add("expanded")
    assert expected <= set().union(*(corners(call) for call in (*calls, *laid)))


def tensor_names(call: Mapping[str, Any]) -> list[str]:
    return [name for name, value in call.items() if tensors_of(value)]


@pytest.mark.parametrize("op", RECORDS)
def test_every_argument_can_be_wrong(op: str) -> None:
    """Each tensor by its dtype and by being none; each setting that not every value is right for, by its value."""
    record = record_of(op)
    wrong = {(bad.argument, bad.what) for bad in bad_calls(record)}
    call = sample_calls(record, torch.float32)[0]
    for name in tensor_names(call):
        assert {(name, "a complex tensor"), (name, "a number")} <= wrong
        if len(tensor_names(call)) > 1 and op != "copy_kv_blocks":  # whose caches may be on two devices
            assert (name, "on another device") in wrong
    settings = {name for name, value in call.items() if isinstance(value, (str, int, float, torch.dtype)) and value is not True}
    free = {"layout", "scale"} | ({"blocksize"} if call.get("format") == "dense" else set())
    assert {name for name in settings - free if call[name] is not False} <= {argument for argument, _ in wrong}


def test_a_tensor_that_is_two_arguments_stays_one() -> None:
    cache = torch.zeros(3, 4)
    call = copy_call({"src": cache, "dst": cache, "pairs": torch.zeros(1, 2)})
    assert call["src"] is call["dst"] is not cache


def test_bits_are_compared_with_their_kind() -> None:
    nan, one = torch.tensor([float("nan")]), torch.ones(2)
    assert same_bits([nan, one], (nan.clone(), one)) and same_bits({"a": one}, [one])
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(one, one.double()) and not same_bits(one, one[None]) and not same_bits(one, 2 * one)


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
