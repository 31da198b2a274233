"""The file in which ``python -m q_triton.tune`` keeps the tiles that it found to be best on a device.

It lies in the folder of :func:`q_triton.environment.cache_folder`, and its name holds the device's name and Triton's version: another
device, or another compiler, has other best tiles. It is read when a device's tiles are first asked for. One that can't be used is named
in a warning, and the tables decide as if it weren't there.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from q_triton.environment import cache_folder
from q_triton.targets import target_of
from q_triton.tiles import KERNELS, Table, Tile, as_json, from_json

_log = logging.getLogger(__name__)


def device_name(device: torch.device) -> str:
    """A device's name, as its vendor has it; kernels that are interpreted run on none."""
    if device.type == "cpu":
        return f"interpreted {target_of(device).name}"
    module = torch.get_device_module(device)
    return str(module.get_device_name(device))


def _triton() -> str:
    """Triton's version; host functions may be called without it, to see what they would launch."""
    return str(importlib.import_module("triton").__version__) if importlib.util.find_spec("triton") else "missing"


def path_of(device: torch.device) -> Path:
    """Where a device's tiles are kept."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device_name(device)} triton {_triton()}")
    return cache_folder() / f"tiles-{name}.json"


def write(device: torch.device, table: Table) -> Path:
    """Keep tiles for a device, in the place of those kept before; the file's path."""
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    kernels = {kernel: [as_json(choice) for choice in choices] for kernel, choices in sorted(table.items())}
    data = {"device": device_name(device), "triton": _triton(), "kernels": kernels}
    unfinished = path.with_suffix(".unfinished")  # whoever reads meanwhile gets the old file or the new one
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    unfinished.replace(path)
    tuned_tiles.cache_clear()
    return path


@functools.cache
def tuned_tiles(device: torch.device) -> Table:
    """The tiles kept for a device; none where there is no file that can be used."""
    if not (path := path_of(device)).exists():
        return {}
    try:
        return read(path)
    except (OSError, ValueError) as error:
        _log.warning(
            "%s is ignored, the tables have the tiles: %s. Run python -m q_triton.tune again, or delete the file.", path, error
        )
        return {}


def read(path: Path) -> Table:
    """The tiles in a file.

    Raises:
        ValueError: it isn't one that :func:`write` made, or kernels have other blocks by now.
        OSError: it can't be read.
    """
    data = json.loads(path.read_text())
    kernels = data.get("kernels") if isinstance(data, dict) else None
    if not isinstance(kernels, dict):
        raise ValueError("it has no 'kernels', expected an object of kernels' tiles")
    return {kernel: _choices(kernel, entries) for kernel, entries in kernels.items()}


def _choices(kernel: str, entries: Any) -> Sequence[Tile]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{kernel} has {entries!r}, expected a list of tiles")
    choices = [from_json(entry) for entry in entries]
    if [choice.up_to is None for choice in choices] != [False] * (len(choices) - 1) + [True]:
        raise ValueError(f"{kernel} has sizes {[choice.up_to for choice in choices]}, expected null for the last alone")
    if (declared := KERNELS.get(kernel)) is not None:
        names = {frozenset(known.blocks) for known in declared.known()}
        for choice in choices:
            if frozenset(choice.blocks) not in names:
                raise ValueError(f"{kernel} has no such blocks as {', '.join(choice.blocks)}")
    return choices
