"""accelerate's hooks, which bring inputs to the device that a module is on."""

from __future__ import annotations

from torch import nn


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` do what accelerate has ``old`` do, before and after its forward."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
