"""What adapters a model gets, and where."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, get_args

import torch

from q_core.formats.weight_format import WEIGHT_DTYPES

ALL_LINEAR = "all-linear"

Init = Literal["kaiming", "gaussian"]


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """What adapters :func:`q_nn.add_lora` adds. Names mean modules as they do in PEFT.

    A *choice of modules* is a regular expression that must match a module's whole name, or a tuple of names, each meaning the modules
    whose name it is or ends with, from a dot on ("q_proj").

    Attributes:
        rank: inner size of the adapters.
        alpha: the adapters' output is scaled by ``alpha / rank``.
        dropout: probability that an input of the adapters is dropped while training.
        target: the linear layers to adapt: "all-linear", every one but the output layer, or a choice of modules.
        exclude: a choice of modules not to adapt.
        layers: indices of the layers to adapt, where ``target`` names ends of names: the first number in a module's name. None for all.
        layers_pattern: names of the lists that ``layers`` counts in ("layers"); any if empty.
        rank_pattern, alpha_pattern: other ranks and alphas for some layers, by regular expressions that match the end of a name, from a
            dot on. The first that matches counts.
        rslora: scale by ``alpha / sqrt(rank)``, so that high ranks learn as fast as low ones (rsLoRA, arXiv 2312.03732).
        dora: learn the length of each row of the adapted weight apart from its direction (DoRA, arXiv 2402.09353). A forward decodes
            the weight once more.
        modules_to_save: other modules to train, as copies that are saved with the adapters: those whose name ends so, not only from a
            dot on. What is inside them isn't adapted.
        init: how the inner weight starts: "kaiming", as ``nn.Linear`` does, or "gaussian", with a deviation of ``1 / rank``. The outer
            one starts as zero.
        dtype: of the adapters: float32, because the steps of a usual learning rate are smaller than bfloat16 resolves. They are small;
            bfloat16 halves their memory and that of the inputs kept for their gradients.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target: str | tuple[str, ...] = ALL_LINEAR
    _: KW_ONLY
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    init: Init = "kaiming"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRAConfig: dropout is {self.dropout!r}, expected a number from 0 to below 1")
        _check_choice("target", self.target, may_be_empty=False)
        _check_choice("exclude", self.exclude, may_be_empty=True)
        self._check_layers()
        for pattern, rank in _mapping("rank_pattern", self.rank_pattern).items():
            _check_expression("rank_pattern", pattern)
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in _mapping("alpha_pattern", self.alpha_pattern).items():
            _check_expression("alpha_pattern", pattern)
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name)))  # of its own
        for name in ("rslora", "dora"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"LoRAConfig: {name} is {getattr(self, name)!r}, expected True or False")
        _check_names("modules_to_save", self.modules_to_save)
        if self.init not in get_args(Init):
            raise ValueError(f"LoRAConfig: init is {self.init!r}, expected one of {get_args(Init)}")
        if self.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"LoRAConfig: dtype is {self.dtype!r}, expected torch.float32, torch.bfloat16 or torch.float16")

    def _check_layers(self) -> None:
        _check_names("layers_pattern", self.layers_pattern)
        for pattern in self.layers_pattern:
            _check_expression("layers_pattern", pattern)
        if self.layers is None:
            if self.layers_pattern:
                raise ValueError(
                    "LoRAConfig: layers_pattern is given and layers isn't, expected both; it says what layers counts in"
                )
            return
        if not isinstance(self.layers, tuple) or not self.layers or not all(type(i) is int and i >= 0 for i in self.layers):
            raise ValueError(
                f"LoRAConfig: layers is {self.layers!r}, expected a tuple of indices of layers, such as (0, 1), or None"
            )
        if isinstance(self.target, str):
            raise ValueError(
                f"LoRAConfig: layers is given and target is {self.target!r}, expected a tuple of names; "
                "a regular expression can say itself which layers it means"
            )

    def scaling(self, rank: int, alpha: float) -> float:
        """What the output of an adapter of that rank and alpha is multiplied by."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _check_rank(what: str, rank: object) -> None:
    if type(rank) is not int or rank < 1:
        raise ValueError(f"LoRAConfig: {what} is {rank!r}, expected an int of 1 or more")


def _check_alpha(what: str, alpha: object) -> None:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"LoRAConfig: {what} is {alpha!r}, expected a positive number")


def _check_choice(what: str, choice: object, *, may_be_empty: bool) -> None:
    if isinstance(choice, str):
        _check_expression(what, choice)
    elif choice != () or not may_be_empty:
        _check_names(what, choice, also=" or a regular expression" + (" or 'all-linear'" if what == "target" else ""))
        if not choice:
            raise TypeError(f"LoRAConfig: {what} is empty, expected at least one name")


def _check_names(what: str, names: object, *, also: str = "") -> None:
    if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"LoRAConfig: {what} is {names!r}, expected a tuple of names{also}")


def _check_expression(what: str, pattern: object) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"LoRAConfig: {what} has {pattern!r}, expected a regular expression")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"LoRAConfig: {what} {pattern!r} is not a regular expression ({error})") from error


def _mapping(what: str, mapping: object) -> Mapping[object, object]:
    if not isinstance(mapping, Mapping):
        raise TypeError(f"LoRAConfig: {what} is {mapping!r}, expected a mapping from regular expressions")
    return mapping
