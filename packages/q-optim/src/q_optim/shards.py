"""Parameters that FSDP shares out: their local shards, states that are sharded as they are, and whole ones gathered for a step.

Blocks of a sharded parameter end with its rows, so that a checkpoint may be loaded on another number of processes, bit for bit.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    if type(tensor) is Parameter or type(tensor) is Tensor:
        return False
    # Where that module was never imported, which takes a while, nothing is a DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    return is_distributed(tensor) and any(placement.is_shard() for placement in tensor.placements)


def check(what: str, param: Tensor) -> None:
    """Refuse what is shared out otherwise than by rows."""
    if is_distributed(param) and not all(p.is_replicate() or p.is_shard(0) for p in param.placements):
        raise TypeError(
            f"{what} is placed {param.placements}, expected Replicate or Shard(0); its states can't be in blocks of its rows otherwise"
        )


def local_shape(param: Tensor, shape: torch.Size) -> torch.Size:
    """Of a tensor of this shape, sharded as the parameter is, what this process holds; its rows are the parameter's."""
    return torch.Size((local(param).shape[0], *shape[1:])) if is_sharded(param) else shape


def like(param: Tensor, shard: Tensor, shape: torch.Size) -> Tensor:
    """This process's share of a tensor of this shape, as a tensor that is placed as the parameter is."""
    if not is_distributed(param):
        return shard
    stride = torch.empty(shape, device="meta").stride()
    return type(param).from_local(shard, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process gets it."""
    return tensor.full_tensor().contiguous() if is_distributed(tensor) else tensor


def share(param: Tensor, tensor: Tensor) -> Tensor:
    """What this process is to hold of a tensor that has the parameter's rows, wherever it was: summed, cut or gathered."""
    if not is_distributed(param):
        return whole(tensor)
    if not is_distributed(tensor) or tensor.device_mesh != param.device_mesh:
        tensor = _replicated(param, whole(tensor))
    if tensor.placements != param.placements:
        tensor = tensor.redistribute(placements=param.placements)
    return tensor.to_local()


def keep_share(tensor: Tensor, updated: Tensor) -> None:
    """Write this process's share of a whole tensor back to where :func:`whole` took it from."""
    local(tensor).copy_(share(tensor, updated))


def _replicated(param: DTensor, tensor: Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    return DTensor.from_local(tensor.to(param.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
