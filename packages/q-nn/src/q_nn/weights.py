"""The tensors of a checkpoint directory, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from q_nn.shards import CONFIG, INDEX, WEIGHTS

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Weights:
    """What a directory's model.safetensors holds, or the files that its index names, by key.

    Each tensor is read when it is asked for, into memory of its own: a file that a model maps could not be written again. All files are
    opened at once, so that later changes of the directory don't matter, and let go when the last of their tensors was read. Until then what
    was read of a file is mapped: memory that the system takes back when it is short of it.

    Attributes:
        headers: all tensors on the meta device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file or the index is not what its name says, or they contradict each other.
    """

    def __init__(self, directory: Path) -> None:
        self.headers: dict[str, Tensor] = {}
        self._paths: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}
        self._unread: dict[Path, int] = {}
        for path, expected in _files(directory).items():
            self._open(path, expected)

    def read(self, key: str) -> Tensor:
        """Read a tensor; each can be read once."""
        path = self._paths.pop(key)
        file = self._files[path]
        try:
            tensor: Tensor = file.get_tensor(key).clone()
        except SafetensorError as error:
            raise ValueError(f"{path}: {key} can't be read: {error}") from error
        self._unread[path] -= 1
        if not self._unread[path]:
            del self._files[path]
        return tensor

    def _open(self, path: Path, expected: set[str] | None) -> None:
        file = _open(path)
        keys = set(file.keys())
        if expected is not None and keys != expected:
            raise ValueError(
                f"{path.name} holds {_some(keys - expected)} that {INDEX} doesn't say, and not {_some(expected - keys)}, which it says"
            )
        for key in keys:
            if key in self._paths:
                raise ValueError(f"{key} is in {self._paths[key].name} and in {path.name}, expected once")
            header = file.get_slice(key)
            dtype = header.get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(f"{path.name}: {key} has the dtype {dtype}, expected one of {sorted(_DTYPES)}")
            self.headers[key] = torch.empty(header.get_shape(), dtype=_DTYPES[dtype], device="meta")
            self._paths[key] = path
        self._files[path] = file
        self._unread[path] = len(keys)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a Hugging Face model directory")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is JSON of a {type(content).__name__}, expected an object")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json, and of :func:`read_json` raise what it raises."""
    return read_json(directory / CONFIG)


def _files(directory: Path) -> dict[Path, set[str] | None]:
    """The files that hold the weights, with the keys that the index says are in each, if there is one."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists() or not index.exists():
        return {single: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map is {type(weight_map).__name__}, expected file names by key")
    files: dict[Path, set[str] | None] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or "\0" in name:
            raise ValueError(f"{index}: weight_map names {name!r}, expected a file in the same directory")
        files[directory / name] = {key for key, file in weight_map.items() if file == name}
    return files


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected weights in safetensors")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _some(keys: set[str]) -> str:
    return f"{sorted(keys)[0]!r} and {len(keys) - 1} more" if keys else "nothing"
