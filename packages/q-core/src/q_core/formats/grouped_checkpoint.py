"""The flat key layout of weights in groups of integers, which only this package has.

At the key ``layer.weight`` are the codes, at ``layer.weight.<component>`` the other components as :mod:`q_core.formats.grouped_int` has
them, and at ``layer.weight.quant_state.q__grouped`` the bytes of a JSON object: "affine" or "super" as ``format``, the fields of that
format, and the weight's ``dtype`` and ``shape``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from q_core.formats.grouped_int import AffineGroups, GroupedInt, SuperGroups
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WEIGHT_DTYPES, Components
from q_core.specs.check import short

_CLASSES: dict[str, type[GroupedInt]] = {"affine": AffineGroups, "super": SuperGroups}
_DTYPES = {short(dtype): dtype for dtype in WEIGHT_DTYPES}
_MAX_SIZE = 2**40


def state_key(key: str) -> str:
    """Where the description of a weight is."""
    return f"{key}.quant_state.q__grouped"


def component_keys(key: str, format: GroupedInt) -> dict[str, str]:
    """The key of each component."""
    return {name: key if name == "codes" else f"{key}.{name}" for name in format.component_names}


def present_keys(key: str, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The keys in ``state`` that belong to such a weight at ``key``; none if there is no such weight."""
    if state_key(key) not in state:
        return ()
    names = {name for format in (AffineGroups(8, ordered=True), SuperGroups()) for name in component_keys(key, format).values()}
    return tuple(name for name in (*sorted(names), state_key(key)) if name in state)


def to_flat(key: str, weight: QuantizedTensor, format: GroupedInt) -> dict[str, Tensor]:
    """Lay a weight out in plain tensors, which share its memory."""
    (kind,) = (name for name, type_ in _CLASSES.items() if type(format) is type_)
    fields = {field.name: getattr(format, field.name) for field in dataclasses.fields(format)}
    plain = {name: short(value) if isinstance(value, torch.dtype) else value for name, value in fields.items()}
    description = {"format": kind, **plain, "dtype": short(weight.dtype), "shape": list(weight.shape)}
    components = weight.components
    flat = {name: components[component] for component, name in component_keys(key, format).items()}
    flat[state_key(key)] = torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)
    return flat


def read(
    key: str, state: Mapping[str, Tensor], description: dict[str, Any]
) -> tuple[Components, GroupedInt, list[int], torch.dtype]:
    """The components, format, shape and dtype of the weight at a key.

    Args:
        key: the weight's.
        state: tensors by key, others among them.
        description: what the JSON at :func:`state_key` holds.

    Raises:
        ValueError: a tensor is missing, or what it holds contradicts the rest; the message names it.
    """
    where = state_key(key)
    format, shape, dtype = _describe(where, description)
    try:
        expected = format.empty(shape, "meta")
    except ValueError as error:
        raise ValueError(f"checkpoint: {where}: {error}") from error
    keys = component_keys(key, format)
    components = {}
    for name, like in expected.items():
        got = state.get(keys[name])
        if got is None or got.dtype != like.dtype or got.shape != like.shape:
            found = "is missing" if got is None else f"is {short(got.dtype)} {list(got.shape)}"
            _refuse(keys[name], found, f"{short(like.dtype)} {list(like.shape)}")
        if got.is_floating_point() and not got.is_meta and not bool(torch.isfinite(got).all()):
            _refuse(keys[name], "has scales that are NaN or infinite", "finite ones")
        components[name] = got
    for extra in sorted({*present_keys(key, state)} - {*keys.values(), where}):
        _refuse(extra, "is there", f"no such key, as {where} doesn't speak of it")
    order = components.get("order")
    if (
        order is not None
        and not order.is_meta
        and not bool((order.sort().values == torch.arange(shape[1], device=order.device)).all())
    ):
        _refuse(keys["order"], "is no order of the columns", f"each of 0 to {shape[1] - 1} once")
    return components, format, shape, dtype


def _describe(where: str, description: dict[str, Any]) -> tuple[GroupedInt, list[int], torch.dtype]:
    kind = description.get("format")
    if not isinstance(kind, str) or kind not in _CLASSES:
        _refuse(where, f"says the format {kind!r}", f"one of {tuple(_CLASSES)}")
    fields = {field.name: type(field.default) for field in dataclasses.fields(_CLASSES[kind])}
    if set(description) != {"format", *fields, "dtype", "shape"}:
        _refuse(where, f"has the fields {sorted(description)}", str(sorted({"format", *fields, "dtype", "shape"})))
    values = {name: description[name] for name in fields}
    for name, expected in (*fields.items(), ("dtype", torch.dtype)):
        value = description[name]
        if expected is torch.dtype:
            if not isinstance(value, str) or value not in _DTYPES:
                _refuse(where, f"says {name} {value!r}", f"one of {tuple(_DTYPES)}")
            values[name] = _DTYPES[value]
        elif type(value) is not expected:
            _refuse(where, f"says {name} {value!r}", f"a value of {expected.__name__}")
    dtype = values.pop("dtype")
    shape = description["shape"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and 0 <= size < _MAX_SIZE for size in shape):
        _refuse(where, f"says shape {shape!r}", "two sizes [N, K]")
    try:
        return _CLASSES[kind](**values), shape, dtype
    except ValueError as error:
        raise ValueError(f"checkpoint: {where}: {error}") from error


def _refuse(key: str, got: str, expected: str) -> NoReturn:
    raise ValueError(f"checkpoint: {key} {got}, expected {expected}")
