"""What torch does with a quantized weight: the functions that torch.nn calls on it, and the operators left below autograd.

A copy keeps the format, what is written into a weight is quantized, and what has no meaning without decoding isn't here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from q_core.formats.quantized_tensor import (
    FUNCTIONS,
    OPERATORS,
    QuantizedTensor,
    alias,
    canonical_components,
    check_dtype,
    held_components,
    linear,
    map_components,
    resolve,
    unsupported,
)
from q_core.formats.sharding import is_dtensor
from q_core.layouts import CANONICAL
from q_core.specs.check import short

aten = torch.ops.aten


# --- functions: what torch.nn calls on a weight -------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, QuantizedTensor) or not isinstance(weight, QuantizedTensor):
        unsupported("torch.nn.functional.linear", "takes a QuantizedTensor as its weight only")
    if weight.ndim != 2:
        raise ValueError(
            f"torch.nn.functional.linear: the quantized weight has shape {list(weight.shape)}, expected two axes [N, K]"
        )
    return linear(input, weight, weight.shape, bias)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    # padding_idx, scale_grad_by_freq and sparse shape the weight's gradient alone, and this weight has none.
    if isinstance(input, QuantizedTensor) or not isinstance(weight, QuantizedTensor):
        unsupported("torch.nn.functional.embedding", "takes a QuantizedTensor as its weight only")
    if max_norm is not None:
        unsupported("torch.nn.functional.embedding with max_norm", "renormalizes its weight in place")
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"torch.nn.functional.embedding: input is {short(input.dtype)}, expected indices, int64 or int32")
    return weight.format.embedding(input, canonical_components(weight), weight.shape, weight.dtype)


def _requires_grad(tensor: QuantizedTensor, requires_grad: bool = True) -> QuantizedTensor:
    if requires_grad:
        raise TypeError(
            "requires_grad: a QuantizedTensor doesn't train, expected False; "
            "wrap it with nn.Parameter(weight, requires_grad=False), and train adapters beside it or what .dequantize() gives"
        )
    return tensor


def _set_data(tensor: QuantizedTensor, value: Tensor) -> None:
    """``tensor.data = value``: the components of another quantized tensor, or a dense one quantized, as ``copy_`` does."""
    if not isinstance(value, QuantizedTensor):
        value = QuantizedTensor.quantize(value, tensor.format)
    if value.shape != tensor.shape:
        raise ValueError(f"data: the new value has shape {list(value.shape)}, expected {list(tensor.shape)}")
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
    for name in tensor.format.component_names:
        delattr(tensor, name)
    for name, component in held_components(value).items():
        setattr(tensor, name, component)
    tensor.format, tensor.component_layout, tensor._resolved = value.format, value.component_layout, None


def _isfinite(tensor: QuantizedTensor) -> Tensor:
    return torch.isfinite(tensor.dequantize())


FUNCTIONS.update(
    {
        F.linear: _linear,
        F.embedding: _embedding,
        torch.isfinite: _isfinite,
        torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad_: _requires_grad,
        torch.Tensor.requires_grad.__set__: _requires_grad,  # type: ignore[attr-defined]
    }
)


# --- operators: what is left below autograd -----------------------------------------------------------------------------


def _alias(func: Any, tensor: QuantizedTensor) -> Any:
    return return_and_correct_aliasing(func, (tensor,), {}, alias(tensor))


def _clone(func: Any, tensor: QuantizedTensor, *, memory_format: object = None) -> QuantizedTensor:
    return map_components(tensor, torch.clone)


def _to_copy(
    func: Any,
    tensor: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: object = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: object = None,
) -> QuantizedTensor:
    return map_components(tensor, lambda t: t.to(device=device or t.device, non_blocking=non_blocking, copy=True), dtype=dtype)


def _empty_like(
    func: Any,
    tensor: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: object = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: object = None,
) -> QuantizedTensor:
    dtype = dtype or tensor.dtype
    check_dtype("torch.empty_like: dtype", dtype)
    components = {name: torch.empty_like(part, device=device or part.device) for name, part in held_components(tensor).items()}
    return QuantizedTensor(components, tensor.format, tensor.shape, dtype)


def _copy(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if target.shape != source.shape:
        raise ValueError(f"copy_: the source has shape {list(source.shape)}, expected the target's {list(target.shape)}")
    if not isinstance(target, QuantizedTensor):
        assert isinstance(source, QuantizedTensor)
        return target.copy_(source.dequantize(), non_blocking)
    if is_dtensor(source):
        raise ValueError("copy_: the source is distributed and the target isn't; copy what source.full_tensor() gives")
    base = target._base
    if isinstance(base, QuantizedTensor) and (base.format, base.component_layout) != (target.format, target.component_layout):
        raise ValueError(
            f"copy_: the target is a part of {base!r}, decoded in memory of its own, so that the whole wouldn't change; "
            "copy into the whole weight"
        )
    if not isinstance(source, QuantizedTensor):
        source = QuantizedTensor.quantize(source.to(target.device), target.format)
    source = _in_layout(source, target.component_layout, target.device)
    if source.format != target.format:
        raise ValueError(
            f"copy_: the source is held as {source.format}, expected {target.format}; call .dequantize() on the source"
        )
    for name, component in held_components(target).items():
        component.copy_(getattr(source, name), non_blocking)
    target._resolved = None
    return target


def _in_layout(source: QuantizedTensor, layout: str, device: torch.device) -> QuantizedTensor:
    if source.component_layout == layout:
        return source
    if layout == CANONICAL:
        return source.unpack()
    return map_components(source, lambda part: part.to(device)).prepack(layout)


def _add_or_subtract(func: Any, target: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    """``target += other``: decoded, changed and quantized again in its format, as writing dense values with ``copy_`` does."""
    if not isinstance(target, QuantizedTensor) or isinstance(other, QuantizedTensor):
        unsupported(func, "takes a QuantizedTensor on its left only")
    return _copy(func, target, func(target.dequantize(), other, alpha=alpha))


def _equal(func: Any, a: Tensor, b: Tensor) -> bool:
    a, b = (t.dequantize() if isinstance(t, QuantizedTensor) else t for t in (a, b))
    return torch.equal(a, b)


def _slice(
    func: Any, tensor: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    size = tensor.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    if step != 1 or (dim % tensor.ndim and (first, last) != (0, size)):
        unsupported("slice", "takes whole rows of a QuantizedTensor only, with step 1 along the first axis")
    whole = (first, last) == (0, size)
    result = alias(tensor) if whole else _rows(tensor, first, max(first, last))
    return return_and_correct_aliasing(func, (tensor, dim, start, end, step), {}, result)


def _split(func: Any, tensor: QuantizedTensor, sizes: int | Sequence[int], dim: int = 0) -> list[QuantizedTensor]:
    if dim % tensor.ndim:
        unsupported("split", "takes whole rows of a QuantizedTensor only, along the first axis")
    rows = tensor.shape[0]
    if isinstance(sizes, int):
        sizes = [min(sizes, rows - start) for start in range(0, rows, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_rows(tensor, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _rows(tensor: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    format, components = tensor.format.rows(resolve(tensor), tensor.shape, start, stop)
    return QuantizedTensor(components, format, (stop - start, *tensor.shape[1:]), tensor.dtype)


OPERATORS.update(
    {
        aten.detach.default: _alias,
        aten.alias.default: _alias,
        aten.clone.default: _clone,
        aten._to_copy.default: _to_copy,
        aten.empty_like.default: _empty_like,
        aten.copy_.default: _copy,
        aten.add_.Tensor: _add_or_subtract,
        aten.sub_.Tensor: _add_or_subtract,
        aten.equal.default: _equal,
        aten.slice.Tensor: _slice,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split,
    }
)
