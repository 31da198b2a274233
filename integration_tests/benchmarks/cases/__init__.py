"""The cases by family, as the surface has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.case import Case
from benchmarks.cases import attention, gemm, modules, moe, norm, optim, quantize

MODULES = "modules"
"""Of q_nn, whose ops are those of the other families."""

FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "quantize": quantize.cases,
    "gemm": gemm.cases,
    "optim": optim.cases,
    "attention": attention.cases,
    "moe": moe.cases,
    "norm": norm.cases,
    MODULES: modules.cases,
}
"""Each yields its cases one by one: the inputs of one are gone before those of the next are made."""
