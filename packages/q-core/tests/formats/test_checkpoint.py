"""The flat layout, both ways, and everything in it that may lie."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_core.formats.checkpoint import flat_keys, from_flat, to_flat
from q_core.formats.four_bit import FourBit
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat

KEY = "layers.0.up_proj.weight"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"
NESTED = FourBit("nf4", 64, 256)
OURS = [
    FourBit("int4"),
    FourBit("int4", 32, 64),
    FourBit.of("mxfp4"),
    FourBit.of("mxfp4").resolved_format,
    FourBit.of("nvfp4"),
    FourBit.of("nvfp4").resolved_format,
]
"""Of types that bitsandbytes doesn't have."""
FORMATS = [FourBit(), NESTED, FourBit("fp4", 32), FourBit("fp4", 4096, 32), *OURS, Int8Rows()]


def make(format: WeightFormat, N: int = 6, K: int = 100, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    return QuantizedTensor.quantize(torch.randn(N, K).to(dtype), format)


def described(flat: dict[str, Tensor], state: str = STATE) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(bytes(flat[state].tolist()))
    return parsed


def encoded(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    N=st.integers(0, 8),
    K=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_there_and_back(format: WeightFormat, N: int, K: int, dtype: torch.dtype) -> None:
    weight = make(format, N, K, dtype)
    flat = to_flat(KEY, weight)
    assert set(flat_keys(KEY, flat)) == set(flat)
    back = from_flat(KEY, flat | {"other": torch.zeros(1)}, dtype=dtype)
    assert (back.format, back.shape, back.dtype) == (weight.format, weight.shape, weight.dtype)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert all(torch.equal(part, weight.components[name]) for name, part in back.components.items())
    again = to_flat(KEY, back)
    assert list(again) == list(flat)
    assert all(torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype for key, tensor in flat.items())


def test_layout() -> None:
    flat = to_flat(KEY, make(NESTED))
    assert {key.removeprefix(KEY): (tensor.dtype, list(tensor.shape)) for key, tensor in flat.items() if key != STATE} == {
        "": (torch.uint8, [300, 1]),
        ".absmax": (torch.uint8, [10]),
        ".quant_map": (torch.float32, [16]),
        ".nested_absmax": (torch.float32, [1]),
        ".nested_quant_map": (torch.float32, [256]),
    }
    description = described(flat)
    assert list(description) == ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]
    assert description["dtype"] == "bfloat16"
    assert description["shape"] == [6, 100]
    int8 = to_flat(KEY, make(Int8Rows()))
    assert {key: tensor.dtype for key, tensor in int8.items()} == {
        KEY: torch.int8,
        "layers.0.up_proj.SCB": torch.float32,
        "layers.0.up_proj.weight_format": torch.uint8,
    }


def test_layout_of_types_that_bitsandbytes_does_not_have() -> None:
    def layout(format: WeightFormat) -> dict[str, tuple[torch.dtype, list[int]]]:
        flat = to_flat(KEY, make(format))
        return {key.removeprefix(KEY): (tensor.dtype, list(tensor.shape)) for key, tensor in flat.items() if "state" not in key}

    common = {"": (torch.uint8, [300, 1]), ".quant_map": (torch.float32, [16])}
    assert layout(FourBit("int4")) == {**common, ".absmax": (torch.float32, [10])}
    assert layout(FourBit.of("mxfp4")) == {**common, ".absmax": (torch.uint8, [19])}
    assert layout(FourBit.of("nvfp4")) == {**common, ".absmax": (torch.uint8, [38]), ".tensor_scale": (torch.float32, [])}
    assert layout(FourBit.of("nvfp4").resolved_format) == {**common, ".absmax": (torch.float32, [38])}

    state = f"{KEY}.quant_state.q__mxfp4"
    flat = to_flat(KEY, make(FourBit.of("mxfp4")))
    assert described(flat, state) == {
        "quant_type": "mxfp4",
        "blocksize": 32,
        "dtype": "bfloat16",
        "shape": [6, 100],
        "scale_dtype": "e8m0",
    }
    assert not any("bitsandbytes" in key for key in flat)
    for renamed in (f"{KEY}.quant_state.bitsandbytes__mxfp4", f"{KEY}.quant_state.q__nvfp4"):
        with pytest.raises(ValueError, match="checkpoint: "):
            from_flat(KEY, {key.replace(state, renamed): tensor for key, tensor in flat.items()})


def test_tensors_share_no_memory_with_each_other() -> None:
    two = [to_flat(key, make(NESTED)) for key in ("a.weight", "b.weight")]
    pointers = [tensor.untyped_storage().data_ptr() for flat in two for tensor in flat.values()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8, torch.float16])
def test_codes_stored_as_another_dtype(storage: torch.dtype) -> None:
    weight = make(NESTED)
    flat = to_flat(KEY, weight)
    flat[KEY] = flat[KEY].view(-1).view(storage).unsqueeze(1)
    assert torch.equal(from_flat(KEY, flat).dequantize(), weight.dequantize())


LIES: dict[str, list[object]] = {
    "quant_type": ["fp4", "int4", 4, None],
    "blocksize": [128, 48, 0, -64, "64", True, 64.0, None],
    "dtype": ["float64", "int8", "torch.bfloat16", 16, None],
    "shape": [[6, 101], [6], [-6, -100], [6, 100, 2], [6.0, 100], [True, 600], [], "6x100", None, [10**30, 10**30], [6, [100]]],
    "nested_blocksize": [32, 100, None, "256"],
    "nested_dtype": ["float16", None],
    "nested_offset": ["0", None, float("nan"), float("inf"), 1e300, 10**400, True],
}


@pytest.mark.parametrize(("field", "lie"), [(field, lie) for field, lies in LIES.items() for lie in lies], ids=str)
def test_json_that_lies(field: str, lie: object) -> None:
    flat = to_flat(KEY, make(NESTED, N=600))  # more than 256 blocks, so that nested_blocksize can lie
    flat[STATE] = encoded(json.dumps(described(flat) | {field: lie}))
    with pytest.raises(ValueError, match=r"checkpoint: .*expected"):
        from_flat(KEY, flat)


OUR_LIES: list[tuple[FourBit, dict[str, object]]] = [
    *((FourBit.of("mxfp4"), {"scale_dtype": lie}) for lie in ("float32", "e4m3", "e5m2", None, 8)),
    *((FourBit.of("nvfp4"), {"scale_dtype": lie}) for lie in ("float32", "e8m0")),
    (FourBit.of("nvfp4").resolved_format, {"scale_dtype": "e4m3"}),
    *((FourBit("int4"), {"scale_dtype": lie}) for lie in ("e8m0", "e4m3", "bfloat16")),
    *((FourBit.of("mxfp4"), {"blocksize": lie}) for lie in (16, 64, 31)),
    (FourBit.of("nvfp4"), {"blocksize": 32}),
    *((FourBit.of("nvfp4"), {"shape": lie}) for lie in ([6, 101], [6, 117], [5, 100])),
    (FourBit.of("mxfp4"), {"quant_type": "nvfp4"}),
    (FourBit.of("mxfp4"), {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0}),
]


@pytest.mark.parametrize(("format", "lie"), OUR_LIES, ids=str)
def test_json_of_our_own_that_lies(format: FourBit, lie: dict[str, object]) -> None:
    flat, state = to_flat(KEY, make(format)), f"{KEY}.quant_state.q__{format.quant_type}"
    flat[state] = encoded(json.dumps(described(flat, state) | lie))
    with pytest.raises(ValueError, match=r"checkpoint: .*expected"):
        from_flat(KEY, flat)


@pytest.mark.parametrize(
    ("format", "part", "index", "value"),
    [
        *((format, "absmax", 3, wrong) for format in (FourBit(), OURS[3], OURS[5]) for wrong in (float("nan"), float("inf"))),
        (NESTED, "nested_absmax", 0, float("nan")),
        *((FourBit.of("mxfp4"), "absmax", 3, code) for code in (253, 254, 255)),
        *((FourBit.of("nvfp4"), "absmax", 3, code) for code in (127, 128, 255)),
        *((FourBit.of("nvfp4"), "tensor_scale", (), wrong) for wrong in (float("nan"), float("inf"))),
    ],
    ids=str,
)
def test_scales_that_are_none(format: FourBit, part: str, index: Any, value: float) -> None:
    flat = to_flat(KEY, make(format))
    flat[f"{KEY}.{part}"][index] = value
    with pytest.raises(ValueError, match=rf"checkpoint: {KEY}.{part} has .*expected"):
        from_flat(KEY, flat)


def test_int8_scales_that_are_none() -> None:
    flat = to_flat(KEY, make(Int8Rows()))
    flat["layers.0.up_proj.SCB"][2] = float("nan")
    with pytest.raises(ValueError, match="SCB has 1 scales that are NaN or infinite"):
        from_flat(KEY, flat)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"quant_type": "nf4"', "[]", "null", "3", "\x00", "{}", '{"quant_type": "nf4"}', "[" * 4000, " " * 5000],
    ids=lambda text: text[:8],
)
def test_json_that_is_none(text: str) -> None:
    flat = to_flat(KEY, make(NESTED)) | {STATE: encoded(text)}
    with pytest.raises(ValueError, match=f"{STATE}.*expected"):
        from_flat(KEY, flat)


def test_unknown_and_half_nested_fields() -> None:
    flat = to_flat(KEY, make(NESTED))
    description = described(flat)
    for wrong in (description | {"more": 1}, {k: v for k, v in description.items() if k != "nested_offset"}):
        with pytest.raises(ValueError, match=f"{STATE} has the fields"):
            from_flat(KEY, flat | {STATE: encoded(json.dumps(wrong))})
    plain = to_flat(KEY, make(FourBit()))
    with pytest.raises(ValueError, match=r"nested_absmax is there"):
        from_flat(KEY, plain | {f"{KEY}.nested_absmax": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"tensor_scale is there"):
        from_flat(KEY, to_flat(KEY, make(FourBit.of("mxfp4"))) | {f"{KEY}.tensor_scale": torch.ones(())})
    with pytest.raises(ValueError, match="one of them"):
        from_flat(KEY, flat | {f"{KEY}.quant_state.bitsandbytes__fp4": flat[STATE]})


@pytest.mark.parametrize("format", [NESTED, FourBit(), FourBit.of("mxfp4"), FourBit.of("nvfp4"), Int8Rows()], ids=str)
def test_every_missing_or_wrong_tensor_is_named(format: WeightFormat) -> None:
    flat = to_flat(KEY, make(format))
    for key, tensor in flat.items():
        if key.endswith("weight_format"):
            assert from_flat(KEY, {k: v for k, v in flat.items() if k != key}).format == format  # bitsandbytes wrote it later
            continue
        with pytest.raises(ValueError, match=KEY if "quant_state" in key else key):
            from_flat(KEY, {k: v for k, v in flat.items() if k != key})
        if tensor.ndim:
            with pytest.raises(ValueError, match=r"expected"):
                from_flat(KEY, flat | {key: tensor[:-1]})
        if key != KEY and "quant_state" not in key:
            with pytest.raises(ValueError, match=f"{key} .*expected"):
                from_flat(KEY, flat | {key: tensor.to(torch.float16)})
    with pytest.raises(ValueError, match=f"{KEY} is missing"):
        from_flat(KEY, {})
    with pytest.raises(ValueError, match="expected a quantized weight"):
        from_flat(KEY, {KEY: torch.zeros(6, 100)})


def test_other_code_books_and_layouts_are_refused() -> None:
    flat = to_flat(KEY, make(NESTED))
    for book in ("quant_map", "nested_quant_map"):
        with pytest.raises(ValueError, match=f"{book} holds another code book"):
            from_flat(KEY, flat | {f"{KEY}.{book}": flat[f"{KEY}.{book}"] * 2})
    int8 = to_flat(KEY, make(Int8Rows()))
    with pytest.raises(ValueError, match="weight_format is 2"):
        from_flat(KEY, int8 | {"layers.0.up_proj.weight_format": torch.tensor(2, dtype=torch.uint8)})


@settings(max_examples=60, deadline=None)
@given(format=st.sampled_from([NESTED, FourBit.of("nvfp4")]), data=st.binary(max_size=300))
def test_any_bytes_give_a_clear_error(format: FourBit, data: bytes) -> None:
    owner = "bitsandbytes" if format is NESTED else "q"
    state = f"{KEY}.quant_state.{owner}__{format.quant_type}"
    flat = to_flat(KEY, make(format)) | {state: torch.tensor(list(data), dtype=torch.uint8)}
    with pytest.raises(ValueError, match="checkpoint: "):
        from_flat(KEY, flat)
