"""The native module's own checks: whatever is passed, an error that names op and argument, never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import RULES
from q_cpu.runtime import native

pytestmark = pytest.mark.usefixtures("reader")

u8, i8 = torch.uint8, torch.int8
BOOK = dynamic_map(signed=True)


def valid_calls() -> dict[str, tuple[Callable[..., None], dict[str, Any]]]:
    """One right call of each kernel, its arguments by name."""
    optimizer = {
        "name": "ademamix", "params": [torch.randn(100), torch.randn(33)], "grads": [torch.randn(100), torch.randn(33)],
        "skipped": [torch.tensor(0), torch.tensor(0)],
        "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "beta3": 0.999, "alpha": 1.0, "eps": 1e-8, "weight_decay": 0.0,
        "dampening": 0.0, "nesterov": False, "trust_coefficient": 0.0, "step": 1,
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
        "gemm": (native.gemm, {
            "x_TK": torch.randn(2, 20), "w_NK": torch.randn(5, 20), "T": 2, "N": 5, "K": 20,
            "bias": torch.zeros(5), "out": torch.zeros(2, 5),
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
        "optimizer_step_8bit": (native.optimizer_step_8bit, {
            **optimizer, "state1": codes, "state2": codes, "state3": codes, "absmax1": scales, "absmax2": scales, "absmax3": scales,
            "code1": BOOK, "code2": BOOK, "blocksize": 32,
        }),
        "optimizer_step_32bit": (native.optimizer_step_32bit, {
            **optimizer, "state1": moments, "state2": moments, "state3": moments,
        }),
        **valid_norm_calls(),
        **valid_attention_calls(),
        **valid_moe_calls(),
    }  # fmt: skip


def valid_norm_calls() -> dict[str, tuple[Callable[..., None], dict[str, Any]]]:
    x, out = torch.randn(3, 10), torch.zeros(3, 10)
    norm = {"x": x, "weight": torch.ones(10), "eps": 1e-6, "rows": 3, "K": 10, "out": out}
    return {
        "rms_norm": (native.rms_norm, norm),
        "add_rms_norm": (native.add_rms_norm, {**norm, "residual": x, "total": torch.zeros(3, 10)}),
        "rotary_embedding": (native.rotary_embedding, {
            "q_THD": torch.randn(3, 2, 8), "k_TGD": torch.randn(3, 2, 8), "positions": torch.tensor([0, 4, 2]), "cos": torch.randn(5, 3),
            "sin": torch.randn(5, 3), "interleaved": False, "T": 3, "H": 2, "G": 2, "D": 8, "P": 5, "F": 3,
            "q_out": torch.zeros(3, 2, 8), "k_out": torch.zeros(3, 2, 8),
        }),
        "silu_and_mul": (native.silu_and_mul, {"x": x, "rows": 3, "N": 5, "out": torch.zeros(3, 5)}),
    }  # fmt: skip


def valid_moe_calls() -> dict[str, tuple[Callable[..., None], dict[str, Any]]]:
    return {
        "route_topk": (native.route_topk, {
            "logits_TE": torch.randn(3, 5), "T": 3, "E": 5, "k": 2, "sigmoid": False, "renormalize": True, "weights": torch.zeros(3, 2),
            "ids": torch.zeros(3, 2, dtype=torch.int32),
        }),
        "fused_moe": (native.fused_moe, {
            "x_TK": torch.randn(3, 8), "w13": torch.zeros(5, 32, dtype=u8), "w2": torch.zeros(5, 16, dtype=u8),
            "topk_weights": torch.ones(3, 2), "topk_ids": torch.tensor([[0, 4], [-1, 2], [1, 0]], dtype=torch.int32), "format": "nf4",
            "T": 3, "K": 8, "N": 4, "E": 5, "k": 2, "w13_scale": torch.ones(5, 1), "w2_scale": torch.ones(5, 1), "blocksize": 64,
            "out": torch.zeros(3, 8),
        }),
    }  # fmt: skip


def valid_attention_calls() -> dict[str, tuple[Callable[..., None], dict[str, Any]]]:
    cache = {
        "k_cache_BGSD": torch.zeros(3, 2, 4, 8, dtype=i8), "v_cache_BGSD": torch.zeros(3, 2, 4, 8, dtype=i8),
        "k_scale_BGS": torch.ones(3, 2, 4), "v_scale_BGS": torch.ones(3, 2, 4), "B": 3, "G": 2, "S": 4, "D": 8,
    }  # fmt: skip
    return {
        "write_kv": (native.write_kv, {
            "k_TGD": torch.randn(3, 2, 8), "v_TGD": torch.randn(3, 2, 8), "slot_mapping": torch.tensor([3, -1, 11]), "T": 3, **cache,
        }),
        "copy_kv_blocks": (native.copy_kv_blocks, {
            "src": torch.zeros(3, 5, dtype=u8), "dst": torch.zeros(4, 5, dtype=u8), "pairs": torch.tensor([[0, 3], [2, 0]]),
            "count": 2, "src_blocks": 3, "dst_blocks": 4, "block_bytes": 5,
        }),
        "paged_attention": (native.paged_attention, {
            "q_THD": torch.randn(3, 6, 8), "block_tables": torch.tensor([[0, 1], [2, 9]], dtype=torch.int32),
            "query_start": torch.tensor([0, 1, 3], dtype=torch.int32), "seq_lens": torch.tensor([7, 4], dtype=torch.int32),
            "max_query_len": 2, "max_seq_len": 8, "scale": 0.3, "causal": True, "window": 0, "softcap": 0.0, "sinks_H": torch.zeros(6),
            "T": 3, "H": 6, "R": 2, "M": 2, "out": torch.zeros(3, 6, 8), **cache,
        }),
    }  # fmt: skip


CALLS = valid_calls()
ARGUMENTS = [(op, argument) for op, (_, arguments) in CALLS.items() for argument in arguments]


def wrong_tensors(right: torch.Tensor) -> list[Any]:
    """What is like a right tensor in all but one respect, and what is no tensor."""
    other = {torch.float32: torch.float64}.get(right.dtype, torch.float32)
    views = [torch.stack([right, right], dim=-1)[..., 0], right.reshape(-1)[:1].expand(right.numel())]
    return [
        right.to(other), right.to(torch.complex64), right.to(torch.int16), right.to("meta"), right.to_sparse(),
        torch.cat([right.reshape(-1), right.reshape(-1)[:1]]), right.reshape(-1)[:-2], right.reshape(-1)[:0],
        *(views if right.numel() > 1 else []),  # one element has no layout
        right.tolist(), right.numpy(), "tensor", 3, object(), torch.Tensor,
    ]  # fmt: skip


def wrong_values(op: str, argument: str, right: Any) -> list[Any]:
    if isinstance(right, torch.Tensor):
        wrong = wrong_tensors(right)
        if argument.startswith("code") and right.numel() == 256:
            wrong = [w for w in wrong if not (isinstance(w, torch.Tensor) and w.shape == (254,))]  # a book may be shorter
        return wrong + ([] if argument in ("bias", "sinks_H") else [None])
    if isinstance(right, list):
        lists = [[*right[:-1], wrong] for wrong in (*wrong_tensors(right[-1]), None)]
        return [*lists, right[:-1], [*right, right[-1]], None, 3]
    if isinstance(right, str):
        return ["nf5", "", None, 3]
    if argument == "step":
        return [0, -1, None, "1", 2**80]
    if argument in ("beta1", "beta2", "beta3", "dampening"):
        return [1.0, -0.1, float("nan"), None]
    if argument in ("max_query_len", "window"):  # large ones are right
        return [-1, 2**80, None, "x", 1.5]
    if argument == "threshold":
        return [-1.0, float("nan"), None]
    if isinstance(right, bool):
        return ["x", torch.ones(2)]
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


# --- anything at all --------------------------------------------------------------------------------------------------


class Made:
    """A sequence that makes its tensors as they are asked for and keeps none."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._tensors[index].clone()


EDGES = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 2**31 - 1, 2**31, 2**62, 2**63 - 1]
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, -1e308, float("inf"), float("nan")]


def odd_tensors(draw: Callable[..., Any], right: torch.Tensor) -> torch.Tensor:
    """Another layout of a tensor's values, other values, or another shape."""
    flat = right.reshape(-1)
    kinds = [
        "offset",
        "gaps",
        "turned",
        "bytes",
        "shape",
        "empty",
        "values",
        "dtype",
        *(["rows", "repeated"] if right.dim() else []),
    ]
    match draw(st.sampled_from(kinds)):
        case "offset":  # contiguous, and off what vectors would like
            return torch.cat([flat[:1], flat])[1:].view(right.shape)
        case "gaps":
            return torch.stack([right, right], dim=-1)[..., 0]
        case "rows":  # with something between them
            return torch.cat([right, right], dim=-1)[..., : right.shape[-1]]
        case "turned":
            return right.transpose(0, -1).contiguous().transpose(0, -1)
        case "bytes":  # off its own alignment
            raw = torch.cat([torch.zeros(1, dtype=u8), flat.view(u8)]).numpy()
            return torch.frombuffer(raw, dtype=right.dtype, offset=1).view(right.shape) if len(flat) else right
        case "repeated":
            return right[:1].expand(draw(st.sampled_from([1, 2, 3, 2**31, 2**40])), *right.shape[1:])
        case "shape":
            size = min(right.numel(), draw(st.sampled_from([2**31, *range(8)])))
            return flat[:size].clone().view(draw(st.sampled_from([(size,), (1, size), (size, 1, 1), (1, 1, 1, size)])))
        case "empty":
            return right.new_empty(draw(st.permutations([0, draw(st.sampled_from([1, 2, 2**31, 2**61])), 3][: right.dim()])))
        case "values":
            one = st.sampled_from(NUMBERS if right.is_floating_point() else [n for n in EDGES if in_range(n, right.dtype)])
            return torch.tensor(draw(st.lists(one, min_size=len(flat), max_size=len(flat))), dtype=right.dtype).view(right.shape)
        case _:
            return right.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, u8, i8])))


def in_range(number: int, dtype: torch.dtype) -> bool:
    return dtype == torch.bool or torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max


def odd(draw: Callable[..., Any], op: str, argument: str, right: Any) -> Any:
    """Something in place of an argument: it may be right all the same."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(wrong_values(op, argument, right)))
    if isinstance(right, torch.Tensor):
        return odd_tensors(draw, right)
    if isinstance(right, list):
        return draw(st.sampled_from([Made(right), tuple(right), [odd_tensors(draw, one) for one in right], right * 2, []]))
    if isinstance(right, str):
        return draw(st.sampled_from(["nf4", "fp4", "int4", "mxfp4", "nvfp4", "dense", "int8", "fp8", *RULES]))
    return draw(st.sampled_from([right, *NUMBERS, *EDGES, True, False]))


def plain_copy(value: Any) -> Any:
    """The same values in contiguous memory of their own."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided and value.numel() < 2**20:
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, Made):
        return [value[i] for i in range(len(value))]
    if isinstance(value, dict):
        return {name: plain_copy(one) for name, one in value.items()}
    return [plain_copy(one) for one in value] if isinstance(value, list | tuple) else value


def bits(value: Any) -> Any:
    """What tells whether a call changed a value, or changed two alike."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided and value.numel() < 2**20:
        return value.contiguous().reshape(-1).view(u8).tolist()
    return [bits(one) for one in value] if isinstance(value, list | tuple) else None


def test_whatever_is_passed_is_refused_or_read_rightly(exhaustive):
    """Refused, it leaves every tensor as it was; taken, it gives what plain copies of the same values give."""

    @given(data=st.data())
    @settings(max_examples=5_000 if exhaustive else 250, deadline=None, suppress_health_check=list(HealthCheck))
    def check(data):
        op = data.draw(st.sampled_from(list(CALLS)))
        function, right = CALLS[op]
        arguments = {name: plain_copy(value) for name, value in right.items()}
        for name in data.draw(st.lists(st.sampled_from(list(right)), min_size=1, max_size=4, unique=True)):
            arguments[name] = odd(data.draw, op, name, arguments[name])
        copies = plain_copy(arguments)
        before = {name: bits(value) for name, value in arguments.items()}
        try:
            function(**arguments)
        except (TypeError, ValueError):
            assert {name: bits(value) for name, value in arguments.items()} == before
            return
        function(**copies)
        lasting = {name: value for name, value in arguments.items() if not isinstance(value, Made)}
        assert {name: bits(value) for name, value in lasting.items()} == {name: bits(copies[name]) for name in lasting}

    check()


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


def test_sizes_and_strides_are_checked_together():
    function, arguments = CALLS["rms_norm"]
    for wrong, message in (
        (torch.randn(30), "x has 1 axes, expected 2"),
        (torch.randn(3, 11), "x has 11 elements on axis 1, expected 10"),
        (torch.randn(10, 3).T, "x has a last axis that is not contiguous; pass a contiguous copy"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"rms_norm: {message}")):
            function(**{**arguments, "x": wrong})


def test_numbers_that_would_lead_out_of_a_tensor_are_refused():
    for op, argument, wrong, message in (
        ("rotary_embedding", "positions", [0, 5, 0], "positions[1] is 5, expected 0 to 4"),
        ("rotary_embedding", "positions", [0, 0, -1], "positions[2] is -1, expected 0 to 4"),
        ("write_kv", "slot_mapping", [0, 12, 1], "slot_mapping[1] is 12, expected less than 12"),
        ("copy_kv_blocks", "pairs", [[0, 1], [3, 0]], "pairs[1] names block 3, expected 0 to 2"),
        ("copy_kv_blocks", "pairs", [[0, 1], [1, -1]], "pairs[1] names block -1, expected 0 to 3"),
        ("paged_attention", "block_tables", [[0, 3], [1, 9]], "block_tables[0] names block 3, expected 0 to 2"),
        ("paged_attention", "query_start", [0, 2, 1], "query_start[2] is 1, expected 2 or more"),
        ("paged_attention", "query_start", [0, 1, 2], "query_start[2] is 2, expected T = 3"),
        ("paged_attention", "query_start", [1, 2, 3], "query_start[0] is 1, expected 0"),
        ("paged_attention", "query_start", [0, 0, 3], "query_start[2] gives a request 3 queries, expected at most max_query_len"),
        ("paged_attention", "seq_lens", [7, 1], "seq_lens[1] is 1, expected 2 (its queries) to 8"),
        ("paged_attention", "seq_lens", [9, 4], "seq_lens[0] is 9, expected 1 (its queries) to 8"),
    ):  # fmt: skip
        function, arguments = CALLS[op]
        with pytest.raises(ValueError, match=re.escape(f"{op}: {message}")):
            function(**{**arguments, argument: torch.tensor(wrong, dtype=arguments[argument].dtype)})


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
