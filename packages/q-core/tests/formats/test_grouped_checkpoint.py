"""The flat layout of integers in groups, both ways, and everything in it that may lie."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from q_core.formats.checkpoint import flat_keys, from_flat, to_flat
from q_core.formats.grouped_int import AffineGroups, GroupedInt, SuperGroups
from q_core.formats.quantized_tensor import QuantizedTensor

KEY = "layers.0.up_proj.weight"
STATE = f"{KEY}.quant_state.q__grouped"
FORMATS = [
    AffineGroups(),
    AffineGroups(8, 32, scale_dtype=torch.bfloat16, zeros=False),
    AffineGroups(4, 384, True, scale_dtype=torch.float32),
    SuperGroups(),
    SuperGroups(group_size=64, per_block=3, ordered=True),
]


def make(format: GroupedInt, N: int = 5, K: int = 768, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    components = {
        name: torch.rand(part.shape).to(part.dtype) if part.is_floating_point() else torch.randint(64, part.shape).to(part.dtype)
        for name, part in format.empty((N, K), "cpu").items()
    }
    if format.ordered:
        components["order"] = torch.randperm(K).to(torch.int32)
    return QuantizedTensor.from_components(components, format, shape=(N, K), dtype=dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("N", [0, 5])
def test_there_and_back(format: GroupedInt, N: int) -> None:
    weight = make(format, N)
    flat = to_flat(KEY, weight)
    assert set(flat_keys(KEY, flat)) == set(flat)
    back = from_flat(KEY, flat | {"other": torch.zeros(1)})
    assert (back.format, back.shape, back.dtype) == (weight.format, weight.shape, weight.dtype)
    for name, component in weight.components.items():
        assert torch.equal(back.components[name], component)
        assert component.data_ptr() == back.components[name].data_ptr()


def described(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(flat: dict[str, Tensor]) -> None:
        description = json.loads(bytes(flat[STATE].tolist())) | changes
        text = json.dumps({name: value for name, value in description.items() if value != "drop"})
        flat[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def held(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def lie(flat: dict[str, Tensor]) -> None:
        changed = change(flat.pop(name))
        if changed is not None:
            flat[name] = changed

    return lie


LIES = [
    (described(format="nf4"), f"{STATE} says the format 'nf4', expected one of ('affine', 'super')"),
    (described(format=["affine"]), f"{STATE} says the format ['affine']"),
    (described(bits=3), "bits is 3, expected 4 or 8"),
    (described(bits=True), f"{STATE} says bits True, expected a value of int"),
    (described(bits=8), f"{KEY}.low_codes is missing, expected uint8 [5, 384]"),
    (described(group_size=100), "group_size is 100, expected a multiple of 32"),
    (described(group_size=256), f"{KEY}.scale is float16 [5, 6], expected float16 [5, 3]"),
    (described(group_size=1024), "expected [N, K] with K a multiple of 1024"),
    (described(group_size="drop"), f"{STATE} has the fields"),
    (described(more=1), f"{STATE} has the fields"),
    (described(scale_dtype="float64"), f"{STATE} says scale_dtype 'float64', expected one of"),
    (described(dtype="int8"), f"{STATE} says dtype 'int8'"),
    (described(shape=[6, 768]), f"{KEY} is uint8 [5, 384], expected uint8 [6, 384]"),
    (described(shape=[5, -768]), f"{STATE} says shape [5, -768], expected two sizes"),
    (described(shape=[5, 2**80]), f"{STATE} says shape"),
    (described(shape=[5, 768, 1]), f"{STATE} says shape [5, 768, 1]"),
    (described(zeros=False), f"{KEY}.zero is there, expected no such key"),
    (described(ordered=False), f"{KEY}.order is there, expected no such key"),
    (held(f"{KEY}.zero", lambda t: None), f"{KEY}.zero is missing, expected uint8 [5, 6]"),
    (held(f"{KEY}.zero", lambda t: t.view(torch.int8)), f"{KEY}.zero is int8 [5, 6], expected uint8 [5, 6]"),
    (held(f"{KEY}.scale", lambda t: t * torch.inf), f"{KEY}.scale has scales that are NaN or infinite"),
    (held(f"{KEY}.order", lambda t: t % 700), f"{KEY}.order is no order of the columns"),
    (held(KEY, lambda t: t[:, 1:]), f"{KEY} is uint8 [5, 383], expected uint8 [5, 384]"),
    (held(KEY, lambda t: None), f"{KEY} is missing"),
    (held(STATE, lambda t: t[:-5]), f"{STATE} is not JSON"),
]


@pytest.mark.parametrize(("lie", "message"), LIES, ids=[message[:60] for _, message in LIES])
def test_lies(lie: Callable[[dict[str, Tensor]], None], message: str) -> None:
    flat = to_flat(KEY, make(AffineGroups(ordered=True)))
    lie(flat)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_flat(KEY, flat)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_from_meta_to_meta(format: GroupedInt) -> None:
    meta = QuantizedTensor.empty((5, 768), format, dtype=torch.float32, device="meta")
    flat = to_flat(KEY, meta)
    assert from_flat(KEY, flat).format == format
    assert isinstance(copy.deepcopy(nn.Parameter(meta, requires_grad=False)), nn.Parameter)
