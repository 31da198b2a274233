"""Quantized models under ``torch.nn.parallel.DistributedDataParallel``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.sharded import refuse_sharded


def prepare_ddp(model: nn.Module, *, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make a model with quantized weights ready for ``DistributedDataParallel(model)``.

    When it is built, DDP sends the parameters of the first rank to the others, glued together as dense ones, which a quantized weight
    isn't. Here they are sent component by component, bit for bit, and DDP is told to leave them alone; they are frozen, so there is
    nothing else that it would do with them.

    Args:
        model: what DDP is to get, not a part of it; its quantized weights are mutated, on all ranks but the first. Call it again if
            modules are added or replaced.
        process_group: as DDP gets it; the default group if not given.

    Returns:
        ``model``.

    Raises:
        ValueError: the ranks don't hold the same weights in the same formats, or the model is sharded; nothing is changed then.
    """
    refuse_sharded("prepare_ddp", model, "fully_shard does what DistributedDataParallel would, so leave out one of them")
    weights = {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, QuantizedTensor)}
    _check_alike(weights, process_group)
    with torch.no_grad():
        for weight in weights.values():
            received = weight.clone()  # in the canonical layout, whichever one each rank holds it in
            assert isinstance(received, QuantizedTensor)
            for component in received.components.values():
                dist.broadcast(component, group=process_group, group_src=0)
            weight.copy_(received)
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *weights}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
    return model


def _check_alike(weights: Mapping[str, QuantizedTensor], process_group: dist.ProcessGroup | None) -> None:
    own = {name: f"{weight.format} {list(weight.shape)}" for name, weight in weights.items()}
    everyones: list[dict[str, str] | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everyones, own, group=process_group)
    first = everyones[0]
    assert first is not None
    for rank, held in enumerate(everyones):
        assert held is not None
        for name in sorted(first.keys() | held.keys()):
            if first.get(name) != held.get(name):
                raise ValueError(
                    f"prepare_ddp: {name} is {held.get(name, 'not quantized')} on rank {rank} and "
                    f"{first.get(name, 'not quantized')} on rank 0, expected the same on every rank"
                )
