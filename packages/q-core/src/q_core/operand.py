"""What a tensor that goes into an op, or comes out of one, may be: dtypes and axes, declared once in the op's record.

A declaration of axes is what stands between the brackets of the documentation: sizes in the letters of :mod:`q_core.hookspecs`,
separated by commas. A letter is one size throughout a call. A size may be written by others (``ceil(N * K / 2)``, ``R + 1``, ``2N``), be a
range (``2…256``), or name an integer argument (``blocksize``). ``...`` stands for any number of axes, the same ones throughout, and
``numel`` for the number of elements in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor, or each tensor of a list: then sizes hold for those at the same place in every list.

    Attributes:
        dtypes: those that it may have; the name of another argument stands for that one's dtype, or for the dtype that it is. Empty for
            any.
        axes: sizes, as above.
        flat: ``axes`` is one size, the number of elements; the shape is free, and the tensor is read flat, row-major.
    """

    dtypes: tuple[torch.dtype | str, ...]
    axes: str
    flat: bool = False

    @property
    def dtype_text(self) -> str:
        """The dtypes in words."""
        names = [f"that of {dtype}" if isinstance(dtype, str) else str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "any"

    @property
    def axes_text(self) -> str:
        """The axes as documentation has them."""
        return f"{self.axes} elements, any shape" if self.flat else f"[{self.axes}]"


Form = Operand | tuple[Operand, ...]
"""An operand, or a list that consists of these in this order."""

Declared = Form | Mapping[str, Form]
"""A form, or where the argument ``format`` decides, one a format; one that is not there has no such tensor."""


def forms_of(declared: Declared) -> Iterator[tuple[str, str, Operand]]:
    """Each operand that is declared, with its place in a list (``[0]``) and the formats that it is of; empty where it is of all.

    Formats that have the same one are taken together.
    """
    formats: dict[tuple[str, Operand], list[str]] = {}
    for format, form in declared.items() if isinstance(declared, Mapping) else (("", declared),):
        for i, operand in enumerate(form if isinstance(form, tuple) else (form,)):
            formats.setdefault((f"[{i}]" if isinstance(form, tuple) else "", operand), []).append(format)
    for (place, operand), names in formats.items():
        yield place, ", ".join(names), operand
