"""The arguments that every optimizer has beside those of its algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from q_core.formats.codebooks import BLOCKSIZES
from q_optim import checks

DEFAULT_BUDGET = 1 << 28


class StorageArguments(TypedDict, total=False):
    """Arguments that every optimizer here has beside those of its algorithm; a parameter group may have its own of all but the paging.

    Attributes:
        optim_bits: precision of the states: 32, or 8 (AdamW: also 4). By default what the class's name says.
        min_8bit_size: number of elements from which a tensor's states are held in fewer than 32 bits; 4096 by default.
        blocksize: elements a scale, a power of two in 32…4096; 256 in 8 bits and 128 in 4 by default.
        stochastic_rounding: compute in float32 and round bfloat16 parameters at random, up as often as the exact value is near the upper
            neighbour, so that small updates aren't lost and no float32 copy is needed.
        maximize: ascend instead of descend.
        is_paged: keep the states of large models outside the device's memory: in pinned host memory, or on a CPU in a file.
        paged_budget: bytes of the device's memory that states may take when paged; half for states that stay there, half for those under
            way. 256 MiB by default.
        paged_directory: where the file is made, on a CPU; by default where temporary files are. It has no name and vanishes with the
            process.
        foreach, fused: ``None`` or ``True``, and that is how it's done: one fused call for all tensors that are alike.
        capturable, differentiable: ``False``.
        args: ``None``.
    """

    optim_bits: Literal[4, 8, 32]
    min_8bit_size: int
    blocksize: int | None
    stochastic_rounding: bool
    maximize: bool
    is_paged: bool
    paged_budget: int
    paged_directory: str | Path | None
    foreach: Literal[True] | None
    fused: Literal[True] | None
    capturable: Literal[False]
    differentiable: Literal[False]
    args: None


ONE_WAY = {
    "foreach": ((None, True), "all tensors of a group are updated in one call"),
    "fused": ((None, True), "the update is one pass over memory"),
    "capturable": ((False,), "the step number is counted on the host"),
    "differentiable": ((False,), "parameters are updated in place"),
    "args": ((None,), "pass what it would hold as arguments"),
}


def check_storage(what: str, group: Mapping[str, Any], supported_bits: tuple[int, ...]) -> None:
    """Refuse arguments that can't be meant, among a group's settings."""
    checks.one_of(what, "optim_bits", group["optim_bits"], supported_bits)
    checks.count(what, "min_8bit_size", group["min_8bit_size"])
    if group["blocksize"] is not None:
        checks.one_of(what, "blocksize", group["blocksize"], BLOCKSIZES)
    checks.flag(what, "stochastic_rounding", group["stochastic_rounding"])
    checks.flag(what, "maximize", group["maximize"])
    for key, (supported, why) in ONE_WAY.items():
        if key in group:
            checks.supported(what, key, group[key], supported, why)


Paging = tuple[int, str | Path | None]
"""The budget and the directory of paged states."""


def paging_of(what: str, given: Mapping[str, Any], *, by_default: bool) -> Paging | None:
    """Whether states are paged, and how.

    Raises:
        ValueError, TypeError: an argument can't be meant.
    """
    is_paged = given.get("is_paged", by_default)
    checks.flag(what, "is_paged", is_paged)
    if not is_paged:
        if given.keys() & {"paged_budget", "paged_directory"}:
            raise ValueError(f"{what}: paged_budget and paged_directory are for paged states; pass is_paged=True")
        return None
    budget, directory = given.get("paged_budget", DEFAULT_BUDGET), given.get("paged_directory")
    checks.count(what, "paged_budget", budget)
    if directory is not None and not Path(directory).is_dir():
        raise ValueError(f"{what}: paged_directory is {str(directory)!r}, expected a directory that exists")
    return budget, directory
