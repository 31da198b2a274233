"""Quantize a model in place, and say what was done."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WEIGHT_DTYPES
from q_nn.config import DEFAULT_SKIP, QConfig
from q_nn.layers import around, replace_module
from q_nn.lora.adapted import refuse_adapted
from q_nn.memory import tensor_bytes, weight_bytes
from q_nn.patterns import matching
from q_nn.sharded import refuse_sharded
from q_nn.ties import parameter_owners


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A layer that was quantized, with the bytes of its weight."""

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class KeptParameter:
    """A parameter that was left as it was, and why."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What :func:`quantize` did: every parameter of the model is in one of the two lists, but the biases of quantized layers.

    Attributes:
        quantized: layers whose weight was quantized.
        kept: parameters that were not.
        bytes_before, bytes_after: of all parameters and buffers.
    """

    quantized: tuple[QuantizedLayer, ...]
    kept: tuple[KeptParameter, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        """A few lines for people; parameters that were kept are grouped by reason."""
        lines = [f"quantized {len(self.quantized)} layers: {self.bytes_before:,} bytes before, {self.bytes_after:,} after"]
        by_reason: dict[str, list[KeptParameter]] = defaultdict(list)
        for parameter in self.kept:
            by_reason[parameter.reason].append(parameter)
        for reason, parameters in by_reason.items():
            names = ", ".join(parameter.name for parameter in parameters[:3]) + (", …" if len(parameters) > 3 else "")
            total = sum(parameter.bytes for parameter in parameters)
            lines.append(f"kept {len(parameters)} ({total:,} bytes), {reason}: {names}")
        return "\n".join(lines)


def quantize(model: nn.Module, config: QConfig, *, progress: bool = False) -> QuantizeReport:
    """Quantize the linear layers of a model in place, one after the other.

    Each ``nn.Linear`` becomes a :class:`LinearNF4`, :class:`LinearFP4` or :class:`Linear8bitLt` at the same place, with the same bias.
    What can't be quantized is left alone and reported: a weight that other modules share (tied embeddings), subclasses of ``nn.Linear``
    and everything that isn't one, and what ``config.skip`` names.

    Args:
        model: on any device but "meta".
        config: format and what to skip.
        progress: show a progress bar.

    Returns:
        What was quantized, what not and why, and the bytes before and after.

    Raises:
        ValueError: a weight has elements that are not finite, or is on the meta device, or nothing is there to quantize, or
            a pattern of ``config.skip`` means nothing, or the model is sharded or has adapters; the message names it, and
            nothing is changed.
    """
    if not isinstance(config, QConfig):
        raise TypeError(f"quantize: config is {type(config).__name__}, expected a QConfig")
    refuse_sharded("quantize", model, "quantize before fully_shard")
    refuse_adapted("quantize", model)
    _check_skip(model, config)
    chosen, kept = _plan(model, config)
    _check_weights(chosen)
    before = weight_bytes(model)
    format = config.weight_format()
    done = []
    for name, linear in tqdm(chosen.items(), desc=f"quantize to {config.format}", unit="layer", disable=not progress):
        weight = QuantizedTensor.quantize(linear.weight, format)
        done.append(QuantizedLayer(name, tuple(weight.shape), linear.weight.nbytes, weight.stored_bytes))
        replace_module(model, linear, around(linear, weight))
    return QuantizeReport(tuple(done), tuple(kept), before, weight_bytes(model))


def _plan(model: nn.Module, config: QConfig) -> tuple[dict[str, nn.Linear], list[KeptParameter]]:
    owners = parameter_owners(model)
    chosen: dict[str, nn.Linear] = {}
    kept: list[KeptParameter] = []
    for name, module in model.named_modules():
        reason = _why_not(name, module, owners, config)
        if reason is None:
            assert isinstance(module, nn.Linear)
            chosen[name] = module
            continue
        for own, parameter in module._parameters.items():
            if parameter is not None:
                why = "one-dimensional" if parameter.ndim < 2 and not isinstance(module, nn.Linear) else reason
                kept.append(KeptParameter(f"{name}.{own}".lstrip("."), tuple(parameter.shape), tensor_bytes(parameter), why))
    if not chosen:
        raise ValueError("quantize: the model has no linear layer to quantize: " + "; ".join(sorted({k.reason for k in kept})))
    return chosen, kept


def _why_not(name: str, module: nn.Module, owners: dict[int, list[str]], config: QConfig) -> str | None:
    """Why a module isn't quantized; ``None`` if it is."""
    weight = module._parameters.get("weight")
    if isinstance(weight, QuantizedTensor):
        return "quantized already"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not nn.Linear"
    if not name:
        return "the model itself is the layer, so that nothing can hold another in its place; use from_linear"
    if (pattern := matching(name, config.skip)) is not None:
        return f"skipped by {pattern!r}"
    if weight is None:
        return "its weight is computed, not a parameter"
    others = [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]
    if others:
        return f"tied to {', '.join(others)}"
    if weight.dtype not in WEIGHT_DTYPES:
        return f"its dtype is {weight.dtype}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which another layer would lose"
    return None


def _check_skip(model: nn.Module, config: QConfig) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in config.skip:
        if pattern not in DEFAULT_SKIP and not any(matching(name, (pattern,)) for name in names):
            raise ValueError(
                f"quantize: skip pattern {pattern!r} means no module; a name is matched from its start or by its end, "
                f"such as {names[-1]!r}, or '.*part' for what holds a part"
            )


def _check_weights(chosen: dict[str, nn.Linear]) -> None:
    for name, linear in chosen.items():
        if linear.weight.is_meta:
            raise ValueError(f"quantize: {name}.weight is on the meta device, expected real values; load the model first")
        if count := _non_finite(linear.weight):
            raise ValueError(f"quantize: {name}.weight has {count} elements that are NaN or infinite, expected finite ones")


@torch.no_grad()
def _non_finite(weight: Tensor) -> int:
    return int((~torch.isfinite(weight)).sum())
