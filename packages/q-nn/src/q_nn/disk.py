"""Quantize a model from directory to directory, one module at a time."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from q_nn.atomic import new_directory
from q_nn.checkpoint import Checkpoint
from q_nn.config import QConfig
from q_nn.convert import quantize_module
from q_nn.load import check_finite, check_keys, representatives
from q_nn.meta_model import meta_model
from q_nn.plan import plan_quantization
from q_nn.quantize import apply_plan
from q_nn.report import QuantizeReport
from q_nn.save import describe, tensors_by_module
from q_nn.shards import CONFIG, MAX_SHARD_SIZE, ShardWriter, size_in_bytes, write_json
from q_nn.state_hooks import prepare
from q_nn.weights import read_config

_WEIGHTS = re.compile(r".*\.(safetensors|bin|pth?|ckpt|gguf|h5|msgpack|onnx|tflite|ot)(\.index\.json)?")


def quantize_checkpoint(
    source: str | PathLike[str],
    target: str | PathLike[str],
    config: QConfig,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: bool = False,
) -> QuantizeReport:
    """Quantize a Hugging Face directory into a new one, which holds what ``quantize`` and ``save_pretrained`` would write.

    The model is never there as a whole: at most it takes one file of weights that is read, one that is to be written, and the module (of
    fused experts, the layer) in between. Each tensor keeps its dtype. Tensors that transformers 5 renames or stacks as it loads them, such
    as Mixtral's experts, are written as it holds them: under the model's keys, which :func:`q_nn.load_into` reads. What else the directory
    holds, such as a tokenizer, is copied, but for hidden files and weights in other formats.

    Args:
        source: holds config.json and weights in safetensors, not quantized. Its model must be one of transformers (extra ``hf``).
        target: a new or empty directory. It is there when all of it is, and not before.
        config: formats, rules and what to skip.
        max_shard_size: as in :func:`q_nn.save_pretrained`.
        progress: show a progress bar.

    Returns:
        What was quantized, what not and why, and the bytes before and after.

    Raises:
        ImportError: transformers isn't there.
        FileNotFoundError, FileExistsError: ``source`` misses a file, or ``target`` holds some.
        ValueError: a file is not what its name says, keys or shapes don't fit the model, the model is quantized already, a weight isn't
            finite, or a rule or a pattern means nothing; the message names it, and nothing is written.
    """
    source, target = Path(source), Path(target)
    max_bytes = size_in_bytes(max_shard_size)
    if read_config(source).get("quantization_config") is not None:
        raise ValueError(f"quantize_checkpoint: {source} is quantized already, as its config.json says; expected a dense model")
    model = meta_model(source)
    tensors = dict(_tensors(model))
    checkpoint = Checkpoint(source, model, tensors)
    tied = representatives(model, tensors)
    check_keys("quantize_checkpoint", tied, checkpoint)
    _take_dtypes(model, tensors, checkpoint.headers)
    plan = plan_quantization(model, config)
    rules = {name: rule for layer in plan.layers for name, rule in zip(layer.names, layer.rules, strict=True)}
    dense = {name: model.get_submodule(name) for name in rules}
    report = apply_plan(model, plan)  # on the meta device: it is what tells names, bytes, and what config.json has to say

    origins: dict[str, str] = {}
    for key in tensors:
        if key in checkpoint.headers:
            origins.setdefault(tied[key], key)

    def read(key: str) -> Tensor:
        value = checkpoint.read(origins[tied[key]])
        if key in parameters:
            check_finite("quantize_checkpoint", key, value)
        return value

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    groups = tensors_by_module(model)
    with new_directory(target) as stage:
        _copy_others(source, stage)
        writer = ShardWriter(stage, max_bytes)
        for name, group in tqdm(groups.items(), desc="quantize", unit="module", disable=not progress):
            if name in rules:
                real = copy.copy(dense[name])
                real._parameters = {
                    own: None if parameter is None else nn.Parameter(read(f"{name}.{own}"), requires_grad=False)
                    for own, parameter in real._parameters.items()
                }
                written = prepare(quantize_module(name, real, rules[name])).state_dict(prefix=f"{name}.")
            else:
                written = {key: read(key) for key in group}
            assert written.keys() == group.keys()
            writer.add(written)
        writer.finish()
        write_json(stage / CONFIG, describe(model, model.config))
    return report


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a checkpoint holds, by key; tied tensors under each of theirs."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), tensor


def _take_dtypes(model: nn.Module, tensors: dict[str, Tensor], headers: dict[str, Tensor]) -> None:
    """Give a model on the meta device the dtypes that a checkpoint has."""
    for key, tensor in tensors.items():
        if key not in headers:
            continue
        header = headers[key]
        if header.shape != tensor.shape:
            raise ValueError(f"quantize_checkpoint: {key} has shape {list(header.shape)}, expected {list(tensor.shape)}")
        if header.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"quantize_checkpoint: {key} has dtype {header.dtype}, expected one as {tensor.dtype}")
        tensor.data = torch.empty_like(tensor, dtype=header.dtype)


def _copy_others(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.name.startswith(".") or path.name == CONFIG or _WEIGHTS.fullmatch(path.name):
            continue
        if path.is_dir():
            (target / path.name).mkdir()
            _copy_others(path, target / path.name)
            if not any((target / path.name).iterdir()):
                (target / path.name).rmdir()
        elif path.is_file():
            shutil.copyfile(path, target / path.name)
