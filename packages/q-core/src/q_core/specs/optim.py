"""Records of the optim family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from q_core.record import OpRecord
from q_core.samples import optim as samples
from q_core.specs import bounds, check
from q_core.specs.quantize import check_absmax, check_code

OptimizerName = Literal["adamw"]
NAMES = get_args(OptimizerName)


def _check_rule(op: str, name: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> None:
    if name not in NAMES:
        check.wrong_value(op, "name", name, "one of " + ", ".join(map(repr, NAMES)))
    for argument, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < float("inf"):
            check.wrong_value(op, argument, value, "a finite number, 0 or more")
    for argument, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= value < 1.0:
            check.wrong_value(op, argument, value, "0 or more and less than 1")
    if step < 1:
        check.wrong_value(op, "step", step, "1 or more; the first step is 1")


def _check_lists(op: str, **lists: Sequence[Tensor]) -> None:
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
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    code1: Tensor,
    code2: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    blocksize: int,
) -> None:
    op = "optimizer_step_8bit"
    _check_rule(op, name, lr, beta1, beta2, eps, weight_decay, step)
    check.block_size(op, blocksize)
    check_code(op, "code1", code1)
    check_code(op, "code2", code2)
    _check_lists(op, params=params, grads=grads, state1=state1, state2=state2, absmax1=absmax1, absmax2=absmax2)
    check.one_device(op, ("params[0]", "code1", "code2"), params[0], code1, code2)
    for i, param in enumerate(params):
        _check_state(op, f"state1[{i}]", state1[i], torch.uint8, param)
        _check_state(op, f"state2[{i}]", state2[i], torch.uint8, param)
        check_absmax(op, absmax1[i], param.numel(), blocksize)
        check_absmax(op, absmax2[i], param.numel(), blocksize)


def check_optimizer_step_32bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    op = "optimizer_step_32bit"
    _check_rule(op, name, lr, beta1, beta2, eps, weight_decay, step)
    _check_lists(op, params=params, grads=grads, state1=state1, state2=state2)
    for i, param in enumerate(params):
        _check_state(op, f"state1[{i}]", state1[i], torch.float32, param)
        _check_state(op, f"state2[{i}]", state2[i], torch.float32, param)


RECORDS = (
    OpRecord(
        name="optimizer_step_8bit",
        family="optim",
        check=check_optimizer_step_8bit,
        fake=check_optimizer_step_8bit,
        samples=samples.optimizer_step_8bit,
        bound=bounds.optimizer_step,
        mutates=("params", "state1", "state2", "absmax1", "absmax2"),
    ),
    OpRecord(
        name="optimizer_step_32bit",
        family="optim",
        check=check_optimizer_step_32bit,
        fake=check_optimizer_step_32bit,
        samples=samples.optimizer_step_32bit,
        bound=bounds.optimizer_step,
        mutates=("params", "state1", "state2"),
    ),
)
