"""How transformers learns of this package: through its own registries of quantizers, by ``quant_method``."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from q_nn.config import QUANT_METHOD, QConfig
from q_nn.hf.config import Served
from q_nn.hf.quantizer import QnnQuantizer

_BITSANDBYTES = ("bitsandbytes_4bit", "bitsandbytes_8bit")
_theirs = {method: auto.AUTO_QUANTIZER_MAPPING[method] for method in _BITSANDBYTES}


class ConfigReader(QuantizationConfigMixin):
    """What transformers calls with the ``quantization_config`` of a config.json that is ours."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **_: Any) -> Any:
        """Read it.

        Returns:
            A :class:`q_nn.QConfig` or a :class:`Served`, which transformers takes for its own class.

        Raises:
            ValueError, TypeError: a key is unknown, or a value isn't supported; the message names it.
        """
        return (Served if Served.KEY in config_dict else QConfig).from_dict(config_dict)


def register() -> None:
    """Make transformers ask this package about ``"quant_method": "q_nn"``; done by ``import q_nn.hf``, and again at no cost."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(ConfigReader)
        auto.register_quantizer(QUANT_METHOD)(QnnQuantizer)


def serve_bitsandbytes(serve: bool = True) -> None:
    """Let this package's layers serve what transformers would build bitsandbytes' for, in all of this process.

    Then directories with bitsandbytes weights load, and ``quantization_config=BitsAndBytesConfig(...)`` quantizes, in code that knows
    nothing of this package (``pipeline(model=directory)``, training scripts); bitsandbytes needn't be installed. For one model,
    :func:`from_pretrained` does the same.

    Args:
        serve: ``False`` gives them back.
    """
    for method in _BITSANDBYTES:
        auto.AUTO_QUANTIZER_MAPPING[method] = QnnQuantizer if serve else _theirs[method]
