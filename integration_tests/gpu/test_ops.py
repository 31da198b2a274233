"""Every op on the device: float64's values at a model's sizes, and no wait for the device."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from gpu.calls import corner_calls, model_calls, run_public
from q_core.record import OpRecord
from q_core.specs import RECORDS
from q_core.testing.agreement import compare, copy_call, describe, expected_outputs, map_call
from q_core.testing.calls import Call

pytestmark = pytest.mark.gpu


def calls(record: OpRecord, device: torch.device, *, interpreted: bool) -> Iterable[Call]:
    return corner_calls(record, device)[:2] if interpreted else model_calls(record, device)


@pytest.mark.parametrize("op", RECORDS)
def test_agreement_at_model_sizes(op: str, device: torch.device, interpreted: bool) -> None:
    """The conformance suite has small sizes; other tiles, splits and sums are at work in a model's."""
    record = RECORDS[op]
    for call in calls(record, device, interpreted=interpreted):
        expected, bounds = expected_outputs(record, map_call(Tensor.cpu, call))
        for name, value in map_call(Tensor.cpu, run_public(record, copy_call(call))).items():
            assert not (message := compare(value, expected[name], bounds[name])), f"{op}({describe(call)}): {name} {message}"


@pytest.mark.parametrize("op", RECORDS)
def test_nothing_waits_for_the_device(op: str, accelerator: torch.device) -> None:
    """From the second call on: the first compiles kernels, and copies constants."""
    if not hasattr(torch.get_device_module(accelerator), "set_sync_debug_mode"):
        pytest.skip(f"torch doesn't watch for waits on {accelerator}")
    record = RECORDS[op]
    for call in corner_calls(record, accelerator):
        first, second = copy_call(call), copy_call(call)
        run_public(record, first)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_public(record, second)
        finally:
            torch.cuda.set_sync_debug_mode("default")
