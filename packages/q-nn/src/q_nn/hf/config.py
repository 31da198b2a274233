"""What stands in ``config.quantization_config`` of transformers models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from transformers import BitsAndBytesConfig as TheirBitsAndBytesConfig
from transformers import PreTrainedModel

from q_nn.config import QUANT_METHOD, QConfig
from q_nn.hf_config import BitsAndBytesConfig, quantization_config


@dataclass(frozen=True, slots=True)
class Served:
    """A bitsandbytes configuration whose model this package's layers serve.

    Attributes:
        original: as config.json has it.
    """

    KEY: ClassVar[str] = "bitsandbytes"

    original: Mapping[str, Any]

    @property
    def settings(self) -> BitsAndBytesConfig:
        """What of it matters."""
        return BitsAndBytesConfig.from_dict(self.original)

    @property
    def quant_method(self) -> str:
        """By which transformers finds our quantizer."""
        return QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """As the config.json of a model that is being loaded may have it."""
        return {"quant_method": QUANT_METHOD, self.KEY: dict(self.original)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote."""
        return cls(settings[cls.KEY])


def described(model: PreTrainedModel) -> TheirBitsAndBytesConfig | QConfig | None:
    """What a model is now, in an object that writes itself into config.json: in bitsandbytes' dialect where that can say it."""
    description = quantization_config(model, model.dtype)
    if description is None:
        return None
    if description["quant_method"] == QUANT_METHOD:
        return QConfig.from_dict(description)
    theirs: Any = TheirBitsAndBytesConfig
    config: TheirBitsAndBytesConfig = theirs(**{key: value for key, value in description.items() if key != "quant_method"})
    return config
