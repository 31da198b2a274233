"""accelerate's hooks, which bring inputs to the device that a module is on."""

from __future__ import annotations

import importlib

from torch import nn


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` do what accelerate has ``old`` do, before and after its forward."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        accelerate = importlib.import_module("accelerate.hooks")  # whose the hook is, so it is there; it has no types
        accelerate.remove_hook_from_module(old)
        accelerate.add_hook_to_module(new, hook)
