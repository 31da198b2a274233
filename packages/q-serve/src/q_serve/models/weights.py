"""Weights from safetensors files, one tensor at a time.

Everything is checked against the files' headers before the first tensor is read: a checkpoint loads in whole or not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no stubs

from q_serve.errors import ModelError
from q_serve.json_file import read_json
from q_serve.models.quantized import load_quantized, quantized_modules

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F64", "F32", "BF16", "F16"}
"""Dtypes of dense weights, by safetensors' names."""


def find_tensors(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor.

    Raises:
        ModelError: there are no weights, a file is broken, or index and files disagree.
    """
    index = directory / INDEX_FILE
    if (single := directory / SINGLE_FILE).is_file():
        files = {single: set(_names(single))}
    elif index.is_file():
        files = {path: set(_names(path)) for path in _shards(index)}
        _compare_with_index(index, files)
    else:
        raise ModelError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} in it; q-serve reads weights from safetensors only")
    tensors: dict[str, Path] = {}
    for path, names in files.items():
        for name in names:
            if name in tensors:
                raise ModelError(f"{path}: tensor {name} is in {tensors[name].name} too")
            tensors[name] = path
    return tensors


def load_weights(model: nn.Module, directory: Path, *, dtype: torch.dtype, device: torch.device, tied: Mapping[str, str]) -> None:
    """Fill a model that was built on the meta device.

    Args:
        model: its parameters are replaced.
        directory: with one safetensors file, or shards and their index.
        dtype: dtype of dense weights in the model; a file's is cast.
        device: where the weights go.
        tied: parameters that are another one, and which; a checkpoint may leave them out or repeat them.

    Raises:
        ModelError: a tensor is missing, unexpected, or of the wrong shape or dtype; the message names file and tensor.
    """
    tensors = find_tensors(directory)
    quantized = quantized_modules(model)
    owners = {name: owner for name in tensors if (owner := _owner(name, quantized)) is not None}
    dense = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in tied and _owner(name, quantized) is None
    }
    missing = dense.keys() - tensors.keys() | {f"{name}.weight" for name in quantized if f"{name}.weight" not in tensors}
    if missing:
        raise ModelError(f"{directory}: the weights lack {_some(missing)}")
    unexpected = tensors.keys() - dense.keys() - owners.keys() - tied.keys()
    if unexpected := {name for name in unexpected if not name.endswith("rotary_emb.inv_freq")}:
        name = min(unexpected)
        raise ModelError(f"{tensors[name]}: the model has no place for {_some(unexpected)}")

    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, path in tensors.items():
        if name in dense or name in owners or name in tied:
            by_file[path].append(name)
    for path, names in by_file.items():
        _check_headers(path, {name: dense[tied.get(name, name)] for name in names if name not in owners})

    parts: dict[str, dict[str, Tensor]] = {owner: {} for owner in quantized}
    repeated: dict[str, Tensor] = {}
    with tqdm(total=sum(map(len, by_file.values())), desc="loading weights", unit="tensor") as progress:
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in sorted(names):
                    tensor = file.get_tensor(name)
                    if name in owners:
                        parts[owners[name]][name.removeprefix(owners[name] + ".")] = tensor.clone()
                    elif name in tied:
                        repeated[name] = tensor.to(device, dtype)
                    else:
                        _assign(model, name, tensor.to(device, dtype, copy=True))
                    progress.update()
    for owner, module in quantized.items():
        load_quantized(module, parts.pop(owner), name=f"{directory}: {owner}", dtype=dtype, device=device)
    for name, source in tied.items():
        if name in repeated and not torch.equal(repeated[name], model.get_parameter(source)):
            raise ModelError(
                f"{tensors[name]}: {name} differs from {source}, but config.json says they are tied (tie_word_embeddings)"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_parameter(source))


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map is missing or empty, expected an object of tensor names and files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: weight_map names {name!r}, expected a .safetensors file beside the index")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index}: weight_map names {name}, which is missing")
    return [index.parent / name for name in names]


def _compare_with_index(index: Path, files: Mapping[Path, set[str]]) -> None:
    by_name = {path.name: names for path, names in files.items()}
    for tensor, file in read_json(index)["weight_map"].items():
        if tensor not in by_name[file]:
            raise ModelError(f"{index}: says that {file} holds {tensor}, but it doesn't")


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a safetensors file ({error})") from error


def _check_headers(path: Path, expected: Mapping[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        for name, parameter in expected.items():
            header = file.get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            if shape != tuple(parameter.shape):
                raise ModelError(f"{path}: {name} has shape {list(shape)}, expected {list(parameter.shape)} by config.json")
            if dtype not in _DTYPES:
                raise ModelError(
                    f"{path}: {name} has dtype {dtype}, expected a floating-point one ({', '.join(sorted(_DTYPES))}); "
                    "a quantized model says so by quantization_config in its config.json"
                )


def _owner(name: str, quantized: Mapping[str, nn.Module]) -> str | None:
    """The quantized module whose state a tensor belongs to."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in quantized:
            return name
    return None


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))


def _some(names: Iterable[str], most: int = 3) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + rest
