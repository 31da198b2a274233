"""Say in a :class:`q_nn.QConfig` what a model's modules are held as, so that its like can be built from the same class."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from q_core.formats.four_bit import NESTED_BLOCKSIZE, FourBit
from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_nn.config import QConfig
from q_nn.convert import EMBEDDING, kind_of
from q_nn.linear8bit import Linear8bitLt
from q_nn.rules import FormatName, QRule


@dataclass(frozen=True, slots=True)
class _Held:
    """How a module is held, in a rule's words."""

    format: FormatName
    blocksize: int | None = None
    double_quant: bool | None = None
    threshold: float | None = None


def describe(model: nn.Module) -> QConfig | None:
    """What would make a dense model of this one's class into one whose modules are held alike; ``None`` if nothing is quantized.

    What most modules are held as becomes the configuration's format; rules and skip patterns name the others.

    Raises:
        ValueError: a weight is held in a way that a configuration has no word for.
    """
    names: dict[_Held, list[str]] = defaultdict(list)
    embeddings: set[str] = set()
    dense: list[str] = []
    for name, module in model.named_modules():
        weights = quantized_weights(module)
        if weights:
            alike = {_held(name, module, weight.format) for weight in weights.values()}
            if len(alike) > 1:
                raise ValueError(f"save: {name} is held in several formats, {sorted(map(str, alike))}, expected one a module")
            names[alike.pop()].append(name)
            if isinstance(module, nn.Embedding):
                embeddings.add(name)
        elif isinstance(module, Linear8bitLt):
            raise ValueError(f"save: {name} holds its weight dense, to train it, which q_nn.QConfig has no word for")
        elif (kind := kind_of(module)) is not None and kind is not EMBEDDING:
            dense.append(name)
    if not names:
        return None
    everywhere = [name for name, _ in model.named_modules()]
    usual = max(names, key=lambda held: len(set(names[held]) - embeddings))
    rules = []
    for held, held_so in names.items():
        by_rule = [name for name in held_so if held != usual or name in embeddings]
        if by_rule:
            pattern = exactly(by_rule, everywhere)
            rules.append(
                QRule(pattern, held.format, blocksize=held.blocksize, double_quant=held.double_quant, threshold=held.threshold)
            )
    skip = (exactly(dense, everywhere),) if dense else ()
    return QConfig(usual.format, usual.blocksize, usual.double_quant, usual.threshold, skip, tuple(rules))


def quantized_weights(module: nn.Module) -> dict[str, QuantizedTensor]:
    """The quantized parameters of a module itself, by name."""
    held: dict[str, Any] = module._parameters
    return {name: parameter for name, parameter in held.items() if isinstance(parameter, QuantizedTensor)}


def exactly(names: Iterable[str], everywhere: Iterable[str]) -> str:
    r"""A pattern (:mod:`q_nn.patterns`) that means these names and no others of ``everywhere``.

    Where all names that differ in numbers alone are meant, one ``\d+`` stands for them.
    """
    meant = set(names)
    alike: dict[str, list[str]] = defaultdict(list)
    for name in everywhere:
        alike[_numberless(name)].append(name)
    parts = dict.fromkeys(
        _numberless(name) if meant.issuperset(alike[_numberless(name)]) and len(alike[_numberless(name)]) > 1 else re.escape(name)
        for name in names
    )
    return f"(?:{'|'.join(parts)})$"


def _numberless(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _held(name: str, module: nn.Module, format: WeightFormat) -> _Held:
    if isinstance(format, FourBit) and format.nested_blocksize in (None, NESTED_BLOCKSIZE):
        nested = format.nested_blocksize is not None
        return _Held(format.quant_type, format.blocksize, nested)
    if isinstance(format, Int8Rows):
        if isinstance(module, Linear8bitLt):
            return _Held("int8", threshold=module.threshold)
        return _Held("int8_weight_only")
    if isinstance(format, Fp8Rows):
        return _Held("fp8")
    raise ValueError(f"save: {name} is held as {format}, which q_nn.QConfig has no word for")
