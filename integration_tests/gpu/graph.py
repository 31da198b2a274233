"""Device graphs: calls that are captured once and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


def can_capture(device: torch.device) -> bool:
    """Whether this torch captures graphs on a device."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "graph")


def graph_of(device: torch.device) -> Any:
    """An empty graph, as the device's module calls it."""
    module = torch.get_device_module(device)
    return next(getattr(module, name) for name in ("CUDAGraph", "XPUGraph") if hasattr(module, name))()


def captured(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Capture a call.

    Args:
        function: called once before, since kernels are compiled and constants made in a first call, and once for the capture.
        device: one that :func:`can_capture`.

    Returns:
        What replays it, and what the captured call returned: tensors that each replay writes anew.

    Raises:
        RuntimeError: the call does what no graph can hold, such as to wait for the device.
    """
    module: Any = torch.get_device_module(device)
    graph = graph_of(device)
    with module.device(device):
        function()
        torch.accelerator.synchronize(device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .* Graph is empty")  # as of a call of no elements
            with module.graph(graph):
                result = function()
    return graph.replay, result
