"""From a model directory to a model that can run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch

from q_serve.errors import ModelError
from q_serve.models.config import ModelConfig
from q_serve.models.llama import LlamaForCausalLM
from q_serve.models.quantized import replace_linears
from q_serve.models.registry import MODELS
from q_serve.models.weights import load_weights

DType = Literal["auto", "float32", "bfloat16", "float16"]


def resolve_dtype(dtype: DType, config: ModelConfig) -> torch.dtype:
    """The dtype to compute in; "auto" is the checkpoint's, or float32 if it doesn't say."""
    name = (config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    if name not in get_args(DType) or name == "auto":
        raise ModelError(f"config.json: dtype is {name!r}, expected float32, bfloat16 or float16; or choose one by --dtype")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def load_model(directory: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Build the model of a directory and load its weights.

    Args:
        directory: a model directory in Hugging Face's format.
        config: what its config.json says.
        dtype: dtype of dense weights and activations.
        device: where the model goes.

    Raises:
        ModelError: the weights don't fit the configuration, or their format isn't supported.
    """
    with torch.device("meta"):
        model = MODELS[config.architecture][0](config)
    if config.quantization is not None:
        replace_linears(model, config.quantization, name=str(directory / "config.json"))
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    load_weights(model, directory, dtype=dtype, device=device, tied=tied)
    return model.eval()
