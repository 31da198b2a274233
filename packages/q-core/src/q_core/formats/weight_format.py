"""What a weight format is: the one interface between a quantized tensor and the ops.

A format is a frozen, hashable value: it says how a dense weight becomes a few component tensors and back, and which op multiplies with
them. It holds no tensors itself, so that it can be compared, pickled, and guarded on by torch.compile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from q_core import ops
from q_core.backend import NoBackendError
from q_core.registry import registry

Components = Mapping[str, Tensor]
"""Component tensors by name."""

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a quantized weight may decode to."""


class WeightFormat(ABC):
    """How a weight is held in component tensors. Subclasses are frozen dataclasses."""

    __slots__ = ()

    @property
    @abstractmethod
    def component_names(self) -> tuple[str, ...]:
        """Names of the component tensors, in order."""

    @property
    def derives(self) -> bool:
        """Whether :meth:`resolve` computes anything, and so is worth keeping."""
        return False

    @property
    def resolved_format(self) -> WeightFormat:
        """The format that holds what :meth:`resolve` gives."""
        return self

    @abstractmethod
    def quantize(self, dense: Tensor) -> dict[str, Tensor]:
        """Encode a dense weight."""

    @abstractmethod
    def empty(self, shape: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        """Uninitialized components of the right shapes, on any device, meta too."""

    def resolve(self, components: Components) -> Components:
        """The components as the ops take them, anything nested decoded. The methods below take these, in the canonical layout."""
        return components

    @abstractmethod
    def dequantize(self, resolved: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Decode to a dense tensor of ``shape`` and ``dtype``."""

    @abstractmethod
    def linear(self, x_TK: Tensor, resolved: Components, shape: Sequence[int], bias: Tensor | None, layout: str) -> Tensor:
        """Multiply activations [..., K] with the weight [N, K] in any layout: [..., N]."""

    @abstractmethod
    def embedding(self, ids: Tensor, components: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Decode the rows ``ids`` [...] of the weight [V, K], and no other, to [..., K]; the components are as they are held."""

    @abstractmethod
    def check_cut(self, shape: Sequence[int], row: int) -> None:
        """Refuse to cut a weight of ``shape`` before a row of its first axis.

        Raises:
            ValueError: the format can't cut there; the message says where it can.
        """

    @abstractmethod
    def rows(self, resolved: Components, shape: Sequence[int], start: int, stop: int) -> tuple[WeightFormat, dict[str, Tensor]]:
        """The rows ``start…stop-1`` of the first axis: their format and components.

        Raises:
            ValueError: the format can't cut there.
        """

    @property
    @abstractmethod
    def prepack_arguments(self) -> Mapping[str, Any]:
        """What the ops ``prepack_weight`` and ``unpack_weight`` are told of the format."""

    def prepack(self, resolved: Components, shape: Sequence[int], layout: str) -> Components:
        """Bring components from the canonical layout into a backend's; they are those of :attr:`resolved_format` then.

        Raises:
            NoBackendError: no backend makes that layout of such a weight; the message lists those that there are.
        """
        try:
            packed = ops.prepack_weight([*resolved.values()], shape=shape, layout=layout, **self.prepack_arguments)
        except NoBackendError as error:
            known = ", ".join(map(repr, registry().layouts())) or "none"
            raise NoBackendError(
                f"prepack: nobody here makes the layout {layout!r} of {self}; the layouts of the backends here: {known}. {error}"
            ) from error
        return dict(zip(resolved, packed, strict=True))

    def unpack(self, private: Components, shape: Sequence[int], layout: str) -> Components:
        """Bring components of a backend's layout back into the canonical one.

        Raises:
            NoBackendError: the backend whose layout it is doesn't serve any more; the message says how to get the weight back.
        """
        try:
            unpacked = ops.unpack_weight([*private.values()], shape=shape, layout=layout, **self.prepack_arguments)
        except NoBackendError as error:
            raise NoBackendError(
                f"unpack: a weight {list(shape)} is held in the layout {layout!r}, which nobody here can read; select the backend "
                f"{layout.partition('.')[0]!r} again (Q_BACKENDS, use_backends) and call .unpack() on the weight before it goes. {error}"
            ) from error
        return dict(zip(private, unpacked, strict=True))

    def check(self, components: Components, shape: Sequence[int]) -> None:
        """Refuse components that can't be those of a weight of ``shape``.

        Raises:
            ValueError: a component is missing, unknown, or of another dtype or shape than expected; the message names it.
        """
        if set(components) != set(self.component_names):
            raise ValueError(f"{self}: got the components {sorted(components)}, expected {sorted(self.component_names)}")
        for name, expected in self.empty(shape, "meta").items():
            got = components[name]
            if got.dtype != expected.dtype or got.shape != expected.shape:
                raise ValueError(
                    f"{self}: component {name!r} of a weight {list(shape)} is {got.dtype} {list(got.shape)}, "
                    f"expected {expected.dtype} {list(expected.shape)}"
                )
        devices = {component.device for component in components.values()}
        if len(devices) > 1:
            raise ValueError(f"{self}: the components are on {sorted(map(str, devices))}, expected one device; move them first")
