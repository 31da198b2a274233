"""Quantize a model from directory to directory, one module at a time."""

from __future__ import annotations

import copy
import re
import shutil
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from q_nn.atomic import new_directory
from q_nn.checkpoint import Checkpoint
from q_nn.config import QConfig
from q_nn.convert import quantize_module
from q_nn.load import check_finite, check_header, check_keys, representatives, slots_of
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
    stored = _DenseModel(source)
    model = stored.model
    plan = plan_quantization(model, config)
    rules = {name: rule for layer in plan.layers for name, rule in zip(layer.names, layer.rules, strict=True)}
    dense = {name: model.get_submodule(name) for name in rules}
    report = apply_plan(model, plan)  # on the meta device: what it is then says names, bytes, and what config.json has to
    groups = tensors_by_module(model)
    with new_directory(target) as stage:
        _copy_others(source, stage)
        writer = ShardWriter(stage, max_bytes)
        for name, group in tqdm(groups.items(), desc="quantize", unit="module", disable=not progress):
            if name in rules:
                module = quantize_module(name, stored.read_module(name, dense[name]), rules[name])
                written = prepare(module).state_dict(prefix=f"{name}.")
                assert written.keys() == group.keys()
            else:
                written = {key: stored.read(key) for key in group}
            writer.add(written)
        writer.finish()
        write_json(stage / CONFIG, describe(model, model.config))
    return report


class _DenseModel:
    """A model on the meta device, in the dtypes of the checkpoint that holds its weights.

    Raises:
        ValueError: the checkpoint doesn't fit the model.
    """

    def __init__(self, directory: Path) -> None:
        self.model: nn.Module = meta_model(directory)
        tensors = {key: tensor for key, (_, _, tensor) in slots_of(self.model, {}).items()}
        self._checkpoint = Checkpoint(directory, self.model, tensors)
        self._tied = representatives(self.model, tensors)
        check_keys("quantize_checkpoint", self._tied, self._checkpoint)
        self._parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._origins: dict[str, str] = {}  # which of the keys that are tied the checkpoint has
        for key, tensor in tensors.items():
            if key in self._checkpoint.headers:
                check_header("quantize_checkpoint", key, tensor, self._checkpoint.headers)
                self._origins.setdefault(self._tied[key], key)
                tensor.data = torch.empty_like(tensor, dtype=self._checkpoint.headers[key].dtype)

    def read(self, key: str) -> Tensor:
        """Read a tensor."""
        value = self._checkpoint.read(self._origins[self._tied[key]])
        if key in self._parameters:
            check_finite("quantize_checkpoint", key, value)
        return value

    def read_module(self, name: str, module: nn.Module) -> nn.Module:
        """A module like that one on the meta device, with its parameters."""
        real = copy.copy(module)
        real._parameters = {
            own: None if parameter is None else nn.Parameter(self.read(f"{name}.{own}"), requires_grad=False)
            for own, parameter in module._parameters.items()
        }
        return real


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
