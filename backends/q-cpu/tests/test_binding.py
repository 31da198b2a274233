"""The native module's own checks: whatever is passed, an error that names op and argument, never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core.formats.codebooks import dynamic_map
from q_cpu.runtime import native

pytestmark = pytest.mark.usefixtures("reader")

u8, i8 = torch.uint8, torch.int8
BOOK = dynamic_map(signed=True)


def valid_calls() -> dict[str, tuple[Callable[..., None], dict[str, Any]]]:
    """One right call of each kernel, its arguments by name."""
    optimizer = {
        "params": [torch.randn(100), torch.randn(33)], "grads": [torch.randn(100), torch.randn(33)],
        "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 1,
    }  # fmt: skip
    codes = [torch.zeros(100, dtype=u8), torch.zeros(33, dtype=u8)]
    scales = [torch.zeros(4), torch.zeros(2)]
    moments = [torch.zeros(100), torch.zeros(33)]
    A, absmax, packed = torch.randn(100), torch.zeros(4), torch.zeros(50, dtype=u8)
    return {
        "quantize_blockwise": (native.quantize_blockwise, {
            "A": A, "code": BOOK, "blocksize": 32, "codes": torch.zeros(100, dtype=u8), "absmax": absmax,
        }),
        "dequantize_blockwise": (native.dequantize_blockwise, {
            "codes": torch.zeros(100, dtype=u8), "absmax": absmax, "code": BOOK, "blocksize": 32, "out": A,
        }),
        "quantize_4bit": (native.quantize_4bit, {"A": A, "blocksize": 32, "quant_type": "nf4", "packed": packed, "absmax": absmax}),
        "dequantize_4bit": (native.dequantize_4bit, {
            "packed": packed, "absmax": absmax, "blocksize": 32, "quant_type": "nf4", "out": A,
        }),
        "quantize_int8_rowwise": (native.quantize_int8_rowwise, {
            "A_TK": A, "threshold": 1.0, "q": torch.zeros(100, dtype=i8), "absmax": absmax, "outliers": torch.zeros(25, dtype=torch.bool),
        }),
        "gemm_4bit": (native.gemm_4bit, {
            "x_TK": torch.randn(2, 20), "packed": packed, "absmax": absmax, "blocksize": 32, "quant_type": "nf4",
            "T": 2, "N": 5, "K": 20, "bias": torch.zeros(5), "out": torch.zeros(2, 5),
        }),
        "int8_gemm": (native.int8_gemm, {
            "a_TK": torch.zeros(2, 20, dtype=i8), "b_NK": torch.zeros(5, 20, dtype=i8), "a_scale": torch.ones(2), "b_scale": torch.ones(5),
            "T": 2, "N": 5, "K": 20, "bias": torch.zeros(5), "out": torch.zeros(2, 5),
        }),
        "gemm_int8_weight": (native.gemm_int8_weight, {
            "x_TK": torch.randn(2, 20), "w_NK": torch.zeros(5, 20, dtype=i8), "w_scale": torch.ones(5),
            "T": 2, "N": 5, "K": 20, "bias": torch.zeros(5), "out": torch.zeros(2, 5),
        }),
        "gemm_4bit with int8 activations": (native.gemm_4bit_int8, {
            "x_TK": torch.randn(2, 20), "packed": packed, "absmax": absmax, "blocksize": 32, "quant_type": "nf4",
            "T": 2, "N": 5, "K": 20, "bias": torch.zeros(5), "out": torch.zeros(2, 5),
        }),
        "optimizer_step_8bit": (native.adamw_8bit, {
            **optimizer, "state1": codes, "state2": codes, "absmax1": scales, "absmax2": scales,
            "code1": BOOK, "code2": BOOK, "blocksize": 32,
        }),
        "optimizer_step_32bit": (native.adamw_32bit, {**optimizer, "state1": moments, "state2": moments}),
    }  # fmt: skip


CALLS = valid_calls()
ARGUMENTS = [(op, argument) for op, (_, arguments) in CALLS.items() for argument in arguments]


def wrong_tensors(right: torch.Tensor) -> list[Any]:
    """What is like a right tensor in all but one respect, and what is no tensor."""
    other = {torch.float32: torch.float64}.get(right.dtype, torch.float32)
    return [
        right.to(other), right.to(torch.complex64), right.to(torch.int64), right.to("meta"), right.to_sparse(),
        torch.cat([right.reshape(-1), right.reshape(-1)[:1]]), right.reshape(-1)[:-2], right.reshape(-1)[:0],
        torch.stack([right, right], dim=-1)[..., 0], right.reshape(-1)[:1].expand(right.numel()),
        right.tolist(), right.numpy(), "tensor", 3, object(), torch.Tensor,
    ]  # fmt: skip


def wrong_values(op: str, argument: str, right: Any) -> list[Any]:
    if isinstance(right, torch.Tensor):
        wrong = wrong_tensors(right)
        if argument.startswith("code") and right.numel() == 256:
            wrong = [w for w in wrong if not (isinstance(w, torch.Tensor) and w.shape == (254,))]  # a book may be shorter
        return wrong + ([] if argument == "bias" else [None])
    if isinstance(right, list):
        lists = [[*right[:-1], wrong] for wrong in (*wrong_tensors(right[-1]), None)]
        return [*lists, right[:-1], [*right, right[-1]], None, 3]
    if isinstance(right, str):
        return ["nf5", "", None, 3]
    if argument == "step":
        return [0, -1, None, "1", 2**80]
    if argument in ("beta1", "beta2"):
        return [1.0, -0.1, float("nan"), None]
    if argument == "threshold":
        return [-1.0, float("nan"), None]
    if isinstance(right, float):
        return [None, "x", torch.ones(2)]
    return [0, -1, 31, 33, 2**40, 2**62, -(2**62), 2**80, None, "x", 1.5]  # sizes


@pytest.mark.parametrize("op", CALLS)
def test_the_right_call_passes(op):
    function, arguments = CALLS[op]
    function(**arguments)


@pytest.mark.parametrize(("op", "argument"), ARGUMENTS)
def test_one_wrong_argument_is_an_error_that_names_it(op, argument):
    function, arguments = CALLS[op]
    for wrong in wrong_values(op, argument, arguments[argument]):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**{**arguments, argument: wrong})
        message = str(caught.value)
        # A wrong plain value of a wrong Python type is pybind11's to refuse, with the signature.
        assert message.startswith(f"{op.split()[0]}: ") or "incompatible function arguments" in message
        assert re.search(r"expected|incompatible|sort it|contiguous copy|clone", message)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_many_wrong_arguments_are_an_error(data):
    op = data.draw(st.sampled_from(list(CALLS)))
    function, arguments = CALLS[op]
    names = data.draw(st.lists(st.sampled_from(list(arguments)), min_size=1, unique=True))
    replaced = {name: data.draw(st.sampled_from(wrong_values(op, name, arguments[name]))) for name in names}
    with pytest.raises((TypeError, ValueError)):
        function(**{**arguments, **replaced})


def test_messages_say_got_and_expected():
    function, arguments = CALLS["quantize_blockwise"]
    for argument, wrong, message in (
        ("A", torch.zeros(100, dtype=torch.float64), "A has dtype torch.float64, expected float32, bfloat16 or float16"),
        ("codes", torch.zeros(100, dtype=i8), "codes has dtype int8, expected uint8"),
        ("codes", torch.zeros(99, dtype=u8), "codes has 99 elements, expected 100"),
        ("blocksize", 48, "blocksize is 48, expected a power of two in 32…4096"),
        ("code", torch.tensor([1.0, 0.0]), "code is not ascending at entry 1; sort it"),
        ("code", torch.tensor([0.0, float("nan")]), "code is not ascending at entry 1; sort it"),
        ("A", np.zeros(100, dtype=np.float32), "A is a ndarray, expected a torch.Tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(f"quantize_blockwise: {message}")):
            function(**{**arguments, argument: wrong})
    function, arguments = CALLS["optimizer_step_8bit"]
    with pytest.raises(TypeError, match=re.escape("optimizer_step_8bit: grads[1] has dtype float16, expected float32")):
        function(**{**arguments, "grads": [torch.zeros(100), torch.zeros(33).half()]})


def test_misaligned_tensors_are_refused():
    function, arguments = CALLS["quantize_blockwise"]
    misaligned = torch.frombuffer(bytearray(401), dtype=torch.float32, offset=1, count=100)
    with pytest.raises(ValueError, match="A is not aligned to its dtype float32; pass a clone"):
        function(**{**arguments, "A": misaligned})


def test_every_kind_of_dense_tensor_is_read(reader):
    with torch.inference_mode():
        inference = torch.randn(100)
    expected = torch.zeros(100, dtype=u8)
    for A in (
        inference,
        torch.nn.Parameter(inference.clone()),
        inference.clone().requires_grad_(),
        inference.clone().as_subclass(Named),
    ):
        codes, absmax = torch.zeros(100, dtype=u8), torch.zeros(4)
        native.quantize_blockwise(inference, BOOK, 32, expected, absmax)
        native.quantize_blockwise(A, BOOK, 32, codes, absmax)
        assert torch.equal(codes, expected)
    for dtype in (torch.bfloat16, torch.float16):
        native.quantize_blockwise(torch.empty(0, 3, dtype=dtype), BOOK, 32, torch.empty(0, dtype=u8), torch.empty(0))
    native.quantize_blockwise(torch.randn(1, 100).as_strided((1, 100), (7, 1)), BOOK, 32, expected, absmax)


class Named(torch.Tensor):
    """A subclass with storage of its own."""
