"""Every op in a device graph: a replay on other inputs gives what a call on them does."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

import q_optim
from gpu.calls import altered, corner_calls, model_calls, run_public
from gpu.graph import captured, graph_of
from q_core.record import OpRecord
from q_core.specs import RECORDS
from q_core.testing.agreement import copy_call, describe, same_bits, tensors_of
from q_core.testing.calls import Call

pytestmark = pytest.mark.gpu


def assert_replay_is_a_call(record: OpRecord, call: Call, device: torch.device) -> None:
    other = altered(call)
    expected = run_public(record, copy_call(other))
    static = copy_call(call)
    replay, outputs = captured(lambda: run_public(record, static), device)
    for _ in range(2):
        for held, value in zip(tensors_of(static), tensors_of(other), strict=True):
            held.copy_(value)
        replay()
        assert same_bits(outputs, expected), f"{record.name}({describe(call)}): its replay on other inputs is not a call on them"


@pytest.mark.parametrize("op", RECORDS)
def test_a_replay_on_other_inputs(op: str, capturing: torch.device) -> None:
    for call in corner_calls(RECORDS[op], capturing):
        assert_replay_is_a_call(RECORDS[op], call, capturing)


@pytest.mark.parametrize("op", RECORDS)
def test_a_replay_at_model_sizes(op: str, capturing: torch.device) -> None:
    for call in islice(model_calls(RECORDS[op], capturing), 6):
        assert_replay_is_a_call(RECORDS[op], call, capturing)


@pytest.mark.parametrize("op", RECORDS)
def test_what_the_replays_are_compared_with(op: str, device: torch.device) -> None:
    """The other call is a valid one with another result, so a replay of the first's values would be seen."""
    record, differ = RECORDS[op], False
    for call in corner_calls(record, device)[:2]:
        other = altered(call)
        record.check(**other)
        assert [tensor.shape for tensor in tensors_of(other)] == [tensor.shape for tensor in tensors_of(call)]
        differ |= not same_bits(run_public(record, copy_call(call)), run_public(record, copy_call(other)))
    assert differ


@pytest.mark.filterwarnings("ignore:The .* Graph is empty")
@pytest.mark.parametrize("kind", [q_optim.AdamW8bit, q_optim.PagedAdamW32bit])
def test_a_step_is_not_captured(kind: type[q_optim.AdamW], capturing: torch.device) -> None:
    """Its number is counted on the host, so a replay would repeat it."""
    weight = torch.nn.Parameter(torch.randn(64, 64, device=capturing))
    weight.grad = torch.randn_like(weight)
    optimizer = kind([weight], lr=0.1)
    module: Any = torch.get_device_module(capturing)
    optimizer.step()
    before = weight.detach().clone()
    refused = pytest.raises(RuntimeError, match=rf"{kind.__name__}: step\(\) is called while a graph of")
    with refused, module.device(capturing), module.graph(graph_of(capturing)):
        optimizer.step()
    assert torch.equal(weight, before)
