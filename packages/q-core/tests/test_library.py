"""The ops live as long as the process: a torch Library that is collected takes its ops along, and defining twice raises."""

from __future__ import annotations

import gc
import importlib
import sys

import pytest
import torch

from q_core import dispatch, ops
from q_core.specs import RECORDS


def test_ops_outlive_a_collection_and_a_second_import() -> None:
    gc.collect()
    assert importlib.import_module("q_core.dispatch") is dispatch is sys.modules["q_core.dispatch"]
    assert all(hasattr(torch.ops.q, op) for op in RECORDS)
    x = torch.randn(3, 8)
    torch.testing.assert_close(ops.gemm(x, torch.eye(8)), x)


def test_an_op_is_defined_once() -> None:
    """Which is why there is one library, at the top of one module."""
    assert dispatch.LIBRARY.ns == "q"
    for op in RECORDS:
        schema = str(torch._C._get_schema(f"q::{op}", "")).removeprefix("q::")
        with pytest.raises(RuntimeError, match=r"multiple times|already|duplicate"):
            dispatch.LIBRARY.define(schema)
    with pytest.raises(RuntimeError, match=r"Only a single TORCH_LIBRARY"):
        torch.library.Library("q", "DEF")
