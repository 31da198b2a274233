"""What the optimizers share: states in 8 or 32 bits, one op call a group of parameters, exact checkpoints.

A subclass names its update rule, which :mod:`q_core.ops.optim` defines. Per parameter the state is ``step``, an int, then ``state1`` and
``state2``, either float32 of the parameter's shape, or uint8 codes of that shape with ``absmax1`` and ``absmax2``, float32 a block.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from q_core import ops
from q_core.formats.codebooks import BLOCKSIZES, DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from q_core.optimizers import OptimizerName
from q_core.specs.check import FLOATS

_STATE_KEYS = {
    8: ("step", "state1", "state2", "absmax1", "absmax2"),
    32: ("step", "state1", "state2"),
}


class BlockwiseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers; see :class:`q_optim.AdamW8bit` for the arguments."""

    rule: ClassVar[OptimizerName]

    def __init__(self, params: ParamsT, **defaults: Any) -> None:
        _check_group(type(self).__name__, defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group(type(self).__name__, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.requires_grad and param.dtype not in FLOATS:
                self.param_groups.pop()
                raise TypeError(
                    f"{type(self).__name__}: a parameter {list(param.shape)} has dtype {param.dtype}, "
                    "expected float32, bfloat16 or float16"
                )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, calls ``backward`` and returns the loss, which is then returned.

        Raises:
            ValueError: a gradient is sparse; nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [param for param in group["params"] if param.grad is not None]) for group in self.param_groups]
        for _, params in groups:
            for param in params:
                if param.grad.is_sparse:
                    raise ValueError(
                        f"{type(self).__name__}: the gradient of a parameter {list(param.shape)} is sparse, expected a dense one; "
                        "build its nn.Embedding with sparse=False"
                    )
        for group, params in groups:
            self._update_group(group, params)
        return loss

    def _update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """One op call for all parameters that share a device, a precision and a step number."""
        buckets: dict[tuple[torch.device, int, int], list[Tensor]] = defaultdict(list)
        for param in params:
            state = self.state[param]
            if not state:
                state.update(_new_state(group, param))
            buckets[param.device, _bits(group, param), state["step"] + 1].append(param)
        for (_, bits, step), bucket in buckets.items():
            self._update_bucket(group, bucket, bits, step)

    def _update_bucket(self, group: dict[str, Any], params: list[Tensor], bits: int, step: int) -> None:
        # The ops walk memory flat, so a parameter that isn't contiguous (channels_last, say) is updated in a copy and written back.
        flat = [param if param.is_contiguous() else param.contiguous() for param in params]
        grads = [param.grad.contiguous() for param in params if param.grad is not None]
        states = [self.state[param] for param in params]
        hyper = {
            "lr": float(group["lr"]),
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "step": step,
        }
        state1 = [state["state1"] for state in states]
        state2 = [state["state2"] for state in states]
        if bits == 8:
            ops.optimizer_step_8bit(
                self.rule,
                flat,
                grads,
                state1,
                state2,
                absmax1=[state["absmax1"] for state in states],
                absmax2=[state["absmax2"] for state in states],
                blocksize=group["blocksize"],
                **hyper,
            )
        else:
            ops.optimizer_step_32bit(self.rule, flat, grads, state1, state2, **hyper)
        for param, updated, state in zip(params, flat, states, strict=True):
            if updated is not param:
                param.copy_(updated)
            state["step"] = step

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over what ``state_dict()`` gave, bit for bit; resumed training continues as if it had not stopped.

        Raises:
            ValueError: a state is missing, or doesn't fit its parameter; nothing is changed then.
        """
        states = self._checked_states(state_dict)
        # torch would cast codes and scales to the parameter's dtype, so it gets the groups alone.
        super().load_state_dict({**state_dict, "state": {}})
        for param, state in states:
            self.state[param] = {
                key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value for key, value in state.items()
            }

    def _checked_states(self, state_dict: StateDict) -> list[tuple[Tensor, dict[str, Any]]]:
        name = f"{type(self).__name__}.load_state_dict"
        groups, states = state_dict["param_groups"], dict(state_dict["state"])
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(
                f"{name}: the saved groups don't have as many parameters as this optimizer's; build it on the same model"
            )
        checked = []
        for saved, own in zip(groups, self.param_groups, strict=True):
            missing = set(self.defaults) - set(saved)
            if missing:
                raise ValueError(f"{name}: a parameter group has no {sorted(missing)}; was it saved by another optimizer?")
            _check_group(name, saved)
            for index, param in zip(saved["params"], own["params"], strict=True):
                state = states.pop(index, None)
                if state:
                    _check_state(f"{name}: state of parameter {index}", state, saved, param)
                    checked.append((param, state))
        if states:
            raise ValueError(f"{name}: there are states of parameters {sorted(states)}, which no group has")
        return checked


def _bits(group: dict[str, Any], param: Tensor) -> int:
    return 8 if group["bits"] == 8 and param.numel() >= group["min_8bit_size"] else 32


def _blocks(group: dict[str, Any], param: Tensor) -> int:
    return -(-param.numel() // int(group["blocksize"]))


def _new_state(group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    if _bits(group, param) == 32:
        moments = {name: torch.zeros(param.shape, dtype=torch.float32, device=param.device) for name in ("state1", "state2")}
        return {"step": 0, **moments}
    state: dict[str, Any] = {"step": 0}
    for name, signed in (("state1", True), ("state2", False)):
        zero = (DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED).index(0.0)
        state[name] = torch.full(param.shape, zero, dtype=torch.uint8, device=param.device)
    for name in ("absmax1", "absmax2"):
        state[name] = torch.zeros(_blocks(group, param), dtype=torch.float32, device=param.device)
    return state


def _check_state(what: str, state: dict[str, Any], group: dict[str, Any], param: Tensor) -> None:
    bits = _bits(group, param)
    if set(state) != set(_STATE_KEYS[bits]):
        raise ValueError(f"{what} holds {sorted(state)}, expected {sorted(_STATE_KEYS[bits])}")
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"{what}: step is {state['step']!r}, expected an int of 0 or more")
    codes = torch.uint8 if bits == 8 else torch.float32
    expected = {"state1": (codes, param.shape), "state2": (codes, param.shape)}
    if bits == 8:
        scales = torch.float32, torch.Size([_blocks(group, param)])
        expected |= {"absmax1": scales, "absmax2": scales}
    for key, (dtype, shape) in expected.items():
        got = state[key]
        if not isinstance(got, Tensor) or got.dtype != dtype or got.shape != shape:
            described = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise ValueError(f"{what}: {key} is {described}, expected {dtype} {list(shape)}")


def _check_group(what: str, group: dict[str, Any]) -> None:
    """Refuse hyper-parameters that can't be meant, before any training."""
    for key in ("lr", "eps", "weight_decay"):
        _check_number(what, key, group[key], upper=math.inf)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{what}: betas is {betas!r}, expected two numbers")
    for key, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        _check_number(what, key, beta, upper=1.0)
    if group["bits"] not in _STATE_KEYS:
        raise ValueError(f"{what}: bits is {group['bits']!r}, expected 8 or 32")
    if type(group["min_8bit_size"]) is not int or group["min_8bit_size"] < 0:
        raise ValueError(f"{what}: min_8bit_size is {group['min_8bit_size']!r}, expected an int of 0 or more")
    if type(group["blocksize"]) is not int or group["blocksize"] not in BLOCKSIZES:
        raise ValueError(f"{what}: blocksize is {group['blocksize']!r}, expected one of {BLOCKSIZES}")


def _check_number(what: str, key: str, value: object, *, upper: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}: {key} is {type(value).__name__}, expected a number")
    if not 0 <= value < upper:
        raise ValueError(f"{what}: {key} is {value}, expected a number of 0 or more{' and below 1' if upper == 1 else ', finite'}")
