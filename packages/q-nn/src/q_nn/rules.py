"""What becomes of some modules of a model: one rule of a :class:`q_nn.QConfig`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, Self, get_args

from torch import nn

from q_core.formats.codebooks import FOUR_BIT_BOOKS, FourBitType
from q_core.formats.four_bit import FourBit
from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.weight_format import WeightFormat
from q_nn.patterns import check_patterns, matching

FormatName = FourBitType | Literal["int8", "int8_weight_only", "fp8"]
FORMATS: tuple[str, ...] = (*get_args(FourBitType), "int8", "int8_weight_only", "fp8")

USUAL_THRESHOLD = 6.0
"""Of LLM.int8() (arXiv 2208.07339), and so of transformers."""


@dataclass(frozen=True, slots=True)
class QRule:
    """Which modules, and what to quantize them to.

    Attributes:
        pattern: name, suffix of a name, or regular expression, see :mod:`q_nn.patterns`; ``None`` for any name.
        format: a format of :class:`q_nn.QConfig`, or ``None``: leave them as they are.
        module_type: name of the modules' class or of one that it derives from ("Embedding"), or the class itself, of which the name is
            kept. ``None`` for any. With a pattern too, both must hold.
        blocksize: elements a scale of a 4-bit format: 32 for "mxfp4", 16 for "nvfp4", for the others a power of two in 32…4096. ``None``
            for the usual one: these two, and 64.
        double_quant: quantize the scales of "nf4", "fp4" or "int4" too; ``None`` for the usual, which is to do it.
        threshold: of "int8": columns of the activations that reach it are multiplied without rounding, 0 for none; ``None`` for the usual
            6. It is for linear layers; embeddings and experts have no activations to round.
    """

    pattern: str | None = None
    format: FormatName | None = None
    _: KW_ONLY
    module_type: str | type[nn.Module] | None = None
    blocksize: int | None = None
    double_quant: bool | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.pattern is None and self.module_type is None:
            raise ValueError("QRule: pattern and module_type are None, expected one of them at least")
        if self.pattern is not None:
            check_patterns("QRule: pattern", (self.pattern,))
        if isinstance(self.module_type, type) and issubclass(self.module_type, nn.Module):
            object.__setattr__(self, "module_type", self.module_type.__name__)
        if self.module_type is not None and not (isinstance(self.module_type, str) and self.module_type.isidentifier()):
            raise TypeError(
                f"QRule: module_type is {self.module_type!r}, expected a class of modules or its name, such as 'Embedding'"
            )
        check_settings("QRule", self.format, self.blocksize, self.double_quant, self.threshold)

    def means(self, name: str, module: nn.Module) -> bool:
        """Whether the rule is about this module."""
        if self.module_type is not None and all(cls.__name__ != self.module_type for cls in type(module).__mro__):
            return False
        return self.pattern is None or matching(name, (self.pattern,)) is not None

    def weight_format(self) -> WeightFormat | None:
        """The format as tensors know it; ``None`` if the rule leaves modules as they are."""
        if self.format is None:
            return None
        if self.format == "fp8":
            return Fp8Rows()
        if self.format == "int8" or self.format == "int8_weight_only":
            return Int8Rows()
        return FourBit.of(self.format, blocksize=self.blocksize, double_quant=self.double_quant)

    def outlier_threshold(self) -> float:
        """The threshold of "int8", the usual one where the rule doesn't say."""
        return USUAL_THRESHOLD if self.threshold is None else self.threshold

    def __str__(self) -> str:
        """The modules that the rule is about, for messages."""
        parts = (repr(self.pattern) if self.pattern is not None else "", str(self.module_type or ""))
        return " of type ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: the format, and what else is said."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in said.items() if value is not None or name == "format"}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The rule that :meth:`to_dict` wrote.

        Raises:
            ValueError, TypeError: a key is unknown, "format" is missing, or a value isn't one that the rule takes.
        """
        check_keys("QRule", cls, settings)
        if "format" not in settings:
            raise ValueError("QRule: format is missing, expected a format, or null to leave modules as they are")
        return cls(**settings)


def check_settings(
    what: str, format: FormatName | None, blocksize: int | None, double_quant: bool | None, threshold: float | None
) -> None:
    """Refuse settings that are wrong, or that the format would ignore."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"{what}: format is {format!r}, expected one of {FORMATS}")
    if double_quant is not None and not isinstance(double_quant, bool):
        raise TypeError(f"{what}: double_quant is {double_quant!r}, expected True, False or None")
    if blocksize is not None:
        if format is None or format not in FOUR_BIT_BOOKS:
            raise ValueError(f"{what}: blocksize is for 4-bit formats, not for {format!r}; leave it out")
        if type(blocksize) is not int or blocksize not in FOUR_BIT_BOOKS[format].blocksizes:
            raise ValueError(
                f"{what}: blocksize is {blocksize!r}, expected one of {FOUR_BIT_BOOKS[format].blocksizes} for {format!r}"
            )
    if double_quant is not None and (format is None or format not in FOUR_BIT_BOOKS):
        raise ValueError(f"{what}: double_quant is for 4-bit formats, not for {format!r}; leave it out")
    if double_quant and format is not None and FOUR_BIT_BOOKS[format].scale != "absmax":
        raise ValueError(f"{what}: double_quant is True, but the scales of {format!r} take one byte as they are; leave it out")
    if threshold is not None:
        if format != "int8":
            raise ValueError(f"{what}: threshold is for 'int8', not for {format!r}; leave it out")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
            raise ValueError(f"{what}: threshold is {threshold!r}, expected a number of 0 or more")


def check_keys(what: str, cls: type, settings: object) -> None:
    """Refuse what isn't an object of a dataclass' fields."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"{what}: got {type(settings).__name__}, expected an object")
    known = [field.name for field in fields(cls)]
    if unknown := sorted(map(str, set(settings) - set(known))):
        raise ValueError(f"{what}: unknown keys {unknown}, expected some of {known}")
