"""Quantized weights under FSDP2 and DTensor: a shard is some rows of the weight, held as a quantized tensor itself.

``fully_shard`` cuts rows with the operators below, and :class:`QuantizedTensor` says how shards are gathered. Whatever can't be cut right
is refused there, alike on every rank, and so before anything waits for another rank: rows that don't divide by the ranks, and shards that
don't end at a block. Scales that aren't held in float32 are decoded, once, and sharded as float32: nf4 takes 4.5 bits a weight in place of
4.127, mxfp4 5 in place of 4.25 and nvfp4 6 in place of 4.5, divided by the ranks. What the weight decodes to stays the same to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from q_core.formats.quantized_tensor import OPERATORS, QuantizedTensor, alias, held_components, map_components, resolve, unsupported
from q_core.formats.weight_format import Components

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

aten = torch.ops.aten

_WAY_OUT = "give the parameter to fully_shard's ignored_params, which keeps it whole on every rank"


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether a value is distributed. Importing DTensor takes its time, and there can be none before somebody did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_shard(value: object) -> QuantizedTensor | None:
    """The quantized tensor that a parameter is, or this rank's shard of one; ``None`` if it isn't quantized."""
    if is_dtensor(value):
        with torch.no_grad():  # else it would be a view
            value = value.to_local()
    return value if isinstance(value, QuantizedTensor) else None


# --- what fully_shard cuts with -------------------------------------------------------------------------------------------


def _new_zeros(
    func: Any,
    tensor: QuantizedTensor,
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: object = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> QuantizedTensor:
    """Room for a shard of ``size[0]`` rows."""
    rows, shard_rows = tensor.shape[0], size[0]
    if tuple(size[1:]) != tuple(tensor.shape[1:]):
        unsupported("new_zeros", "gives rows like those of the QuantizedTensor only")
    if shard_rows and rows % shard_rows:
        raise ValueError(
            f"fully_shard: a quantized weight {list(tensor.shape)} doesn't divide into shards of {shard_rows} rows, "
            f"expected the same number on each rank; {_WAY_OUT}"
        )
    format = tensor.format.resolved_format
    components = {name: torch.zeros_like(part) for name, part in format.empty(size, device or tensor.device).items()}
    return QuantizedTensor(components, format, size, dtype or tensor.dtype)


def _new_empty(func: Any, tensor: QuantizedTensor, size: Sequence[int], **options: object) -> QuantizedTensor:
    """What a rank would hold that no rows are left for."""
    raise ValueError(
        f"fully_shard: a quantized weight in shards of {tensor.shape[0]} rows leaves none for some ranks, expected the same number on "
        f"each; {_WAY_OUT}"
    )


def _view(func: Any, tensor: QuantizedTensor, size: Sequence[int]) -> Any:
    """The same shape, or one axis, as fully_shard keeps a shard beside its parameter."""
    shape = (tensor.numel(),) if tuple(size) == (-1,) else tuple(size)
    if shape not in (tuple(tensor.shape), (tensor.numel(),)):
        unsupported("view", f"of a QuantizedTensor {list(tensor.shape)} as {list(shape)} isn't defined")
    if shape == tuple(tensor.shape):
        result = alias(tensor)
    else:
        components = {name: aten.alias.default(component) for name, component in tensor.components.items()}
        result = QuantizedTensor(components, tensor.format, shape, tensor.dtype)
    return return_and_correct_aliasing(func, (tensor, size), {}, result)


def _as_strided(
    func: Any, tensor: QuantizedTensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    if (tuple(size), tuple(stride), storage_offset or 0) != (tuple(tensor.shape), tensor.stride(), 0):
        unsupported("as_strided", "gives the whole of a QuantizedTensor only")
    result = alias(tensor)
    return return_and_correct_aliasing(func, (tensor, size, stride, storage_offset), {}, result)


def _is_pinned(func: Any, tensor: QuantizedTensor, device: torch.device | None = None) -> bool:
    return all(component.is_pinned() for component in held_components(tensor).values())


def _pin_memory(func: Any, tensor: QuantizedTensor, device: torch.device | None = None) -> QuantizedTensor:
    return map_components(tensor, torch.Tensor.pin_memory)


def _cat(func: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> NoReturn:
    """How ``DistributedDataParallel`` glues parameters together for its first broadcast."""
    unsupported(
        "cat",
        "isn't defined for a QuantizedTensor (DistributedDataParallel's first broadcast is one: call q_nn.prepare_ddp before it)",
    )


OPERATORS.update(
    {
        aten.new_zeros.default: _new_zeros,
        aten.new_empty.default: _new_empty,
        aten.view.default: _view,
        aten.as_strided.default: _as_strided,
        aten.is_pinned.default: _is_pinned,
        aten._pin_memory.default: _pin_memory,
        aten.cat.default: _cat,
    }
)


# --- what a rank gathers from itself alone --------------------------------------------------------------------------------


def join(components: Components) -> torch.Tensor:
    """All components in one tensor of bytes, those of the widest elements first, so that each stays aligned."""
    return torch.cat([component.reshape(-1).view(torch.uint8) for component in _widest_first(components).values()])


def take_apart(joined: torch.Tensor, like: Components) -> dict[str, torch.Tensor]:
    """The components in what :func:`join` gave, as views; ``like`` has their dtypes and shapes."""
    components, start = {}, 0
    for name, component in _widest_first(like).items():
        components[name] = joined[start : start + component.nbytes].view(component.dtype).view(component.shape)
        start += component.nbytes
    return components


def _widest_first(components: Components) -> Components:
    return dict(sorted(components.items(), key=lambda item: -item[1].itemsize))


# --- what DTensor.full_tensor() gathers with ------------------------------------------------------------------------------


def _all_gather(func: Any, shard: QuantizedTensor, ranks: int, group: str) -> QuantizedTensor:
    """Gather each component, and wait for it at once, as the caller can wait for plain tensors only."""
    format, parts = shard.format.resolved_format, resolve(shard)
    shape = (shard.shape[0] * ranks, *shard.shape[1:])
    format.check_cut(shape, shard.shape[0])
    wait = torch.ops._c10d_functional.wait_tensor.default
    components = {name: wait(func(part.contiguous(), ranks, group)) for name, part in parts.items()}
    return QuantizedTensor(components, format, shape, shard.dtype)


def _waited(func: Any, tensor: QuantizedTensor) -> QuantizedTensor:
    return tensor


# By name: torch defines some of them only once they are first imported.
OPERATORS.update(
    {
        "_c10d_functional.all_gather_into_tensor.default": _all_gather,
        "_c10d_functional.wait_tensor.default": _waited,
        "_c10d_functional._wrap_tensor_autograd.default": _waited,
    }
)
