"""The native module, set up: ISA level, torch's threads, code books.

Importing this module does it, once a process; the implementations take ``native`` from here. Q_CPU_ISA with an unknown level, or one
that the machine lacks, is a ``ValueError``.
"""

from __future__ import annotations

import logging

import torch

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_cpu import _native as native
from q_cpu import environment, openmp

__all__ = ["description", "native"]

_logger = logging.getLogger("q.cpu")


def _choose_isa() -> None:
    name = environment.forced_isa()
    if name is None:
        return
    try:
        native.set_isa(name)
    except ValueError as error:
        raise ValueError(f"Q_CPU_ISA={name}: {error}") from None


def _share_threads() -> bool:
    address = openmp.gomp_parallel_address()
    if address is None:
        _logger.warning("q_cpu runs on the calling thread only: torch %s has no OpenMP runtime loaded to share", torch.__version__)
    native.configure_threads(address, torch.get_num_threads)
    return address is not None


_choose_isa()
_shares_threads = _share_threads()
for _quant_type, _book in FOUR_BIT_BOOKS.items():
    native.register_4bit(_quant_type, _book.values, _book.ordered, _book.scale)


def description() -> str:
    """ISA level and threads, for people."""
    if not _shares_threads:
        return f"{native.isa_display()}, 1 thread: found no OpenMP runtime of torch to share"
    count = torch.get_num_threads()
    return f"{native.isa_display()}, {count} thread{'s' if count != 1 else ''} shared with torch"
