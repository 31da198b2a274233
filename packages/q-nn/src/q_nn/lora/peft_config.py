"""LoRA's settings as PEFT writes them, in adapter_config.json (peft 0.21)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from q_nn.lora.config import ALL_LINEAR, LoRAConfig
from q_nn.lora.targets import in_choice

_READ = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "modules_to_save": "modules_to_save",
}
"""PEFT's names of what :class:`LoRAConfig` has."""

WITHOUT_EFFECT = {
    "task_type": "which of PEFT's classes goes around the model",
    "auto_mapping": "which class the base model is of",
    "peft_version": "who wrote the file",
    "base_model_name_or_path": "where the base model is; here it is given",
    "revision": "of the base model",
    "inference_mode": "whether adapters are frozen when loaded; load_lora's trainable says so",
    "runtime_config": "how PEFT runs; PEFT ignores it too",
    "megatron_core": "a module's name, which megatron_config makes use of",
    "qalora_group_size": "which use_qalora makes use of",
    "eva_config": "how adapters start",
}
"""Settings that don't change what saved adapters give, and why. Any other that isn't read must be unset."""

_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that say how adapters start. The others change the base weights too, or what an adapter is."""


def from_peft(settings: Mapping[str, Any], *, dtype: torch.dtype) -> LoRAConfig:
    """The config that PEFT's settings mean.

    Args:
        settings: the content of adapter_config.json.
        dtype: of the adapters, which isn't in it.

    Raises:
        ValueError, TypeError: a setting is wrong, or would change what the adapters give in a way that isn't supported; the message
            names it.
    """
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {settings.get('peft_type')!r}, expected 'LORA'")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"bias is {settings['bias']!r}, expected 'none'; training the base's biases isn't supported")
    start = settings.get("init_lora_weights", True)
    if not any(start is each or (isinstance(start, str) and start == each) for each in _STARTS):
        raise ValueError(f"init_lora_weights is {start!r}, which changes the base weights as well, expected one of {_STARTS}")
    known = {"peft_type", "bias", "init_lora_weights", *_READ, *WITHOUT_EFFECT}
    for name, value in settings.items():
        # Each release of PEFT writes the settings that are new in it; those that aren't made use of mean nothing.
        if name not in known and not (value is None or value is False or value in ({}, [])):
            raise ValueError(f"{name} is {value!r}, which isn't supported, expected it unset")
    found: dict[str, Any] = {ours: settings[theirs] for theirs, ours in _READ.items() if settings.get(theirs) is not None}
    if missing := [theirs for theirs in ("r", "lora_alpha", "target_modules") if _READ[theirs] not in found]:
        raise ValueError(f"{missing[0]} is missing")
    for name in ("target", "exclude", "modules_to_save", "layers", "layers_pattern"):
        if isinstance(found.get(name), list):
            found[name] = tuple(found[name])
    if isinstance(found.get("layers_pattern"), str):
        found["layers_pattern"] = (found["layers_pattern"],) if found["layers_pattern"] else ()
    if type(found.get("layers")) is int:
        found["layers"] = (found["layers"],)
    if found.get("layers") == ():
        del found["layers"]
    if isinstance(found["target"], str) and found["target"].lower() == ALL_LINEAR:
        found["target"] = ALL_LINEAR
    return LoRAConfig(**found, init="gaussian" if start == "gaussian" else "kaiming", dtype=dtype)


def to_peft(config: LoRAConfig, model: nn.Module, adapted: Iterable[str], others: Iterable[str]) -> dict[str, Any]:
    """The settings that mean the same to PEFT.

    Args:
        config: of an adapter.
        model: that has it.
        adapted: names of the layers that it adapts.
        others: names of all other modules.
    """
    base_name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": _target(config, sorted(adapted), others),
        "exclude_modules": _listed(config.exclude) or None,
        "layers_to_transform": _listed(config.layers),
        "layers_pattern": _listed(config.layers_pattern) or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {pattern: _number(alpha) for pattern, alpha in config.alpha_pattern.items()},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "modules_to_save": _listed(config.modules_to_save) or None,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _target(config: LoRAConfig, adapted: list[str], others: Iterable[str]) -> str | list[str]:
    if config.target != ALL_LINEAR:
        return config.target if isinstance(config.target, str) else list(config.target)
    # By name, as PEFT knows the output layers of transformers' models alone.
    if any(in_choice(name, adapted) for name in others):
        return "|".join(map(re.escape, adapted))
    return adapted


def _listed(choice: Any) -> Any:
    return list(choice) if isinstance(choice, tuple) else choice


def _number(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha
