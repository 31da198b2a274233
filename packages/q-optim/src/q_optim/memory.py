"""How much memory an optimizer's states take."""

from __future__ import annotations

import torch

from q_optim import shards


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the states of any torch optimizer. Of sharded states, what this process holds.

    Code books are shared by all and not counted.
    """
    states = optimizer.state.values()
    return sum(shards.local(value).nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))
