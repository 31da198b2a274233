"""Launching kernels: the one place where Triton is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q_triton.environment import interpreted
from q_triton.tiles import Tile

_INTERPRETED = interpreted()
if _INTERPRETED:
    from q_triton import interpreter

    interpreter.install()


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel that was to be launched.

    Attributes:
        kernel: the jitted function.
        grid: programs along each axis.
        tile: how its work is cut.
        exact: whether a product and a sum may not become one fused operation.
        arguments: all others, by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    tile: Tile
    exact: bool
    arguments: Mapping[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        """Every argument of the kernel by name, the tile's blocks among them."""
        return {**self.arguments, **self.tile.blocks}


_recorder: Callable[[Launch], None] | None = None


@contextlib.contextmanager
def recorded(recorder: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every launch to a function instead: ops then take tensors of torch's meta device, and compute nothing."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, *, exact: bool = False, **arguments: Any) -> None:
    """Run a kernel on the device of its tensors, in torch's current stream.

    Args:
        kernel: a function under ``triton.jit``.
        grid: programs along each axis; nothing is launched where one of them is 0.
        tile: block sizes, which are the kernel's constants of the same names, warps and stages.
        exact: round a product before it is added, as where codes must be the reference's bit for bit.
        arguments: every other argument of the kernel.

    Raises:
        ValueError: the kernel has no argument or block of a name.
    """
    if 0 in grid:
        return
    if _recorder is not None or _INTERPRETED:
        _check_names(kernel, tile, arguments)
    if _recorder is not None:
        _recorder(Launch(kernel, grid, tile, exact, arguments))
        return
    with _current(_device_of(arguments)):
        kernel[grid](**arguments, **tile.blocks, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=not exact)


def _device_of(arguments: Mapping[str, Any]) -> torch.device:
    """Where the tensors are, which stand alone or in tuples, an entry a tensor that one launch works on."""
    firsts = (value[0] if isinstance(value, tuple) else value for value in arguments.values())
    return next(value.device for value in firsts if isinstance(value, Tensor))


def _check_names(kernel: Any, tile: Tile, arguments: Mapping[str, Any]) -> None:
    """Refuse what the compiler refuses and the interpreter drops: a name that the kernel lacks, such as a block that a table misspells."""
    if unknown := sorted({*arguments, *tile.blocks} - set(kernel.arg_names)):
        raise ValueError(f"{kernel.__name__} has no {', '.join(unknown)}, expected {', '.join(kernel.arg_names)}.")


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which needn't be the tensors'."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context
