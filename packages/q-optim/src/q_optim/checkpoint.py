"""What a saved state must be like to be taken over; and states that bitsandbytes' optimizers saved, made into ours.

bitsandbytes keeps up to two states of a parameter: ``state1`` and ``state2``, float32, or uint8 codes with ``absmax1``, ``absmax2`` in
blocks of 256 and the code books ``qmap1``, ``qmap2``. Where an algorithm has one state, it is ``state1``, a second moment too; AdEMAMix
stacks its first moments in ``state1``. Codes of our books are taken as they are; others are decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from q_core import ops
from q_core.formats.codebooks import dynamic_map
from q_optim.segment import absmax_key
from q_optim.storage import DEFAULT_BLOCKSIZES, Part, scales_shape

if TYPE_CHECKING:
    from q_optim.optimizer import BlockwiseOptimizer

_WRAPPED = "__bnb_optimizer_quant_state__"


def check_groups(what: str, saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], expected: Iterable[str]) -> None:
    """Refuse groups that are of another model, another order or another algorithm."""
    sizes = [len(group["params"]) for group in saved], [len(group["params"]) for group in own]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{what}: the saved groups have {sizes[0]} parameters, this optimizer's have {sizes[1]}; build it on the same model"
        )
    for there, here in zip(saved, own, strict=True):
        for theirs, ours in zip(there.get("param_names", ()), here.get("param_names", ()), strict=False):
            if theirs != ours:
                raise ValueError(
                    f"{what}: the saved state has {theirs!r} where this optimizer has {ours!r}; give parameters in the same order"
                )
        if there.get("algorithm", here["algorithm"]) != here["algorithm"]:
            raise ValueError(
                f"{what}: the state is of {there['algorithm']}, expected one of {here['algorithm']}; was it saved by another optimizer?"
            )
        missing = set(expected) - set(there)
        if missing:
            raise ValueError(f"{what}: a parameter group has no {sorted(missing)}; was it saved by another optimizer?")


def check_state(what: str, state: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """Refuse a state that isn't of these tensors."""
    expected = {part.key: part for part in parts}
    if set(state) != {"step", *expected}:
        raise ValueError(
            f"{what} holds {sorted(state)}, expected {sorted({'step', *expected})}; "
            "was it saved by another optimizer, or with other optim_bits, min_8bit_size or overrides?"
        )
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"{what}: step is {state['step']!r}, expected an int of 0 or more")
    for key, part in expected.items():
        got = state[key]
        if not isinstance(got, Tensor) or got.dtype != part.dtype or got.shape != part.shape:
            described = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise ValueError(
                f"{what}: {key} is {described}, expected {part.dtype} {list(part.shape)}; "
                "optim_bits, min_8bit_size, blocksize and overrides must be as they were when it was saved"
            )


def as_ours(what: str, optimizer: BlockwiseOptimizer, state_dict: StateDict) -> StateDict:
    """A state of bitsandbytes' optimizer of the same algorithm as ours would have saved it; any other as it is."""
    groups, states = state_dict["param_groups"], dict(state_dict["state"])
    if not _is_bitsandbytes(groups):
        return state_dict
    check_groups(what, groups, optimizer.param_groups, ())
    states = {index: {**state, **state.get(_WRAPPED, {})} for index, state in states.items()}
    converted, own_groups = {}, []
    for saved, own in zip(groups, optimizer.param_groups, strict=True):
        _check_algorithm(what, optimizer, saved, [states[index] for index in saved["params"] if index in states])
        group = {**own, **optimizer.settings_of_bitsandbytes(saved), "params": saved["params"]}
        own_groups.append(group)
        names = optimizer.update(group, 1).states
        for index, param in zip(saved["params"], own["params"], strict=True):
            if index in states:
                converted[index] = _converted(f"{what}: the state of parameter {index}", states.pop(index), names)
                for name, held in converted[index].items():
                    if name.startswith("absmax"):
                        shape = scales_shape(param.shape, DEFAULT_BLOCKSIZES[8])
                        converted[index][name] = held.view(shape) if held.numel() == shape.numel() else held
    return {**state_dict, "state": {**converted, **states}, "param_groups": own_groups}


def _is_bitsandbytes(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Its groups have betas whatever the algorithm, and nothing of how states are held, as ours have, or are computed, as torch's."""
    return all("betas" in group and "optim_bits" not in group and "foreach" not in group for group in groups)


def _check_algorithm(
    what: str, optimizer: BlockwiseOptimizer, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse states of another algorithm; Adam's and AdamW's are alike."""
    if not states:
        return
    algorithms = _saved_by(group, set().union(*states))
    if not algorithms & {cls.__name__ for cls in type(optimizer).__mro__}:
        names = " or ".join(sorted(algorithms))
        raise ValueError(f"{what}: the states were saved by bitsandbytes' {names}; load them into the optimizer of that name")


def _saved_by(group: Mapping[str, Any], keys: set[str]) -> set[str]:
    """Which of bitsandbytes' algorithms it can have been. They aren't named, but differ in their states and in how they use settings."""
    bounds_norms = "unorm_vec" in keys
    if "state2" in keys:
        return {"AdEMAMix"} if len(group["betas"]) == 3 else {"LAMB"} if bounds_norms else {"Adam", "AdamW"}
    if group["eps"]:
        return {"RMSprop"} if group["betas"][0] else {"Adagrad"}
    return {"Lion"} if group["betas"][1] else {"LARS"} if bounds_norms else {"SGD"}


def _converted(what: str, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Theirs: state1, stacked or alone, and state2. Ours: ``names``, state1 and state3 first moments, state2 a second one."""
    firsts = [name for name in names if name != "state2"]
    ours = {"state1": firsts or ["state2"], **({"state2": ["state2"]} if firsts and "state2" in names else {})}
    if {key for key in state if key.startswith("state")} != set(ours):
        raise ValueError(f"{what} holds {sorted(state)}, expected {' and '.join(ours)}; was it saved by another optimizer?")
    converted: dict[str, Any] = {"step": int(state["step"])}
    for key, kept in ours.items():
        for i, name in enumerate(kept):
            held, absmax = state[key], state.get(absmax_key(key))
            if len(kept) > 1:
                held, absmax = held[i], absmax[i] if absmax is not None else None
            converted |= _held(name, held, absmax, state.get(key.replace("state", "qmap")))
    return converted


def _held(name: str, held: Tensor, absmax: Tensor | None, book: Tensor | None) -> dict[str, Tensor]:
    if absmax is None or book is None:
        return {name: held}
    ours = dynamic_map(signed=name != "state2", device=book.device)
    if not torch.equal(book, ours):
        value = ops.dequantize_blockwise(held, absmax, book, blocksize=DEFAULT_BLOCKSIZES[8])
        held, absmax = ops.quantize_blockwise(value, ours, blocksize=DEFAULT_BLOCKSIZES[8])
    return {name: held, absmax_key(name): absmax}
