"""Weights in safetensors files of a limited size, with the index that says where each tensor is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MAX_SHARD_SIZE = "5GB"

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json")


def is_model_file(name: str) -> bool:
    """Whether a file of that name is part of a model as this package writes it, and not a tokenizer's, say."""
    return _MODEL_FILE.fullmatch(name) is not None


def size_in_bytes(size: int | str) -> int:
    """What a size such as 5_000_000_000, "5GB" or "4GiB" means.

    Raises:
        ValueError, TypeError: it is no size, or zero.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        bytes_ = size
    elif isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)", size.strip(), re.IGNORECASE)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"max_shard_size is {size!r}, expected bytes or a size such as '5GB'")
        bytes_ = int(float(match[1]) * _UNITS[match[2].upper()])
    else:
        raise TypeError(f"max_shard_size is {size!r}, expected bytes or a size such as '5GB'")
    if bytes_ < 1:
        raise ValueError(f"max_shard_size is {size!r}, expected more than nothing")
    return bytes_


class ShardWriter:
    """Writes tensors into as many files as it takes, each as soon as it is full.

    Args:
        directory: exists, and holds no weights.
        max_bytes: of a file's tensors; only tensors that belong together may take more.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that belong together, and so into one file, soon."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        self._pending.update({name: tensor.contiguous() for name, tensor in tensors.items()})
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Write what is left, give the files their names, and write the index if they are several."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            os.replace(self._path(0), self._directory / WEIGHTS)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            os.replace(self._path(number), self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        write_json(self._directory / INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})

    def _flush(self) -> None:
        path = self._path(len(self._shards))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})  # transformers asks for this note
        except SafetensorError as error:
            raise OSError(f"writing {path.name} failed: {error}") from error
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self._directory / f"shard-{number + 1}.safetensors"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as Hugging Face's libraries do."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
