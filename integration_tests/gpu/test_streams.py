"""Ops run in the stream and on the device that they are called in and with."""

from __future__ import annotations

import pytest
import torch

from gpu.calls import altered, corner_calls, run_public
from q_core.specs import RECORDS
from q_core.testing.agreement import copy_call, map_call, same_bits, tensors_of

pytestmark = pytest.mark.gpu

BUSY = 8192


@pytest.mark.parametrize("op", RECORDS)
def test_an_op_waits_for_its_stream(op: str, accelerator: torch.device) -> None:
    """Inputs are written in a side stream after long work there; an op launched elsewhere would read what was in them before."""
    record, side = RECORDS[op], torch.Stream(device=accelerator)
    busy = torch.rand(BUSY, BUSY, device=accelerator)
    for call in corner_calls(record, accelerator)[:3]:
        other = altered(call)
        expected = run_public(record, copy_call(other))
        late = copy_call(call)
        torch.accelerator.synchronize(accelerator)
        with side:
            for _ in range(4):
                busy @ busy
            for held, value in zip(tensors_of(late), tensors_of(other), strict=True):
                held.copy_(value)
            got = run_public(record, late)
        side.synchronize()
        assert same_bits(got, expected), f"{op} didn't wait for the work before it in its stream"


@pytest.mark.parametrize("op", RECORDS)
def test_a_device_that_is_not_the_current_one(op: str, accelerator: torch.device) -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip("there is one device alone")
    record, second = RECORDS[op], torch.device(accelerator.type, (accelerator.index + 1) % torch.accelerator.device_count())
    for call in corner_calls(record, accelerator)[:3]:
        expected = run_public(record, copy_call(call))
        there = map_call(lambda tensor: tensor.to(second), call)
        got = run_public(record, there)
        assert all(tensor.device == second for tensor in tensors_of(got))
        assert same_bits(map_call(torch.Tensor.cpu, got), map_call(torch.Tensor.cpu, expected))
        assert torch.accelerator.current_device_index() == accelerator.index
