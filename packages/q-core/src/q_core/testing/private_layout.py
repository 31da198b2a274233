"""A backend made up for tests of private weight layouts: its one layout is the canonical one backwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from q_core.backend import Availability, Backend, impl
from q_core.layouts import CANONICAL
from q_core.reference import gemm as reference
from q_core.testing.fakes import family_module, installed_backends

LAYOUT = "acme.backwards"


def turn(tensor: Tensor) -> Tensor:
    """Into the layout or back; a new tensor."""
    return tensor.reshape(-1).flip(0).view(tensor.shape)


def accepts(layout: str) -> str | None:
    """The backend's predicate: it serves nothing else."""
    return None if layout == LAYOUT else f"layout {layout!r}, only {LAYOUT}"


@impl(accepts=accepts)
def prepack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
    return [turn(tensor) for tensor in tensors]


@impl(accepts=accepts)
def unpack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
    return [turn(tensor) for tensor in tensors]


@impl(accepts=accepts)
def gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    return reference.gemm(x_TK, turn(w_NK), bias, CANONICAL)


@impl(accepts=accepts)
def gemm_4bit(
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: Tensor | None,
    layout: str,
) -> Tensor:
    return reference.gemm_4bit(x_TK, turn(packed), turn(absmax), blocksize, quant_type, shape, bias, "native", CANONICAL)


@impl(accepts=accepts)
def int8_gemm(
    a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, layout: str
) -> Tensor:
    return reference.int8_gemm(a_TK, turn(b_NK), a_scale, turn(b_scale), bias, dtype, CANONICAL)


@impl(accepts=accepts)
def gemm_int8_weight(x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    return reference.gemm_int8_weight(x_TK, turn(w_NK), turn(w_scale), bias, CANONICAL)


@contextlib.contextmanager
def private_layout() -> Iterator[None]:
    """Let this backend, ``acme``, and the reference be installed, in the whole process, while the context stands."""
    functions = (prepack_weight, unpack_weight, gemm, gemm_4bit, int8_gemm, gemm_int8_weight)
    backend = Backend(
        name="acme",
        device_types=("cpu",),
        surface_version=1,
        priority=100,
        probe=lambda: Availability(True, ""),
        families=("acme_layouts",),
        layouts=(LAYOUT,),
    )
    with family_module("acme_layouts", *functions), installed_backends(backend):
        yield
