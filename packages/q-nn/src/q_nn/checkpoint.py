"""A checkpoint directory seen with a model's eyes: its tensors under the model's keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from q_core.formats.checkpoint import flat_keys
from q_nn.hub_keys import Conversion, conversions, is_ignored
from q_nn.weights import Weights


class Checkpoint:
    """The tensors of a directory as a model has them, or as the flat layout of quantized weights does.

    Args:
        directory: holds the weights, see :class:`q_nn.weights.Weights`.
        model: that they are for, built already or on the meta device.
        targets: the model's tensors by key.

    Attributes:
        headers: what there is for the model by the model's keys, on the meta device.
        unexpected: keys of the checkpoint that the model has no place for.
    """

    def __init__(self, directory: Path, model: nn.Module, targets: Mapping[str, Tensor]) -> None:
        self._weights = Weights(directory)
        stored = self._weights.headers
        direct = {own for key in targets if key in stored for own in (flat_keys(key, stored) or (key,))}
        self.headers: dict[str, Tensor] = {key: stored[key] for key in stored if key in direct}
        self._conversions: dict[str, Conversion] = {}
        converted: set[str] = set()
        if rest := [key for key in stored if key not in direct]:
            for conversion in conversions(model, stored, rest, targets):
                self._add(conversion)
                converted.update(conversion.sources)
        self.unexpected = sorted(key for key in rest if key not in converted and not is_ignored(model, key))
        self._converted: dict[str, Tensor] = {}

    def _add(self, conversion: Conversion) -> None:
        for target, header in conversion.targets.items():
            if target in self.headers:
                raise ValueError(
                    f"checkpoint: {target} is there, and {conversion.sources[0]} as well, which makes it; expected one"
                )
            self.headers[target] = header
            self._conversions[target] = conversion

    def read(self, key: str) -> Tensor:
        """Read a tensor, and nothing else but what it is made of together with others; each can be read once."""
        if key not in self._conversions:
            return self._weights.read(key)
        if key not in self._converted:
            self._converted.update(self._conversions[key].run(self._weights.read))
        return self._converted.pop(key)

    def read_weight(self, key: str) -> dict[str, Tensor]:
        """Read a weight: itself under its key, or if it is quantized all the tensors of its flat layout."""
        return {own: self.read(own) for own in flat_keys(key, self.headers) or (key,)}
