"""The model that a config.json describes, without memory for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from q_nn.shards import CONFIG
from q_nn.weights import read_json


def meta_model(source: Path, dtype: torch.dtype | None = None) -> Any:
    """Build a transformers model on the meta device.

    Args:
        source: a directory with a config.json, or that file.
        dtype: of its parameters; if not given, what the config says, or float32.

    Raises:
        ImportError: transformers isn't there.
        FileNotFoundError: there is no such file.
        ValueError: it describes no model that transformers has, or one whose code would come with it.
    """
    path = source / CONFIG if source.is_dir() else source
    description = read_json(path)
    transformers = _transformers()
    if "auto_map" in description:
        raise ValueError(
            f"{path}: auto_map asks for code that comes with the model, which is never run; expected a model of transformers"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        config.dtype = dtype or _dtype(path, description)
        with torch.device("meta"):
            model = _build(transformers, config, description.get("architectures"))
    except Exception as error:  # each model's own code raises what it likes for a config that makes no sense
        raise ValueError(f"{path} describes no model that transformers can build: {error}") from error
    model.tie_weights()
    return model.eval()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("building a model from its config.json needs transformers; pip install 'q-nn[hf]'") from error
    return transformers


def _build(transformers: Any, config: Any, architectures: object) -> Any:
    if not architectures:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    name = architectures[0] if isinstance(architectures, list) else None
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"architectures is {json.dumps(architectures)}, expected a model class of transformers {transformers.__version__}"
        )
    model_class: Any = found
    return model_class._from_config(config)


def _dtype(path: Path, description: dict[str, Any]) -> torch.dtype:
    name = description.get("dtype", description.get("torch_dtype")) or "float32"
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"{path}: dtype is {name!r}, expected one such as 'bfloat16'")
    return found
