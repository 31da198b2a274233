"""The cases on a GPU by family; each yields its cases one by one, so that the inputs of one are gone before those of the next are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.case import Case
from benchmarks.gpu_cases import attention, gemm, int8, moe, norm, optim, quantize
from benchmarks.gpu_cases.sizes import Sizes

FAMILIES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "quantize": quantize.cases,
    "gemm": gemm.cases,
    "int8": int8.cases,
    "optim": optim.cases,
    "attention": attention.cases,
    "moe": moe.cases,
    "norm": norm.cases,
}
