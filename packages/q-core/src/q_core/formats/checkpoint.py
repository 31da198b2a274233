"""The flat key layout of bitsandbytes' checkpoints, both ways.

A quantized weight at the key ``layer.weight`` is held in plain tensors, so that safetensors can store it and others can read it:

- nf4 and fp4: ``layer.weight`` uint8 [ceil(numel / 2), 1], ``layer.weight.absmax``, ``.quant_map``, ``.nested_absmax``,
  ``.nested_quant_map``, and ``.quant_state.bitsandbytes__nf4`` (or ``__fp4``), the bytes of a JSON object with the rest;
- int8: ``layer.weight`` int8 [N, K] and its siblings ``layer.SCB`` float32 [N] and ``layer.weight_format``. bitsandbytes has no other
  parameters in int8; of one by another name, such as the stacked ``experts.gate_up_proj`` [E, N, K], they are ``experts.gate_up_proj.SCB``
  float32 [E, N] and ``experts.gate_up_proj.weight_format``;
- fp8 rows, which bitsandbytes doesn't have: ``layer.weight`` float8_e4m3fn [..., N, K] and ``layer.weight.absmax`` float32 [..., N].

The 4-bit types that bitsandbytes doesn't have are laid out likewise, under a key that its readers don't take for theirs:

- int4, mxfp4, nvfp4: as above, but ``.quant_state.q__int4`` (or ``__mxfp4``, ``__nvfp4``), whose JSON object has one field more,
  ``scale_dtype``. It says what ``layer.weight.absmax`` [blocks] is held in: "float32"; "e8m0" (mxfp4), uint8 codes ``e + 127`` of
  ``6 * 2^e``; or "e4m3" (nvfp4), the uint8 codes of E4M3 values ``d`` of ``6 * (tensor_scale * d)``, with ``.tensor_scale`` float32 [].

Weights in groups of integers have a layout of their own, :mod:`q_core.formats.grouped_checkpoint`.

What is read is not trusted: :func:`from_flat` checks every key, dtype, length and JSON field against the others, and that every scale is
one, and gives a whole tensor or raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor

from q_core.formats import grouped_checkpoint
from q_core.formats.codebooks import BLOCKSIZES, FOUR_BIT_BOOKS, FourBitType, book_tensor, dynamic_map
from q_core.formats.four_bit import FourBit
from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.grouped_int import GroupedInt
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WEIGHT_DTYPES, Components, WeightFormat
from q_core.specs.check import short

_OWNERS = dict.fromkeys(FOUR_BIT_BOOKS, "q") | {"nf4": "bitsandbytes", "fp4": "bitsandbytes"}
"""Whose layout a 4-bit type has."""

_DTYPES = {short(dtype): dtype for dtype in WEIGHT_DTYPES}
_SCALE_DTYPES = {"absmax": ("float32",), "e8m0": ("e8m0", "float32"), "e4m3": ("e4m3", "float32")}
"""What scales may be held in, by the rule they are made by; first what they usually are."""
_SCALE_PARTS = ("absmax", "nested_absmax", "nested_quant_map", "tensor_scale")
"""What scales may be held in, each at a key of its own."""

_MAX_JSON_BYTES = 4096
_JSON_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_JSON_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_ROW_MAJOR = 0
"""bitsandbytes' code for the one layout of int8 weights that it still writes."""


def flat_keys(key: str, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The keys in ``state`` that belong to a quantized weight at ``key``; none if the weight there isn't quantized."""
    if grouped := grouped_checkpoint.present_keys(key, state):
        return grouped
    state_key = _quant_state_key(key, state)
    if state_key is not None:
        candidates = (key, *(f"{key}.{part}" for part in ("quant_map", *_SCALE_PARTS)), state_key)
    elif key in state and state[key].dtype == torch.int8:
        candidates = (key, *_siblings(key))
    elif key in state and state[key].dtype == torch.float8_e4m3fn:
        candidates = (key, f"{key}.absmax")
    else:
        return ()
    return tuple(candidate for candidate in candidates if candidate in state)


def row_keys(key: str, format: WeightFormat) -> dict[str, str]:
    """The keys whose tensors are divided when the rows of a weight are, by component; what the others hold is of the whole weight."""
    if isinstance(format, Int8Rows):
        return {"codes": key, "absmax": _siblings(key)[0]}
    if isinstance(format, GroupedInt):
        return grouped_checkpoint.component_keys(key, format)
    if isinstance(format, Fp8Rows):
        return {"codes": key, "absmax": f"{key}.absmax"}
    return {"packed": key, "absmax": f"{key}.absmax"}


def to_flat(key: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """Lay a quantized weight out in plain tensors.

    Args:
        key: the weight's key, such as "model.layers.0.mlp.up_proj.weight".
        weight: of any format in the layout.

    Returns:
        Tensors by key. They share the weight's memory, but for the code books: safetensors refuses tensors that share memory with
        each other, and those are one a process.
    """
    format = weight.format
    if isinstance(format, GroupedInt):
        return grouped_checkpoint.to_flat(key, weight, format)
    components = weight.components
    if isinstance(format, Int8Rows):
        scale_key, layout_key = _siblings(key)
        layout = torch.tensor(_ROW_MAJOR, dtype=torch.uint8)
        return {key: components["codes"], scale_key: components["absmax"], layout_key: layout}
    if isinstance(format, Fp8Rows):
        return {key: components["codes"], f"{key}.absmax": components["absmax"]}
    if not isinstance(format, FourBit):
        raise TypeError(f"to_flat: {key} is held as {format}, which the layout doesn't have; expected FourBit, Int8Rows or Fp8Rows")
    description: dict[str, Any] = {
        "quant_type": format.quant_type,
        "blocksize": format.blocksize,
        "dtype": short(weight.dtype),
        "shape": list(weight.shape),
    }
    flat = {
        key: components["packed"].unsqueeze(1),
        f"{key}.absmax": components["absmax"],
        f"{key}.quant_map": book_tensor(format.quant_type, weight.device).clone(),
    }
    if _OWNERS[format.quant_type] == "q":
        description["scale_dtype"] = _scale_dtypes(format.quant_type)[format.float32_scales]
    if "tensor_scale" in components:
        flat[f"{key}.tensor_scale"] = components["tensor_scale"]
    if format.nested_blocksize is not None:
        flat[f"{key}.nested_absmax"] = components["nested_absmax"]
        flat[f"{key}.nested_quant_map"] = dynamic_map(signed=True, device=weight.device).clone()
        description["nested_blocksize"] = format.nested_blocksize
        description["nested_dtype"] = "float32"
        description["nested_offset"] = float("nan") if weight.is_meta else components["nested_offset"].item()
    text = json.dumps(description).encode()
    flat[_state_key(key, format.quant_type)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return flat


def from_flat(key: str, state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> QuantizedTensor:
    """Read a quantized weight from plain tensors; their memory is shared, not copied.

    Args:
        key: the weight's key.
        state: tensors by key, others among them.
        dtype: what the weight decodes to where the layout doesn't say (int8); bfloat16 if not given.

    Raises:
        ValueError: a key is missing or too many, or what it holds contradicts the rest; the message names the key, what it holds and
            what was expected.
    """
    read = read_flat(key, state, dtype=dtype)
    return QuantizedTensor.from_components(read.components, read.format, shape=read.shape, dtype=read.dtype)


class FlatWeight(NamedTuple):
    """A quantized weight as a checkpoint describes it."""

    components: Components
    format: WeightFormat
    shape: Sequence[int]
    dtype: torch.dtype


def read_flat(key: str, state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> FlatWeight:
    """What :func:`from_flat` makes a tensor of. The components may be on several devices here."""
    grouped_key = grouped_checkpoint.state_key(key)
    if grouped_key in state:
        return FlatWeight(*grouped_checkpoint.read(key, state, _parse(grouped_key, state[grouped_key])))
    state_key = _quant_state_key(key, state)
    if state_key is not None:
        return _read_four_bit(key, state, state_key)
    if key not in state:
        _refuse(key, "is missing", "the weight")
    if state[key].dtype == torch.int8:
        return _read_int8(key, state, dtype or torch.bfloat16)
    if state[key].dtype == torch.float8_e4m3fn:
        return _read_fp8(key, state, dtype or torch.bfloat16)
    _refuse(key, f"has dtype {short(state[key].dtype)} and no {key}.quant_state.*", "a quantized weight")


def _read_int8(key: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> FlatWeight:
    scale_key, layout_key = _siblings(key)
    codes = state[key]
    absmax = _take(state, scale_key, torch.float32, _rows_of(key, codes))
    if layout_key in state:
        layout = _take(state, layout_key, torch.uint8, ())
        if int(layout) != _ROW_MAJOR:
            _refuse(layout_key, f"is {int(layout)}", f"{_ROW_MAJOR}, rows as they are; convert it with the program that wrote it")
    _check_finite(scale_key, absmax)
    return FlatWeight({"codes": codes, "absmax": absmax}, Int8Rows(), codes.shape, dtype)


def _read_fp8(key: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> FlatWeight:
    codes = state[key]
    absmax = _take(state, f"{key}.absmax", torch.float32, _rows_of(key, codes))
    _check_finite(f"{key}.absmax", absmax)
    return FlatWeight({"codes": codes, "absmax": absmax}, Fp8Rows(), codes.shape, dtype)


def _rows_of(key: str, codes: Tensor) -> tuple[int, ...]:
    if codes.ndim < 2:
        _refuse(key, f"has shape {list(codes.shape)}", "two axes [N, K], or a stack of such")
    return tuple(codes.shape[:-1])


def _read_four_bit(key: str, state: Mapping[str, Tensor], state_key: str) -> FlatWeight:
    if key not in state:
        _refuse(key, "is missing", "the packed codes")
    description = _parse(state_key, state[state_key])
    nested = not _NESTED_JSON_FIELDS.isdisjoint(description)
    fields = (
        _JSON_FIELDS | (_NESTED_JSON_FIELDS if nested else set()) | ({"scale_dtype"} if ".quant_state.q__" in state_key else set())
    )
    if set(description) != fields:
        _refuse(state_key, f"has the fields {sorted(description)}", str(sorted(fields)))

    quant_type = _choice(state_key, description, "quant_type", tuple(FOUR_BIT_BOOKS))
    if state_key != _state_key(key, quant_type):
        _refuse(state_key, f"says quant_type {quant_type!r}", "the type in its key")
    blocksize = _choice(state_key, description, "blocksize", FOUR_BIT_BOOKS[quant_type].blocksizes)
    dtype = _DTYPES[_choice(state_key, description, "dtype", tuple(_DTYPES))]
    shape = description["shape"]
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size >= 0 for size in shape):
        _refuse(state_key, f"says shape {shape!r}", "a list of sizes")
    numel = math.prod(shape)

    components = {"packed": _packed_bytes(key, state[key], -(-numel // 2))}
    _check_book(state, f"{key}.quant_map", book_tensor(quant_type, torch.device("cpu")))
    format = FourBit(quant_type, blocksize, *_scale_format(state_key, description, quant_type, nested))
    return FlatWeight(components | _read_scales(key, state, description, format, -(-numel // blocksize)), format, shape, dtype)


def _scale_format(state_key: str, description: dict[str, Any], quant_type: FourBitType, nested: bool) -> tuple[int | None, bool]:
    """The fields ``nested_blocksize`` and ``float32_scales`` of the format."""
    usual, *others = _scale_dtypes(quant_type)
    float32 = "scale_dtype" in description and _choice(state_key, description, "scale_dtype", (usual, *others)) != usual
    if not nested:
        return None, float32
    if others:
        _refuse(state_key, "speaks of nested scales", f"none for {quant_type}, whose scales are a byte each already")
    return _choice(state_key, description, "nested_blocksize", BLOCKSIZES), float32


def _read_scales(
    key: str, state: Mapping[str, Tensor], description: dict[str, Any], format: FourBit, blocks: int
) -> dict[str, Tensor]:
    """All components but the codes."""
    state_key, scales = _state_key(key, format.quant_type), format.scales
    nested = format.nested_blocksize is not None
    for name in _SCALE_PARTS:
        if f"{key}.{name}" in state and name not in scales.names and not (nested and name == "nested_quant_map"):
            _refuse(f"{key}.{name}", "is there", f"no such key, as {state_key} speaks of no such scales")
    components: dict[str, Tensor] = {}
    for name, like in scales.empty(blocks, "meta").items():
        if name == "nested_offset":
            offset = description[name]
            if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
                _refuse(state_key, f"says nested_offset {offset!r}", "a finite float32")
            components[name] = torch.tensor(offset, dtype=torch.float32, device=components["absmax"].device)
        else:
            components[name] = _take(state, f"{key}.{name}", like.dtype, tuple(like.shape))
            _check_finite(f"{key}.{name}", components[name])
    if nested:
        _choice(state_key, description, "nested_dtype", ("float32",))
        _check_book(state, f"{key}.nested_quant_map", dynamic_map(signed=True))
    absmax = components["absmax"]
    if scales.codes is not None and absmax.numel() and not absmax.is_meta and int(absmax.max()) >= scales.codes:
        _refuse(
            f"{key}.absmax",
            f"has the code {int(absmax.max())}",
            f"codes below {scales.codes}, as scales are finite and not negative",
        )
    return components


def _scale_dtypes(quant_type: FourBitType) -> tuple[str, ...]:
    return _SCALE_DTYPES[FOUR_BIT_BOOKS[quant_type].scale]


def _state_key(key: str, quant_type: FourBitType) -> str:
    return f"{key}.quant_state.{_OWNERS[quant_type]}__{quant_type}"


def _quant_state_key(key: str, state: Mapping[str, Tensor]) -> str | None:
    found = [name for name in (_state_key(key, quant_type) for quant_type in get_args(FourBitType)) if name in state]
    if len(found) > 1:
        _refuse(found[1], f"is there beside {found[0]}", "one of them")
    return found[0] if found else None


def _siblings(key: str) -> tuple[str, str]:
    prefix, dot, name = key.rpartition(".")
    if name != "weight":
        return f"{key}.SCB", f"{key}.weight_format"
    return f"{prefix}{dot}SCB", f"{prefix}{dot}weight_format"


def _parse(key: str, tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or not 0 < tensor.numel() <= _MAX_JSON_BYTES:
        _refuse(key, f"is {short(tensor.dtype)} {list(tensor.shape)}", f"uint8, 1 to {_MAX_JSON_BYTES} bytes of JSON")
    try:
        description = json.loads(bytes(tensor.tolist()))
    except (ValueError, RecursionError) as error:
        _refuse(key, f"is not JSON ({error})", "the bytes of a JSON object", error)
    if not isinstance(description, dict):
        _refuse(key, f"is JSON of a {type(description).__name__}", "an object")
    return description


def _choice(key: str, description: dict[str, Any], field: str, choices: tuple[Any, ...]) -> Any:
    value = description[field]
    if type(value) is not type(choices[0]) or value not in choices:
        _refuse(key, f"says {field} {value!r}", f"one of {choices}")
    return value


def _take(state: Mapping[str, Tensor], key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if key not in state:
        _refuse(key, "is missing", f"{short(dtype)} {list(shape)}")
    tensor = state[key]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        _refuse(key, f"is {short(tensor.dtype)} {list(tensor.shape)}", f"{short(dtype)} {list(shape)}")
    return tensor


def _packed_bytes(key: str, stored: Tensor, length: int) -> Tensor:
    """The packed codes, whatever dtype they were stored as (``bnb_4bit_quant_storage``)."""
    if stored.ndim == 0 or stored.nbytes != length:
        _refuse(key, f"is {short(stored.dtype)} {list(stored.shape)}, {stored.nbytes} bytes", f"{length} bytes")
    return stored.contiguous().reshape(-1).view(torch.uint8)


def _check_book(state: Mapping[str, Tensor], key: str, expected: Tensor) -> None:
    book = _take(state, key, torch.float32, tuple(expected.shape))
    if not book.is_meta and not torch.equal(book.cpu(), expected):
        _refuse(key, "holds another code book", "the standard one, which the ops have built in")


def _check_finite(key: str, scales: Tensor) -> None:
    if scales.is_floating_point() and not scales.is_meta and not bool(torch.isfinite(scales).all()):
        _refuse(key, f"has {int((~torch.isfinite(scales)).sum())} scales that are NaN or infinite", "finite ones")


def _refuse(key: str, got: str, expected: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(f"checkpoint: {key} {got}, expected {expected}") from cause
