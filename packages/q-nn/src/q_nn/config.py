"""What to quantize a model to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from q_core.formats.four_bit import NESTED_BLOCKSIZE, FourBit
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.weight_format import WeightFormat
from q_nn.patterns import check_patterns

FormatName = Literal["nf4", "fp4", "int8"]

DEFAULT_SKIP = ("lm_head",)


@dataclass(frozen=True, slots=True)
class QConfig:
    """How :func:`q_nn.quantize` quantizes.

    Attributes:
        format: "nf4" or "fp4", 4-bit weights, or "int8", LLM.int8() without outliers.
        blocksize: elements a scale of the 4-bit formats, a power of two in 32…4096. int8 has one scale a row.
        double_quant: quantize the scales of the 4-bit formats too.
        skip: modules to leave as they are: names, suffixes of names, or regular expressions, see :mod:`q_nn.patterns`. Each but the
            default must mean a module of the model.
    """

    format: FormatName = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = DEFAULT_SKIP

    def __post_init__(self) -> None:
        if self.format not in get_args(FormatName):
            raise ValueError(f"QConfig: format is {self.format!r}, expected one of {get_args(FormatName)}")
        if self.format == "int8" and self.blocksize != 64:
            raise ValueError("QConfig: blocksize is for 4-bit formats, int8 has one scale a row; leave it out")
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"QConfig: double_quant is {self.double_quant!r}, expected True or False")
        check_patterns("QConfig: skip", self.skip)
        self.weight_format()  # refuses a wrong blocksize

    def weight_format(self) -> WeightFormat:
        """The format as the tensors know it."""
        if self.format == "int8":
            return Int8Rows()
        return FourBit(self.format, self.blocksize, NESTED_BLOCKSIZE if self.double_quant else None)
