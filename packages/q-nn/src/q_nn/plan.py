"""Which modules of a model a configuration quantizes, and why not the others. Nothing is changed, and the model may be on meta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from q_nn.config import DEFAULT_SKIP, QConfig
from q_nn.convert import Kind, kind_of, refusal
from q_nn.memory import tensor_bytes
from q_nn.patterns import matching
from q_nn.report import KeptParameter
from q_nn.rules import QRule
from q_nn.ties import tie_groups


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A module to quantize, or several that share their weight.

    Attributes:
        names: of the modules; the first by which the model names them comes first.
        rules: for each the rule that means it; all give one format.
        kind: of the first.
    """

    names: tuple[str, ...]
    rules: tuple[QRule, ...]
    kind: Kind


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What is to be quantized, in the model's order, and the parameters that are kept. It holds no tensors."""

    layers: tuple[PlannedLayer, ...]
    kept: tuple[KeptParameter, ...]


def plan_quantization(model: nn.Module, config: QConfig) -> QuantizePlan:
    """Decide what :func:`q_nn.quantize` would do.

    Raises:
        ValueError: there is nothing to quantize, or a rule or a skip pattern means nothing; the message names it.
    """
    modules = dict(model.named_modules())
    _check_patterns(modules, config)
    rules, reasons = _decide(modules, config)
    ties = _resolve_ties(model, modules, rules, reasons)
    layers, kept = [], []
    for name, module in modules.items():
        if name in rules:
            together = ties.get(name, (name,))
            if together[0] == name:
                kind = kind_of(module)
                assert kind is not None
                layers.append(PlannedLayer(together, tuple(rules[other] for other in together), kind))
        else:
            kept += _kept(name, module, reasons[name])
    if not layers:
        reasons_given = "; ".join(sorted({parameter.reason for parameter in kept}))
        raise ValueError(f"quantize: the model has nothing to quantize: {reasons_given or 'it has no parameters'}")
    return QuantizePlan(tuple(layers), tuple(kept))


def _decide(modules: Mapping[str, nn.Module], config: QConfig) -> tuple[dict[str, QRule], dict[str, str]]:
    """For each module the rule by which it is quantized, or the reason why it isn't."""
    rules: dict[str, QRule] = {}
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        rule = config.rule_for(name, module)
        reason = refusal(module, rule or config.default_rule)
        kind = kind_of(module)
        if reason is None and not name:
            reason = "the model itself is the layer, so that nothing can hold another in its place; use quantize_module"
        elif kind is not None and rule is not None and rule.format is None:
            reason = f"left by the rule for {rule}"
        elif kind is not None and rule is None and (pattern := config.skip_for(name)) is not None:
            reason = f"skipped by {pattern!r}"
        elif reason is None and rule is None and kind is not None and not kind.by_default:
            reason = "embeddings are quantized where a rule says so"
        if reason is None:
            rules[name] = rule or config.default_rule
        else:
            reasons[name] = reason
    return rules, reasons


def _resolve_ties(
    model: nn.Module, modules: Mapping[str, nn.Module], rules: dict[str, QRule], reasons: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """Modules that share their weight, by name. Those that can't be quantized together go from ``rules`` to ``reasons``."""
    together: dict[str, tuple[str, ...]] = {}
    for weight, group in tie_groups(model).items():
        name, _, own = weight.rpartition(".")
        kind = kind_of(modules[name])
        if name not in rules or kind is None or own not in kind.weights:
            continue
        owners = tuple(other.rpartition(".")[0] for other in group)
        alike = {rules[owner].weight_format() if owner in rules else None for owner in owners}
        if len(alike) == 1 and all(other.endswith(".weight") for other in group):
            together[name] = owners
        else:
            others = ", ".join(other for other in group if other != weight)
            reasons[name] = f"tied to {others}, which isn't quantized likewise"
    for name in reasons:
        rules.pop(name, None)
    return together


def _kept(name: str, module: nn.Module, reason: str) -> list[KeptParameter]:
    kept = []
    for own, parameter in module._parameters.items():
        if parameter is not None:
            why = "one-dimensional" if parameter.ndim < 2 and not isinstance(module, nn.Linear) else reason
            kept.append(KeptParameter(f"{name}.{own}".lstrip("."), tuple(parameter.shape), tensor_bytes(parameter), why))
    return kept


def _check_patterns(modules: Mapping[str, nn.Module], config: QConfig) -> None:
    """Refuse rules and skip patterns that mean nothing: most often they are misspelt."""
    holders = {name: module for name, module in modules.items() if any(p is not None for p in module._parameters.values())}
    advice = f"a name is matched from its start or by its end, such as {next(reversed(holders), '')!r}, or '.*part' for what holds a part"
    left = dict(holders)
    for rule in config.rules:
        meant = [name for name, module in left.items() if rule.means(name, module)]
        if not meant:
            taken = any(rule.means(name, module) for name, module in holders.items())
            nothing = "nothing that an earlier rule doesn't mean" if taken else "no module with parameters"
            raise ValueError(f"quantize: the rule for {rule} means {nothing}; {advice}")
        for name in meant:
            del left[name]
    for pattern in config.skip:
        if pattern not in DEFAULT_SKIP and not any(matching(name, (pattern,)) for name in holders):
            raise ValueError(f"quantize: skip pattern {pattern!r} means no module with parameters; {advice}")
