"""Which class serves which architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from q_serve.errors import ModelError
from q_serve.models.config import ConfigReader, ModelConfig
from q_serve.models.llama import LlamaForCausalLM, llama_config, mistral_config, qwen2_config

MODELS: dict[str, tuple[type[LlamaForCausalLM], Callable[[ConfigReader], ModelConfig]]] = {
    "LlamaForCausalLM": (LlamaForCausalLM, llama_config),
    "MistralForCausalLM": (LlamaForCausalLM, mistral_config),
    "Qwen2ForCausalLM": (LlamaForCausalLM, qwen2_config),
}
"""Architecture, as config.json names it → the class, and how its configuration is read."""


def read_config(directory: Path) -> ModelConfig:
    """Read a model directory's config.json.

    Raises:
        ModelError: the directory is no model, or its architecture or a value in its configuration isn't supported.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory}: not a directory; expected one in Hugging Face's format, with config.json and *.safetensors")
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory}: no config.json in it; expected a model directory in Hugging Face's format")
    reader = ConfigReader(path)
    architecture = reader.architecture()
    if architecture not in MODELS:
        raise ModelError(f"{path}: architecture {architecture!r} is not supported; q-serve serves {', '.join(MODELS)}")
    return MODELS[architecture][1](reader)
