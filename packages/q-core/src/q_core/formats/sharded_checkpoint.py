"""The flat key layout for a weight that is sharded by rows: the same keys, with a DTensor for each component.

So ``torch.distributed.checkpoint`` saves and reshards it like any other model, and a checkpoint of a sharded model is that of the model.
Nothing here talks to another rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from q_core.formats.checkpoint import flat_keys, read_flat, row_keys, to_flat
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.sharding import is_dtensor, local_shard
from q_core.formats.weight_format import WeightFormat

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def to_flat_sharded(key: str, weight: DTensor) -> dict[str, Tensor]:
    """Lay a sharded quantized weight out, as :func:`q_core.formats.checkpoint.to_flat` does a whole one.

    Returns:
        Tensors by key: DTensors over the shard's own memory for what the rows divide, and plain tensors, alike on every rank, for the
        code books and the description.

    Raises:
        ValueError: the weight is divided otherwise than by rows.
    """
    shard = local_shard(weight)
    assert shard is not None
    _own_shape(key, weight.shape, weight)
    whole = QuantizedTensor.empty(weight.shape, shard.format, dtype=weight.dtype, device="meta")
    flat, described = to_flat(key, shard), to_flat(key, whole)
    divided = row_keys(key, shard.format).values()
    for name, tensor in described.items():
        if name in divided:
            flat[name] = _dtensor(flat[name], tensor.shape, weight)
        elif not tensor.is_meta:  # the description, which speaks of the whole
            flat[name] = tensor
    return flat


def from_flat_sharded(key: str, state: Mapping[str, Tensor], like: DTensor, *, shape: Sequence[int], dtype: torch.dtype) -> DTensor:
    """Read a quantized weight of which this rank holds some rows.

    Args:
        key: the weight's key.
        state: tensors by key, others among them. Components are DTensors placed as ``like``, or whole and alike on every rank.
        like: any DTensor; the weight is divided as it is.
        shape: the weight's.
        dtype: what the weight decodes to, whatever the layout says.

    Returns:
        The weight. Its rows on this rank are a :class:`QuantizedTensor`, with float32 scales whatever they were held in.

    Raises:
        ValueError: as :func:`q_core.formats.checkpoint.from_flat`, or the weight can't be divided as ``like`` is.
    """
    flat = {name: state[name] for name in flat_keys(key, state)}
    # Of what is in pieces already only the dtype and the shape are looked at here.
    read = read_flat(key, {name: _meta(tensor) if is_dtensor(tensor) else tensor for name, tensor in flat.items()}, dtype=dtype)
    if tuple(read.shape) != tuple(shape):
        _refuse(key, f"has shape {list(read.shape)}", str(list(shape)))
    keys = row_keys(key, read.format)
    if read.format.derives and is_dtensor(flat[keys["absmax"]]):
        _refuse(keys["absmax"], "is divided and holds codes of scales", "the whole of it on every rank")
    own_shape = _own_shape(key, shape, like)
    read.format.check_cut(shape, own_shape[0])

    resolved, format = read.format.resolve(read.components), read.format.resolved_format
    components = {}
    for name, expected in format.empty(own_shape, "meta").items():
        stored = flat[keys[name]]
        own = _own_rows(keys[name], stored if is_dtensor(stored) else resolved[name], like)
        components[name] = own.contiguous().view(expected.dtype).view(expected.shape)
    return _dtensor(QuantizedTensor.from_components(components, format, shape=own_shape, dtype=dtype), shape, like)


def quantize_sharded(key: str, dense: Tensor, like: DTensor, format: WeightFormat) -> DTensor:
    """Quantize a dense weight by shards; ``dense`` is a DTensor placed as ``like``, or whole and alike on every rank."""
    own_shape = _own_shape(key, dense.shape, like)
    format.check_cut(dense.shape, own_shape[0])
    return _dtensor(QuantizedTensor.quantize(_own_rows(key, dense, like), format), dense.shape, like)


def _own_shape(key: str, shape: Sequence[int], like: DTensor) -> tuple[int, ...]:
    """The shape of this rank's part of a weight, which is that of every rank's."""
    shards = 1
    for size, placement in zip(like.device_mesh.shape, like.placements, strict=True):
        if placement.is_shard(0):
            shards *= size
        elif not placement.is_replicate():
            _refuse(key, f"is placed as {placement}", "Shard(0) or Replicate(), as a quantized weight is divided by rows only")
    if shape[0] % shards:
        _refuse(key, f"has {shape[0]} rows for {shards} ranks", "the same number on each")
    return (shape[0] // shards, *shape[1:])


def _own_rows(key: str, value: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a tensor."""
    from torch.distributed.tensor import distribute_tensor

    if not is_dtensor(value):
        value = distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)
        assert is_dtensor(value)
    if (value.device_mesh, value.placements) != (like.device_mesh, like.placements):
        _refuse(key, f"is placed as {value.placements} on {value.device_mesh}", f"{like.placements} on {like.device_mesh}")
    with torch.no_grad():
        return value.to_local()


def _dtensor(shard: Tensor, shape: Sequence[int], like: DTensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    meta = torch.empty(tuple(shape), device="meta")
    with torch.no_grad():
        return DTensor.from_local(shard, like.device_mesh, like.placements, run_check=False, shape=meta.shape, stride=meta.stride())


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _refuse(key: str, got: str, expected: str) -> NoReturn:
    raise ValueError(f"checkpoint: {key} {got}, expected {expected}")
