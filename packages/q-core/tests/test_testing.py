"""The comparison itself can fail: a small fault in any op's result is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from q_core import bound
from q_core.specs import RECORDS, record_of
from q_core.testing import disagreements


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
