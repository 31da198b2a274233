"""The formats that the weights of experts come in."""

from __future__ import annotations

from typing import Literal, get_args

from q_core.formats.codebooks import FourBitType

ExpertFormat = Literal["dense", "int8", "fp8"] | FourBitType

ROW_FORMATS = ("int8", "fp8")
"""One byte an element, and the absmax of each row as its scale."""

FOUR_BIT_FORMATS: tuple[str, ...] = get_args(FourBitType)
EXPERT_FORMATS: tuple[str, ...] = ("dense", *ROW_FORMATS, *FOUR_BIT_FORMATS)
