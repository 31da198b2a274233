"""Records of the optim family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from q_core.operand import Operand
from q_core.optimizers import ALL_STATES, RULES
from q_core.record import OpRecord
from q_core.samples import optim as samples
from q_core.specs import bounds, check
from q_core.specs.quantize import check_absmax, check_code

NEUTRAL: dict[str, Any] = {
    "state3": [],
    "skipped": [],
    "beta3": 0.0,
    "alpha": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "trust_coefficient": 0.0,
}


def _check_rule(op: str, name: str, lr: float, weight_decay: float, step: int, **settings: float) -> None:
    if name not in RULES:
        check.wrong_value(op, "name", name, "one of " + ", ".join(map(repr, RULES)))
    for argument, value in settings.items():
        if value and argument not in RULES[name].settings:
            check.wrong_value(op, argument, value, f"0, since {name!r} doesn't use it")
        upper = 1.0 if argument in ("beta1", "beta2", "beta3", "dampening") else math.inf
        if not 0.0 <= value < upper:
            check.wrong_value(op, argument, value, "0 or more and less than 1" if upper == 1.0 else "a finite number, 0 or more")
    for argument, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            check.wrong_value(op, argument, value, "a finite number, 0 or more")
    if settings["nesterov"] and not settings["beta1"]:
        check.wrong_value(op, "nesterov", True, "False without a momentum (beta1)")
    if step < 1:
        check.wrong_value(op, "step", step, "1 or more; the first step is 1")


def _check_states(op: str, kept: tuple[str, ...], **states: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    """The lists of the states that a rule keeps; the others must be empty."""
    for argument, tensors in states.items():
        if tensors and argument.replace("absmax", "state") not in kept:
            raise ValueError(
                f"{op}: {argument} has {len(tensors)} tensors, expected none: the rule has {', '.join(kept) or 'no state'}."
            )
    return {argument: tensors for argument, tensors in states.items() if argument.replace("absmax", "state") in kept}


def _check_lists(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    count = len(lists["params"])
    for argument, tensors in lists.items():
        if len(tensors) != count:
            raise ValueError(f"{op}: {argument} has {len(tensors)} tensors, expected {count}, one a parameter.")
    for i, tensors in enumerate(zip(*lists.values(), strict=True)):
        check.one_device(op, [f"{argument}[{i}]" for argument in lists], *tensors)
    for i, (param, grad) in enumerate(zip(lists["params"], lists["grads"], strict=True)):
        check.floating(op, f"params[{i}]", param)
        check.same_dtype(op, f"grads[{i}]", grad, f"params[{i}]", param.dtype)
        if grad.shape != param.shape:
            check.wrong_shape(op, f"grads[{i}]", check.shape_of(grad), f"the parameter's {check.shape_of(param)}")
        if not param.is_contiguous():
            raise ValueError(f"{op}: params[{i}] is not contiguous, expected a contiguous tensor; call .contiguous() on it.")


def _check_counters(op: str, skipped: Sequence[Tensor]) -> None:
    for i, counter in enumerate(skipped):
        check.exact_dtype(op, f"skipped[{i}]", counter, torch.int64)
        if counter.shape != ():
            check.wrong_shape(op, f"skipped[{i}]", check.shape_of(counter), "[]")


def _check_state(op: str, argument: str, state: Tensor, dtype: torch.dtype, param: Tensor) -> None:
    check.exact_dtype(op, argument, state, dtype)
    if state.numel() != param.numel():
        check.wrong_shape(op, argument, check.shape_of(state), f"{param.numel()} elements, as its parameter has")
    if not state.is_contiguous():
        raise ValueError(f"{op}: {argument} is not contiguous, expected a contiguous tensor.")


def check_optimizer_step_8bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    state3: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    absmax3: Sequence[Tensor],
    skipped: Sequence[Tensor],
    code1: Tensor,
    code2: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    trust_coefficient: float,
    step: int,
    blocksize: int,
) -> None:
    op = "optimizer_step_8bit"
    _check_rule(
        op, name, lr, weight_decay, step, beta1=beta1, beta2=beta2, beta3=beta3, alpha=alpha, eps=eps,
        dampening=dampening, nesterov=nesterov, trust_coefficient=trust_coefficient,
    )  # fmt: skip
    check.block_size(op, blocksize)
    check.one_device(op, ("code1", "code2", "params[0]")[: 2 + len(params[:1])], code1, code2, *params[:1])
    for argument, code in (("code1", code1), ("code2", code2)):
        check_code(op, argument, code)
        if code.shape[0] != 256:
            check.wrong_shape(op, argument, check.shape_of(code), "[256]")
    states = _check_states(
        op, RULES[name].names(beta1),
        state1=state1, state2=state2, state3=state3, absmax1=absmax1, absmax2=absmax2, absmax3=absmax3,
    )  # fmt: skip
    _check_lists(op, {"params": params, "grads": grads, **states} | ({"skipped": skipped} if skipped else {}))
    _check_counters(op, skipped)
    for argument, tensors in states.items():
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if argument.startswith("absmax"):
                check_absmax(op, tensor, param.numel(), blocksize, f"{argument}[{i}]")
            else:
                _check_state(op, f"{argument}[{i}]", tensor, torch.uint8, param)


def check_optimizer_step_32bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    state3: Sequence[Tensor],
    skipped: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    trust_coefficient: float,
    step: int,
) -> None:
    op = "optimizer_step_32bit"
    _check_rule(
        op, name, lr, weight_decay, step, beta1=beta1, beta2=beta2, beta3=beta3, alpha=alpha, eps=eps,
        dampening=dampening, nesterov=nesterov, trust_coefficient=trust_coefficient,
    )  # fmt: skip
    states = _check_states(op, RULES[name].names(beta1), state1=state1, state2=state2, state3=state3)
    _check_lists(op, {"params": params, "grads": grads, **states} | ({"skipped": skipped} if skipped else {}))
    _check_counters(op, skipped)
    for argument, tensors in states.items():
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            _check_state(op, f"{argument}[{i}]", tensor, torch.float32, param)


RECORDS = (
    OpRecord(
        name="optimizer_step_8bit",
        family="optim",
        check=check_optimizer_step_8bit,
        fake=check_optimizer_step_8bit,
        operands={
            "params": Operand(check.FLOATS, "..."),
            "grads": Operand(("params",), "..."),
            **dict.fromkeys(ALL_STATES, Operand((torch.uint8,), "numel", flat=True)),
            **dict.fromkeys(("absmax1", "absmax2", "absmax3"), Operand((torch.float32,), "ceil(numel / blocksize)")),
            "skipped": Operand((torch.int64,), ""),
            **dict.fromkeys(("code1", "code2"), Operand((torch.float32,), "256")),
        },
        samples=samples.optimizer_step_8bit,
        bound=bounds.optimizer_step,
        mutates=("params", "state1", "state2", "state3", "absmax1", "absmax2", "absmax3", "skipped"),
        neutral=NEUTRAL | {"absmax3": []},
    ),
    OpRecord(
        name="optimizer_step_32bit",
        family="optim",
        check=check_optimizer_step_32bit,
        fake=check_optimizer_step_32bit,
        operands={
            "params": Operand(check.FLOATS, "..."),
            "grads": Operand(("params",), "..."),
            **dict.fromkeys(ALL_STATES, Operand((torch.float32,), "numel", flat=True)),
            "skipped": Operand((torch.int64,), ""),
        },
        samples=samples.optimizer_step_32bit,
        bound=bounds.optimizer_step,
        mutates=("params", "state1", "state2", "state3", "skipped"),
        neutral=NEUTRAL,
    ),
)
