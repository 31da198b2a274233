"""Say what memory a model will take before it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from q_core.specs.check import short
from q_nn.config import QConfig
from q_nn.kv_cache import KV_DTYPES, KVCache, KVDtype, kv_cache_of
from q_nn.layers import replace_module
from q_nn.load import plan_swaps
from q_nn.lora import LoRAConfig, add_lora
from q_nn.memory import tensor_bytes, weight_bytes
from q_nn.meta_model import meta_model
from q_nn.optimizer_states import Optimizer
from q_nn.plan import plan_quantization
from q_nn.quantize import apply_plan
from q_nn.rules import FORMATS
from q_nn.table import table

AS_IT_IS = "as it is"


@dataclass(frozen=True, slots=True)
class TrainingEstimate:
    """What training takes, but for activations, which depend on the sizes of a batch and on what is checkpointed.

    Attributes:
        weights: the row of the table of weights that is trained.
        trainable: how many elements are; of a quantized model all that isn't, or the adapters alone.
        weight_bytes: with the adapters, if there are any.
        gradient_bytes: of trainable parameters, in their dtypes.
        optimizer: its name.
        state_bytes: of the optimizer's states, by its precision.
        total_bytes: weights, gradients, and states with the chosen precision.
    """

    weights: str
    lora_rank: int | None
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer: str
    state_bytes: Mapping[str, int]
    total_bytes: int


@dataclass(frozen=True, slots=True)
class KVEstimate:
    """What keys and values take: of a token in all layers, of a sequence, and of all sequences."""

    dtype: KVDtype
    token_bytes: int
    sequence_bytes: int
    batch_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What :func:`estimate` found.

    Attributes:
        architecture: the model's class.
        parameters: how many elements they have, each counted once.
        weight_bytes: of parameters and buffers, by format.
        training: see :class:`TrainingEstimate`.
        batch, length: sequences, and tokens of each.
        kv_cache: by dtype; or why that can't be said.
    """

    architecture: str
    parameters: int
    weight_bytes: Mapping[str, int]
    training: TrainingEstimate
    batch: int
    length: int
    kv_cache: tuple[KVEstimate, ...] | str

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        """Tables for people."""
        weights = [(name, taken, f"{taken * 8 / self.parameters:.3f}") for name, taken in self.weight_bytes.items()]
        training = self.training
        adapters = "" if training.lora_rank is None else f", adapters of rank {training.lora_rank}"
        rows: list[tuple[str, int]] = [
            ("weights", training.weight_bytes),
            (f"gradients of {training.trainable:,} elements", training.gradient_bytes),
            *((f"states of {name}", taken) for name, taken in training.state_bytes.items()),
            (f"all, with {training.optimizer}", training.total_bytes),
        ]
        parts = [
            f"{self.architecture}, {self.parameters:,} parameters",
            table(("weights", "bytes", "bits a parameter"), weights),
            table((f"training: {training.weights}{adapters}", "bytes without activations"), rows),
        ]
        if isinstance(self.kv_cache, str):
            parts.append(f"keys and values: not known, {self.kv_cache}")
        else:
            head = ("keys and values", "a token", f"a sequence of {self.length:,}", f"{self.batch:,} sequences")
            parts.append(table(head, [(kv.dtype, kv.token_bytes, kv.sequence_bytes, kv.batch_bytes) for kv in self.kv_cache]))
        return "\n\n".join(parts)


def estimate(
    source: str | PathLike[str],
    config: QConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw",
    lora_rank: int | None = None,
    batch: int = 1,
    length: int | None = None,
    kv_dtypes: tuple[KVDtype, ...] = KV_DTYPES,
) -> Estimate:
    """Say what memory a model takes, by building it without memory. Its weights needn't be there.

    Args:
        source: a directory with the config.json of a transformers model (extra ``hf``), or that file.
        config: what to train quantized, ``None`` for the model as it is. The table of weights is over all formats in any case.
        dtype: of dense weights; what the config says if not given.
        optimizer: "adamw", "adamw8bit", "lion8bit", … (:data:`q_nn.optimizer_states.OPTIMIZERS`), as q-optim has them; "sgd" and "lars"
            with momentum.
        lora_rank: train adapters on all linear layers, and nothing else.
        batch: sequences, at once, of the cache.
        length: tokens of each; the most that the model was made for if not given.
        kv_dtypes: of the cache.

    Raises:
        ImportError, FileNotFoundError: transformers or the file isn't there.
        ValueError: the config is none of transformers', or is quantized and ``config`` is given, or an argument means nothing.
    """
    chosen = Optimizer.named(optimizer)
    for name, value in (("batch", batch), ("length", length), ("lora_rank", lora_rank)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"estimate: {name} is {value!r}, expected an int of 1 or more")
    if unknown := sorted(set(kv_dtypes) - set(KV_DTYPES)):
        raise ValueError(f"estimate: kv_dtypes has {unknown[0]!r}, expected some of {KV_DTYPES}")
    model = meta_model(Path(source), dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantized = getattr(model.config, "quantization_config", None)
    if quantized is not None:
        if config is not None:
            raise ValueError(f"estimate: {source} is quantized already, expected no config then")
        for old, new in plan_swaps(model, quantized).values():
            replace_module(model, old, new)
        weights, dense = {AS_IT_IS: weight_bytes(model)}, AS_IT_IS
    else:
        dense = short(next(p.dtype for p in model.parameters()))
        weights = {dense: weight_bytes(model), **_by_format(model)}
    name = dense
    if config is not None:
        name = config.format if config == QConfig(config.format) else f"{config.format}, as configured"
        apply_plan(model, plan_quantization(model, config))
        weights[name] = weight_bytes(model)
    length = length or getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1
    cache = kv_cache_of(model.config)
    return Estimate(
        architecture=type(model).__name__,
        parameters=parameters,
        weight_bytes=weights,
        training=_training(model, name, chosen, lora_rank),
        batch=batch,
        length=length,
        kv_cache=cache if isinstance(cache, str) else tuple(_kv(cache, kv, batch, length) for kv in kv_dtypes),
    )


def _by_format(model: nn.Module) -> dict[str, int]:
    """What a model would take in each format that has something to quantize in it."""
    found = {}
    for format in FORMATS:
        quantized = copy.deepcopy(model)
        try:
            plan = plan_quantization(quantized, QConfig.from_dict({"format": format}))
        except ValueError:  # there is nothing that the format is for
            continue
        apply_plan(quantized, plan)
        found[format] = weight_bytes(quantized)
    return found


def _training(model: nn.Module, weights: str, optimizer: Optimizer, lora_rank: int | None) -> TrainingEstimate:
    if lora_rank is not None:
        add_lora(model, LoRAConfig(rank=lora_rank))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    taken = weight_bytes(model)
    gradients = sum(map(tensor_bytes, trainable))
    return TrainingEstimate(
        weights=weights,
        lora_rank=lora_rank,
        trainable=sum(parameter.numel() for parameter in trainable),
        weight_bytes=taken,
        gradient_bytes=gradients,
        optimizer=str(optimizer),
        state_bytes={str(other): other.state_bytes(trainable) for other in optimizer.others()},
        total_bytes=taken + gradients + optimizer.state_bytes(trainable),
    )


def _kv(cache: KVCache, dtype: KVDtype, batch: int, length: int) -> KVEstimate:
    sequence = cache.sequence_bytes(length, dtype)
    return KVEstimate(dtype, cache.token_bytes(dtype), sequence, batch * sequence)
