"""How far an implementation may be from the float64 reference: the one table of tolerances.

A result may miss by ``FACTOR[dtype] * eps(dtype)`` of its *magnitude*: what the sum would be if no term cancelled another. That covers
any order of summation in float32 and one rounding to the output's dtype (or of decoded weights to the activations' dtype), and no
algorithm that is worse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q_core.reference import attention as reference_attention
from q_core.reference import gemm as reference_gemm
from q_core.reference import moe as reference_moe
from q_core.reference import norm as reference_norm
from q_core.reference import quantize as reference_quantize

FACTOR = {torch.float32: 8.0, torch.bfloat16: 1.5, torch.float16: 1.5}
TINY = 1e-30

Arguments = dict[str, Any]


def _tolerance(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    return magnitude.double().abs() * FACTOR[dtype] * torch.finfo(dtype).eps + max(TINY, torch.finfo(dtype).smallest_normal)


def _absolute(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double().abs()


def gemm(arguments: Arguments, expected: Tensor) -> Tensor:
    """The magnitude is the sum of the products' absolute values, and of the bias's."""
    x, w, bias = arguments["x_TK"], arguments["w_NK"], arguments["bias"]
    magnitude = torch.nn.functional.linear(x.double().abs(), w.double().abs(), _absolute(bias))
    return _tolerance(magnitude, x.dtype)


def gemm_4bit(arguments: Arguments, expected: Tensor) -> Tensor:
    """As gemm's with the decoded weight; with int8 activations half a step of the code book an element more."""
    weight = reference_gemm.decode_weight(arguments, torch.float64)
    bound = gemm({"x_TK": arguments["x_TK"], "w_NK": weight, "bias": arguments["bias"]}, expected)
    if arguments["activations"] == "native":
        return bound
    # The code book may be rounded to 1/127ths of the block's absmax: half a step an element.
    scales = reference_quantize.in_blocks(torch.ones(weight.numel()), arguments["blocksize"])
    half_step = (scales * arguments["absmax"].view(-1, 1) / 254).view(-1)[: weight.numel()].view(weight.shape)
    return bound + 1.01 * torch.nn.functional.linear(arguments["x_TK"].double().abs(), half_step.double())


def gemm_int8_weight(arguments: Arguments, expected: Tensor) -> Tensor:
    """As gemm's with the decoded weight."""
    weight = arguments["w_NK"].double() * (arguments["w_scale"].double() / 127)[:, None]
    return gemm({"x_TK": arguments["x_TK"], "w_NK": weight, "bias": arguments["bias"]}, expected)


def int8_gemm(arguments: Arguments, expected: Tensor) -> Tensor:
    """The integer sum is exact, so only the roundings after it count."""
    bias = arguments["bias"]
    offset = torch.zeros(()) if bias is None else bias.double().abs()
    return _tolerance(expected.double().abs() + 2 * offset, arguments["dtype"])


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _update_size(arguments: Arguments, index: int) -> float:
    """What an update is at most: gradient and first moments as they are, or over a second moment that belongs to them."""
    size = 1 + _largest(arguments["grads"][index]) + arguments["weight_decay"] * _largest(arguments["params"][index])
    for number, factor in ((1, 1.0), (3, 1 + arguments["alpha"])):
        scales = arguments.get(f"absmax{number}") or arguments[f"state{number}"]
        size += factor * _largest(scales[index]) if scales else 0.0
    return float(size / (1 - arguments["beta2"]) ** 0.5)


def optimizer_step(arguments: Arguments, expected: Arguments) -> Arguments:
    """A float32 state or a parameter may miss by its rounding; a code by one step, where a rounding crosses a midpoint; a count by nothing.

    The terms of a state are its old value and the gradient or its square; an update over sqrt(v) is at most that of a first step, times
    1 / sqrt(1 - beta2) (arXiv 1412.6980, 2.1). Lion's sign may fall either way where rounding decides it.
    """

    def bound(name: str, index: int, value: Tensor) -> Tensor:
        if value.dtype is torch.uint8:
            return torch.ones(())
        if value.dtype is torch.int64:
            return torch.zeros(())
        magnitude = value.double().abs() + arguments[name][index].double().abs()
        size = _update_size(arguments, index)
        term = arguments["lr"] * size if name == "params" else max(size, size**2)
        return _tolerance(magnitude + term, value.dtype) + (
            2 * arguments["lr"] * _undecided(arguments, index) if name == "params" else 0
        )

    return {name: [bound(name, i, value) for i, value in enumerate(values)] for name, values in expected.items()}


def _undecided(arguments: Arguments, index: int) -> Tensor:
    """Where the sign that Lion takes hangs on a rounding, 1; else 0."""
    if arguments["name"] != "lion":
        return torch.zeros(())
    momentum, gradient = arguments["state1"][index], arguments["grads"][index].double()
    if momentum.dtype is torch.uint8:
        momentum = reference_quantize.decode(
            momentum, arguments["absmax1"][index], arguments["code1"], arguments["blocksize"]
        ).view(gradient.shape)
    beta = arguments["beta1"]
    terms = torch.stack((beta * momentum.double(), (1 - beta) * gradient))
    return (terms.sum(0).abs() <= _tolerance(terms.abs().sum(0), torch.float32)).double()


def paged_attention(arguments: Arguments, expected: Tensor) -> Tensor:
    """A mean of values, whose weights are off by the error of the scores: relative to the largest value and score."""
    q = arguments["q_THD"]
    if not expected.numel():
        return torch.zeros_like(expected, dtype=torch.float64)
    k, v = (
        reference_attention.decode(arguments[f"{name}_cache_BGSD"], arguments[f"{name}_scale_BGS"]).double().nan_to_num()
        for name in "kv"
    )
    longest = q.double().norm(dim=-1).max() * k.norm(dim=-1).max() * abs(arguments["scale"])
    return _tolerance((v.abs().max() * (1 + longest)).expand(expected.shape), q.dtype)


def route_topk(arguments: Arguments, expected: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The choice is exact: it compares logits as they are."""
    weights, ids = expected
    return _tolerance(weights.double().abs() + torch.finfo(torch.float32).tiny, torch.float32), torch.zeros(ids.shape)


_MOE_ARGUMENTS = (
    "x_TK", "w13", "w2", "topk_weights", "topk_ids", "format", "intermediate_size", "w13_scale", "w2_scale", "blocksize",
)  # fmt: skip


def fused_moe(arguments: Arguments, expected: Tensor) -> Tensor:
    """The error of the first product, carried through the gate, and of the second, each relative to its sum without cancellation."""
    x, w13, w2, weights, ids, format, N, w13_scale, w2_scale, blocksize = (arguments[name] for name in _MOE_ARGUMENTS)
    x, K = x.double(), x.shape[1]
    bound = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(w13.shape[0]):
        first, second = (
            reference_moe.decode_expert(weight, scale, expert, shape, format, blocksize).double()
            for weight, scale, shape in ((w13, w13_scale, (2 * N, K)), (w2, w2_scale, (K, N)))
        )
        gate, up = (x @ first.T).chunk(2, -1)
        dgate, dup = (x.abs() @ first.abs().T).chunk(2, -1)
        silu = torch.nn.functional.silu(gate).abs()
        # The slope of silu is at most 1.1.
        hidden = 1.1 * dgate * up.abs() + silu * dup + (silu * up.abs())
        weight = torch.where(ids == expert, weights.double().abs(), 0.0).sum(-1, keepdim=True)
        bound += weight * (hidden @ second.abs().T)
    return _tolerance(bound, arguments["x_TK"].dtype)


def rms_norm(arguments: Arguments, expected: Tensor) -> Tensor:
    """The magnitude is the result's own: nothing cancels."""
    return _tolerance(expected, arguments["x"].dtype)


def add_rms_norm(arguments: Arguments, expected: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The normed sum inherits the rounding of the sum, an element's and that of the root mean square."""
    x, residual = arguments["x"], arguments["residual"]
    total = _tolerance(x.double().abs() + residual.double().abs(), x.dtype)
    scale = torch.rsqrt(expected[1].double().square().mean(-1, keepdim=True) + arguments["eps"])
    weight = arguments["weight"].double().abs()
    return 2 * _tolerance(expected[0], x.dtype) + 2 * total * scale * weight, total


def rotary_embedding(arguments: Arguments, expected: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The magnitude is the sum of the two terms' absolute values."""
    q, k, positions, cos, sin, interleaved = (
        arguments[name] for name in ("q_THD", "k_TGD", "positions", "cos", "sin", "interleaved")
    )
    # Both terms of a rotated component with one sign, in one turn for its first half and in the other for its second.
    turns = [
        reference_norm.rotary_embedding(q.double().abs(), k.double().abs(), positions, cos.abs(), sign * sin.abs(), interleaved)
        for sign in (1, -1)
    ]
    q_bound, k_bound = (torch.maximum(*(turn.abs() for turn in both)) for both in zip(*turns, strict=True))
    return _tolerance(q_bound, q.dtype), _tolerance(k_bound, q.dtype)


def silu_and_mul(arguments: Arguments, expected: Tensor) -> Tensor:
    """The magnitude is the result's own: nothing cancels."""
    return _tolerance(expected, arguments["x"].dtype)


def gradient(expected: Tensor) -> Tensor:
    """A float32 gradient: a chain of a few sums as above, of terms that may cancel, so relative to the largest of the tensor."""
    largest = expected.abs().max() if expected.numel() else expected.new_zeros(())
    return _tolerance(16 * (1 + largest), torch.float32).expand(expected.shape)
