"""Loading a model with this package's layers, whatever wrote it."""

from __future__ import annotations

from os import PathLike
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from q_nn.hf.config import Served

_FOR_BOTH = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""The arguments that say where the files are."""

_NOT_FOR_THE_CONFIG = ("dtype", "quantization_config", "torch_dtype")
"""What a config would take for a setting of its own."""


def from_pretrained(directory: str | PathLike[str], *, auto_class: Any = AutoModelForCausalLM, **arguments: Any) -> PreTrainedModel:
    """Load a model; quantized weights are served by this package's layers, also those that bitsandbytes wrote.

    bitsandbytes needn't be installed. A directory that isn't quantized is quantized while it is loaded if ``quantization_config`` is given.

    Args:
        directory: or a name on the Hugging Face hub, as transformers takes it.
        auto_class: what builds the model: a transformers class with ``from_pretrained``.
        **arguments: of transformers' ``from_pretrained``: ``quantization_config``, ``dtype``, ``device_map``, …; settings of the
            config, too.

    Raises:
        ValueError: the directory is quantized already and ``quantization_config`` is given; or its settings aren't supported.
    """
    config = arguments.pop("config", None)
    if config is None:
        kept = {name: arguments.pop(name) for name in _NOT_FOR_THE_CONFIG if name in arguments}
        kept |= {name: arguments[name] for name in _FOR_BOTH if name in arguments}
        config, arguments = AutoConfig.from_pretrained(directory, return_unused_kwargs=True, **arguments)
        arguments |= kept
    present = getattr(config, "quantization_config", None)
    if present is not None:
        if arguments.pop("quantization_config", None) is not None:
            raise ValueError(
                f"from_pretrained: {directory} is quantized already ({present.get('quant_method')}); leave out quantization_config"
            )
        if present.get("quant_method") == "bitsandbytes":
            config.quantization_config = Served(present).to_dict()
    model: PreTrainedModel = auto_class.from_pretrained(directory, config=config, **arguments)
    return model
