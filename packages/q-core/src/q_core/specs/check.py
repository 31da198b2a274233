"""Validation shared by the op families: each raises with the op, the argument, what came, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from q_core.formats.codebooks import BLOCKSIZES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> list[Any]:
    return list(tensor.shape)


def wrong_dtype(op: str, argument: str, got: torch.dtype, expected: str, remedy: str = "") -> NoReturn:
    raise TypeError(f"{op}: {argument} has dtype {short(got)}, expected {expected}{'; ' + remedy if remedy else ''}.")


def wrong_shape(op: str, argument: str, got: object, expected: str, remedy: str = "") -> NoReturn:
    raise ValueError(f"{op}: {argument} has shape {got}, expected {expected}{'; ' + remedy if remedy else ''}.")


def wrong_value(op: str, argument: str, got: object, expected: str, remedy: str = "") -> NoReturn:
    raise ValueError(f"{op}: {argument} is {got!r}, expected {expected}{'; ' + remedy if remedy else ''}.")


def one_device(op: str, names: Sequence[str], *tensors: Tensor | None) -> None:
    """All are tensors (or ``None``) on the first one's device; asked first, so that later checks may use their attributes."""
    try:
        device = tensors[0].device  # type: ignore[union-attr]
        for tensor in tensors:
            if tensor is not None and tensor.device != device:
                break
        else:
            return
    except AttributeError:
        pass
    _explain_device(op, names, tensors)


def _explain_device(op: str, names: Sequence[str], tensors: Sequence[object]) -> NoReturn:
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor) and (tensor is not None or tensor is tensors[0]):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, expected a torch.Tensor.")
    where = ", ".join(f"{n} on {t.device}" for n, t in zip(names, tensors, strict=True) if isinstance(t, Tensor))
    raise ValueError(f"{op}: {where}; expected all on one device, move them with .to(device).")


def floating(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        wrong_dtype(op, argument, tensor.dtype, "float32, bfloat16 or float16")


def same_dtype(op: str, argument: str, tensor: Tensor, other: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        wrong_dtype(op, argument, tensor.dtype, f"{other}'s {short(dtype)}", f"cast it with .to(torch.{short(dtype)})")


def exact_dtype(op: str, argument: str, tensor: Tensor, dtype: torch.dtype, remedy: str = "") -> None:
    if tensor.dtype != dtype:
        wrong_dtype(op, argument, tensor.dtype, short(dtype), remedy)


def output_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        wrong_value(op, "dtype", dtype, "torch.float32, torch.bfloat16 or torch.float16")


def block_size(op: str, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        wrong_value(op, "blocksize", blocksize, "a power of two in 32…4096")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def numel_of(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
