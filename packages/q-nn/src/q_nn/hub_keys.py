"""From the tensors of a checkpoint to those of a model, where transformers 5 names or stacks them differently.

Checkpoints on the hub keep the names of the program that wrote them; Mixtral's, say, have a tensor an expert, and transformers' model one
parameter for all experts. transformers knows how to get from one to the other, and is asked for it.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(slots=True)
class Conversion:
    """How some tensors of a model come from some of a checkpoint.

    Attributes:
        sources: keys of the checkpoint, in order.
        targets: keys of the model with what they will hold, on the meta device.
    """

    sources: list[str] = field(default_factory=list)
    targets: dict[str, Tensor] = field(default_factory=dict)
    _convert: Callable[[Callable[[str], Tensor]], dict[str, Tensor]] = field(kw_only=True)

    def run(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Read the sources, and make the targets of them."""
        return self._convert(read)


def conversions(
    model: nn.Module, headers: Mapping[str, Tensor], keys: Iterable[str], targets: Mapping[str, Tensor]
) -> list[Conversion]:
    """How the tensors at ``keys`` become tensors of a model; those that it has no place for are left out.

    Args:
        model: of transformers; of other models nothing is known, and nothing is converted.
        headers: the checkpoint's tensors, on the meta device.
        keys: of the checkpoint, those that need a conversion.
        targets: the model's tensors by key.

    Raises:
        ValueError: tensors that belong together don't fit together.
    """
    if "transformers" not in sys.modules:
        return []
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        return []
    from transformers import core_model_loading as hub
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, hub.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, hub.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(keys, key=hub.dot_natural_key):
        target, pattern = hub.rename_source_key(key, renamings, converters, model.base_model_prefix, {**targets})
        if target in targets:
            parts.setdefault(target, []).append((key, pattern))

    made = []
    for target, sources in parts.items():
        pattern = sources[0][1]
        convert = _renaming(sources[0][0], target) if pattern is None else _converter(by_pattern[pattern], sources, target, model)
        conversion = Conversion([key for key, _ in sources], _convert=convert)
        try:
            conversion.targets = conversion.run(headers.__getitem__)
        except Exception as error:  # whatever transformers' operations raise for shapes that don't match
            raise ValueError(
                f"checkpoint: {target} can't be made of {sources[0][0]} and {len(sources) - 1} more: {error}"
            ) from error
        made.append(conversion)
    return made


def is_ignored(model: nn.Module, key: str) -> bool:
    """Whether a checkpoint may hold a tensor that the model doesn't want: buffers that were saved once, and what its class declares."""
    for name, module in model.named_modules():
        for buffer in module._non_persistent_buffers_set:
            # Those of older models are in other modules, of the same name.
            known = f"{name.rpartition('.')[2]}.{buffer}" if name else buffer
            if key == known or (name and key.endswith(f".{known}")):
                return True
    return any(re.search(pattern, key) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def _renaming(key: str, target: str) -> Callable[[Callable[[str], Tensor]], dict[str, Tensor]]:
    return lambda read: {target: read(key)}


def _converter(
    converter: Any, sources: list[tuple[str, str | None]], target: str, model: nn.Module
) -> Callable[[Callable[[str], Tensor]], dict[str, Tensor]]:
    def convert(read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        fresh = copy.deepcopy(converter)
        for key, pattern in sources:
            fresh.add_tensor(target, key, pattern, read(key))
        made = fresh.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return convert
