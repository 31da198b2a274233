"""The reference waits for no value: its shapes and steps come from shapes and plain ints, so that it can be traced and captured.

Under FakeTensorMode a tensor has no values, and ``.item()``, ``.tolist()``, ``bool()`` or a mask as an index raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from q_core.record import Arguments, OpRecord
from q_core.samples.make import Make
from q_core.specs import RECORDS, record_of
from q_core.testing.agreement import copy_call, map_call, reference_function, run, tensors_of


def run_without_values(record: OpRecord, function: Callable[..., Any], call: Arguments) -> list[Tensor]:
    # What is cached, such as a code book, is a tensor with values.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return tensors_of(run(record, function, map_call(mode.from_tensor, call)))


@pytest.mark.parametrize("op", RECORDS)
def test_reference(op: str) -> None:
    record = record_of(op)
    function = reference_function(record)
    for call in record.samples(Make(), torch.float32):
        expected = tensors_of(run(record, function, copy_call(call)))
        got = run_without_values(record, function, call)
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[: x.argmax().tolist()],
        lambda x: x if x.any() else -x,
        lambda x: x[x > 0],
    ],
    ids=["item", "tolist", "bool", "mask"],
)
def test_what_waits_is_seen(waits: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_without_values(record_of("silu_and_mul"), waits, {"x": torch.ones(2, 4)})
