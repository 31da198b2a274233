"""What can't be done to a model whose parameters are divided among processes any more."""

from __future__ import annotations

import sys

from torch import nn

from q_core.formats.sharding import is_dtensor


def refuse_sharded(operation: str, model: nn.Module, advice: str) -> None:
    """Raise if ``fully_shard`` or DTensor divided any parameter, also one that a forward left gathered.

    Raises:
        ValueError: a module is sharded; the message names it and ends with ``advice``.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes its time, and before that nothing can be sharded by it
    for name, module in model.named_modules():
        if (fsdp is not None and isinstance(module, fsdp.FSDPModule)) or any(map(is_dtensor, module.parameters(recurse=False))):
            raise ValueError(f"{operation}: {name or 'the model'} is sharded, expected a whole model; {advice}")
