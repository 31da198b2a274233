"""What modules with a quantized weight have in common."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from q_core.formats.codebooks import FourBitType
from q_core.formats.four_bit import FourBit
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.sharding import local_shard
from q_core.formats.weight_format import WeightFormat
from q_nn.state_hooks import install


class QuantizedModule(nn.Module):
    """A module whose parameter ``weight`` is a frozen :class:`QuantizedTensor`; comes before the class of ``torch.nn`` that it extends."""

    holds: ClassVar[type[WeightFormat]]
    """The kind of format that a subclass takes."""

    def _hold(self, weight: QuantizedTensor) -> None:
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        install(self)

    def accepts_format(self, format: WeightFormat) -> bool:
        """Whether a checkpoint's weight in that format may be loaded."""
        return isinstance(format, self.holds)

    def extra_repr(self) -> str:
        """What the dense module shows, and the format."""
        weight = local_shard(self.weight)
        assert weight is not None
        return f"{super().extra_repr()}, format={weight.format}"


class FourBitModule(QuantizedModule):
    """A :class:`QuantizedModule` in four bits."""

    holds = FourBit

    fixed_type: ClassVar[FourBitType | None] = None
    """The one type that a subclass takes, which says it in its name."""

    @classmethod
    def _format(cls, quant_type: FourBitType | None, blocksize: int | None, double_quant: bool | None) -> FourBit:
        if cls.fixed_type is not None and quant_type not in (None, cls.fixed_type):
            raise ValueError(f"{cls.__name__}: quant_type is {quant_type!r}, expected {cls.fixed_type!r}; leave it out")
        return FourBit.of(quant_type or cls.fixed_type or "nf4", blocksize=blocksize, double_quant=double_quant)

    def accepts_format(self, format: WeightFormat) -> bool:
        """Whether a checkpoint's weight in that format may be loaded: of any 4-bit type, or of the one in the class's name."""
        return isinstance(format, FourBit) and self.fixed_type in (None, format.quant_type)
