"""What to quantize a model to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import nn

from q_core.formats.weight_format import WeightFormat
from q_nn.patterns import check_patterns, matching
from q_nn.rules import FormatName, QRule, check_keys, check_settings

DEFAULT_SKIP = ("lm_head",)

QUANT_METHOD = "q_nn"
"""What config.json of a Hugging Face model says where the weights are in formats that only this package reads."""


@dataclass(frozen=True, slots=True)
class QConfig:
    """How :func:`q_nn.quantize` quantizes.

    The first of ``rules`` that means a module says what becomes of it. Of the rest, what ``skip`` names is left as it is, and linear layers
    and fused experts are quantized to ``format``; embeddings need a rule.

    Attributes:
        format: of 4 bits "nf4", "fp4" (bitsandbytes'), "int4", "mxfp4" or "nvfp4"; "int8", for linear layers LLM.int8(), which rounds
            activations too; "int8_weight_only", which doesn't; "fp8", E4M3 rows, for fused experts alone.
        blocksize, double_quant, threshold: of ``format``, see :class:`QRule`.
        skip: modules to leave as they are: names, suffixes of names, or regular expressions, see :mod:`q_nn.patterns`. Each but the
            default must mean a module that has parameters.
        rules: for some modules something else. Each must mean a module that none before it does.
    """

    format: FormatName = "nf4"
    blocksize: int | None = None
    double_quant: bool | None = None
    threshold: float | None = None
    skip: tuple[str, ...] = DEFAULT_SKIP
    rules: tuple[QRule, ...] = ()

    def __post_init__(self) -> None:
        if self.format is None:
            raise ValueError("QConfig: format is None, expected a format; quantize some modules only with skip=('.*',) and rules")
        check_settings("QConfig", self.format, self.blocksize, self.double_quant, self.threshold)
        check_patterns("QConfig: skip", self.skip)
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, QRule) for rule in self.rules):
            raise TypeError(f"QConfig: rules is {self.rules!r}, expected a tuple of QRule")

    @property
    def default_rule(self) -> QRule:
        """What becomes of linear layers and experts that no rule and no skip pattern means."""
        return QRule(
            ".*", self.format, blocksize=self.blocksize, double_quant=self.double_quant, threshold=self.threshold
        )  # fmt: skip

    def weight_format(self) -> WeightFormat:
        """``format`` as tensors know it."""
        format = self.default_rule.weight_format()
        assert format is not None
        return format

    @property
    def quant_method(self) -> str:
        """The name that transformers asks a quantization config for, to find who serves it; so that it finds us, see :mod:`q_nn.hf`."""
        if "transformers" in sys.modules:
            import q_nn.hf  # noqa: F401 (registers)
        return QUANT_METHOD

    def rule_for(self, name: str, module: nn.Module) -> QRule | None:
        """The first rule that means a module."""
        return next((rule for rule in self.rules if rule.means(name, module)), None)

    def skip_for(self, name: str) -> str | None:
        """The first skip pattern that means a module."""
        return matching(name, self.skip)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, all of it but what is ``None``."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        said |= {"quant_method": QUANT_METHOD, "skip": list(self.skip), "rules": [rule.to_dict() for rule in self.rules]}
        return {name: value for name, value in said.items() if value is not None}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The configuration that :meth:`to_dict` wrote.

        Raises:
            ValueError, TypeError: a key is unknown, or a value isn't one that it takes.
        """
        if isinstance(settings, Mapping) and "quant_method" in settings:
            if settings["quant_method"] != QUANT_METHOD:
                raise ValueError(f"QConfig: quant_method is {settings['quant_method']!r}, expected {QUANT_METHOD!r}")
            settings = {key: value for key, value in settings.items() if key != "quant_method"}
        check_keys("QConfig", cls, settings)
        lists = {name: _as_tuple(name, settings[name]) for name in ("skip", "rules") if name in settings}
        if "rules" in lists:
            lists["rules"] = tuple(map(QRule.from_dict, lists["rules"]))
        return cls(**{**settings, **lists})


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"QConfig: {name} is {value!r}, expected a list")
    return tuple(value)
