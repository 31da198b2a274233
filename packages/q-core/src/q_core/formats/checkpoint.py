"""The flat key layout of bitsandbytes' checkpoints, both ways.

A quantized weight at the key ``layer.weight`` is held in plain tensors, so that safetensors can store it and others can read it:

- 4-bit: ``layer.weight`` uint8 [ceil(numel / 2), 1], ``layer.weight.absmax``, ``.quant_map``, ``.nested_absmax``,
  ``.nested_quant_map``, and ``.quant_state.bitsandbytes__nf4`` (or ``__fp4``), the bytes of a JSON object with the rest;
- int8: ``layer.weight`` int8 [N, K] and its siblings ``layer.SCB`` float32 [N] and ``layer.weight_format``. bitsandbytes has no other
  parameters in int8; of one by another name, such as the stacked ``experts.gate_up_proj`` [E, N, K], they are ``experts.gate_up_proj.SCB``
  float32 [E, N] and ``experts.gate_up_proj.weight_format``;
- fp8 rows, which bitsandbytes doesn't have: ``layer.weight`` float8_e4m3fn [..., N, K] and ``layer.weight.absmax`` float32 [..., N].

Weights in groups of integers have a layout of their own, :mod:`q_core.formats.grouped_checkpoint`.

What is read is not trusted: :func:`from_flat` checks every key, dtype, length and JSON field against the others, and gives a whole
tensor or raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from q_core.formats import grouped_checkpoint
from q_core.formats.codebooks import BLOCKSIZES, FOUR_BIT_BOOKS, book_tensor, dynamic_map
from q_core.formats.four_bit import FourBit
from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.grouped_int import GroupedInt
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WEIGHT_DTYPES, Components, WeightFormat
from q_core.specs.check import short

_DTYPES = {short(dtype): dtype for dtype in WEIGHT_DTYPES}
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
        parts = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
        candidates = (key, *(key + part for part in parts), state_key)
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
    if format.nested_blocksize is not None:
        flat[f"{key}.nested_absmax"] = components["nested_absmax"]
        flat[f"{key}.nested_quant_map"] = dynamic_map(signed=True, device=weight.device).clone()
        description["nested_blocksize"] = format.nested_blocksize
        description["nested_dtype"] = "float32"
        description["nested_offset"] = float("nan") if weight.is_meta else components["nested_offset"].item()
    text = json.dumps(description).encode()
    flat[f"{key}.quant_state.bitsandbytes__{format.quant_type}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
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
    _refuse(key, f"has dtype {short(state[key].dtype)} and no {key}.quant_state.bitsandbytes__*", "a quantized weight")


def _read_int8(key: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> FlatWeight:
    scale_key, layout_key = _siblings(key)
    codes = state[key]
    absmax = _take(state, scale_key, torch.float32, _rows_of(key, codes))
    if layout_key in state:
        layout = _take(state, layout_key, torch.uint8, ())
        if int(layout) != _ROW_MAJOR:
            _refuse(layout_key, f"is {int(layout)}", f"{_ROW_MAJOR}, rows as they are; convert it with the program that wrote it")
    return FlatWeight({"codes": codes, "absmax": absmax}, Int8Rows(), codes.shape, dtype)


def _read_fp8(key: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> FlatWeight:
    codes = state[key]
    absmax = _take(state, f"{key}.absmax", torch.float32, _rows_of(key, codes))
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
    fields = _JSON_FIELDS | (_NESTED_JSON_FIELDS if nested else set())
    if set(description) != fields:
        _refuse(state_key, f"has the fields {sorted(description)}", str(sorted(fields)))

    quant_type = _choice(state_key, description, "quant_type", tuple(FOUR_BIT_BOOKS))
    if not state_key.endswith(f"__{quant_type}"):
        _refuse(state_key, f"says quant_type {quant_type!r}", "the type in its key")
    blocksize = _choice(state_key, description, "blocksize", FOUR_BIT_BOOKS[quant_type].blocksizes)
    dtype = _DTYPES[_choice(state_key, description, "dtype", tuple(_DTYPES))]
    shape = description["shape"]
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size >= 0 for size in shape):
        _refuse(state_key, f"says shape {shape!r}", "a list of sizes")
    numel = math.prod(shape)
    blocks = -(-numel // blocksize)

    components = {"packed": _packed_bytes(key, state[key], -(-numel // 2))}
    _check_book(state, f"{key}.quant_map", book_tensor(quant_type, torch.device("cpu")))
    if not nested:
        for extra in (f"{key}.nested_absmax", f"{key}.nested_quant_map"):
            if extra in state:
                _refuse(extra, "is there", f"no such key, as {state_key} speaks of no nested scales")
        components["absmax"] = _take(state, f"{key}.absmax", torch.float32, (blocks,))
        return FlatWeight(components, FourBit(quant_type, blocksize), shape, dtype)

    nested_blocksize = _choice(state_key, description, "nested_blocksize", BLOCKSIZES)
    _choice(state_key, description, "nested_dtype", ("float32",))
    offset = description["nested_offset"]
    if type(offset) not in (int, float) or not math.isfinite(offset):
        _refuse(state_key, f"says nested_offset {offset!r}", "a finite number")
    _check_book(state, f"{key}.nested_quant_map", dynamic_map(signed=True))
    components["absmax"] = _take(state, f"{key}.absmax", torch.uint8, (blocks,))
    components["nested_absmax"] = _take(state, f"{key}.nested_absmax", torch.float32, (-(-blocks // nested_blocksize),))
    components["nested_offset"] = torch.tensor(offset, dtype=torch.float32, device=components["absmax"].device)
    return FlatWeight(components, FourBit(quant_type, blocksize, nested_blocksize), shape, dtype)


def _quant_state_key(key: str, state: Mapping[str, Tensor]) -> str | None:
    found = [name for name in (f"{key}.quant_state.bitsandbytes__{t}" for t in FOUR_BIT_BOOKS) if name in state]
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


def _refuse(key: str, got: str, expected: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(f"checkpoint: {key} {got}, expected {expected}") from cause
