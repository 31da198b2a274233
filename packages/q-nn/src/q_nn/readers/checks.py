"""How readers look at what they are given: every setting and every tensor, and errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from q_core.specs.check import short


def refuse(what: str, got: str, expected: str) -> NoReturn:
    raise ValueError(f"{what} {got}, expected {expected}")


class Settings:
    """A JSON object of settings that are taken one by one; those that nobody took are refused in the end.

    Args:
        where: begins the messages, such as "quantization_config".
        content: what the JSON holds.
    """

    def __init__(self, where: str, content: object) -> None:
        if not isinstance(content, Mapping):
            raise TypeError(f"{where} is {type(content).__name__}, expected an object")
        self.where = where
        self.content: Mapping[str, Any] = content
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        self._taken.add(key)
        return self.content.get(key, default)

    def choice(self, key: str, choices: Collection[Any], default: Any = None) -> Any:
        """A value that must be one of a few; 1 isn't True here."""
        value = self.take(key, default)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            refuse(f"{self.where}: {key}", f"is {value!r}", f"one of {tuple(choices)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.choice(key, (True, False), default))

    def size(self, key: str, default: int | None = None) -> int | None:
        """Columns a group; ``None`` for whole rows, which files write as -1."""
        value = self.take(key, default)
        if value in (None, -1) and not isinstance(value, bool):
            return None
        if type(value) is not int or value <= 0:
            refuse(f"{self.where}: {key}", f"is {value!r}", "a positive number, or -1 for whole rows")
        return value

    def absent(self, *keys: str) -> None:
        """Refuse settings that change what the tensors mean, unless they say nothing."""
        for key in keys:
            if value := self.take(key):
                refuse(f"{self.where}: {key}", f"is {value!r}", "none; weights made with it can't be read")

    def ignore(self, *keys: str) -> None:
        """Settings that say how weights were made, or how a program computes with them."""
        self._taken.update(keys)

    def done(self) -> None:
        if unknown := sorted(set(self.content) - self._taken):
            refuse(self.where, f"has the unknown keys {unknown}", f"some of {sorted(self._taken)}")


class Parts:
    """The tensors of one quantized layer, by the last part of their keys.

    Args:
        module: name of the layer.
        tensors: all that the checkpoint has of its weight.
    """

    def __init__(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        self.module = module
        self._tensors = tensors

    def key(self, name: str) -> str:
        return f"{self.module}.{name}"

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, dtypes: Collection[torch.dtype], shape: tuple[int | None, ...]) -> Tensor:
        """A tensor of one of the dtypes and of the shape, in which ``None`` is any size."""
        expected = f"{' or '.join(map(short, dtypes))} [{', '.join('any' if size is None else str(size) for size in shape)}]"
        if name not in self._tensors:
            refuse(self.key(name), "is missing", expected)
        tensor = self._tensors[name]
        fits = len(tensor.shape) == len(shape) and all(size in (None, got) for size, got in zip(shape, tensor.shape, strict=True))
        if tensor.dtype not in dtypes or not fits:
            refuse(self.key(name), f"is {short(tensor.dtype)} {list(tensor.shape)}", expected)
        return tensor

    def groups(self, K: int, group_size: int | None) -> tuple[int, int]:
        """Columns a group, and how many groups a row has."""
        size = group_size or K
        if not size or K % size:
            refuse(f"{self.module}: its weight", f"has {K} columns", f"whole groups of {size}")
        return size, K // size
