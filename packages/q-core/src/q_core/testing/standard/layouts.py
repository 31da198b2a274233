"""Private weight layouts: exact both ways, and as good as the canonical one in a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from q_core import ops
from q_core.backend import Backend
from q_core.chain import decline_reason
from q_core.record import OpRecord
from q_core.specs import RECORDS
from q_core.specs.check import FLOATS
from q_core.testing.agreement import compare, copy_call, expected_outputs, map_call, same_bits
from q_core.testing.calls import Call, sample_calls
from q_core.testing.standard.applies import only_where
from q_core.testing.target import Target, implementations


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of a call: how it is held, the arguments that it consists of, (N, K), elements a block."""

    format: str
    arguments: tuple[str, ...]
    shape: list[int]
    blocksize: int = 64


_WEIGHT: dict[str, Callable[[Call], Weight]] = {
    "gemm": lambda call: Weight("dense", ("w_NK",), list(call["w_NK"].shape)),
    "gemm_4bit": lambda call: Weight(call["quant_type"], ("packed", "absmax"), call["shape"], call["blocksize"]),
    "int8_gemm": lambda call: Weight("int8", ("b_NK", "b_scale"), list(call["b_NK"].shape)),
    "gemm_int8_weight": lambda call: Weight("int8", ("w_NK", "w_scale"), list(call["w_NK"].shape)),
}
_PAIR = ("prepack_weight", "unpack_weight")


def _has_private_layouts(record: OpRecord, backend: Backend) -> bool:
    """A backend that packs has a layout to pack into; the reference's pair is for the canonical one."""
    return "layout" in record.arguments and (bool(backend.layouts) or (record.name in _PAIR and backend.name != "reference"))


@only_where(_has_private_layouts)
def test_private_layouts(target: Target) -> None:
    """In each layout that the backend names a product is that of the canonical weight, and ``unpack_weight`` gives back every bit.

    Mend: name the layout in ``Backend.layouts``, let both ``prepack_weight`` and ``unpack_weight`` serve it, keep each tensor's dtype and
    shape, and take padding (of an odd count of 4-bit codes, say) along. A product takes the tensors as ``prepack_weight`` gave them.
    """
    backend = target.implementation.backend
    assert backend.layouts, f"{backend.name} has {target.record.name}, and Backend.layouts names no layout"
    missing = [op for op in _PAIR if op not in implementations(target.capabilities)]
    assert not missing, f"{backend.name} has the layouts {backend.layouts}, and no {' and no '.join(missing)}"
    for layout in backend.layouts:
        for dtype in FLOATS:
            for call in sample_calls(target.record, dtype, target.capabilities.device):
                _holds(target, call, layout)
    target.finish()


def _holds(target: Target, call: Call, layout: str) -> None:
    if target.record.name in _PAIR:
        if _packed(target, call["tensors"], {name: call[name] for name in ("format", "shape", "blocksize")}, layout) is not None:
            target.served += 1
        return
    weight = _WEIGHT[target.record.name](call)
    canonical = [call[name] for name in weight.arguments]
    settings = {"format": weight.format, "shape": weight.shape, "blocksize": weight.blocksize}
    private = _packed(target, canonical, settings, layout)
    if private is None:
        return
    moved = Call(call | dict(zip(weight.arguments, private, strict=True)) | {"layout": layout})
    if target.serves(moved):
        expected, bounds = expected_outputs(target.record, map_call(Tensor.cpu, copy_call(call)))
        for name, value in map_call(Tensor.cpu, target.run(moved)).items():
            message = compare(value, expected[name], bounds[name])
            assert not message, f"{target.record.name}{moved!r}: {name} {message}"


def _packed(target: Target, tensors: list[Tensor], settings: dict[str, Any], layout: str) -> list[Tensor] | None:
    """The weight in a layout, which it comes back from; ``None`` where the backend declines to pack it."""
    packing = implementations(target.capabilities)["prepack_weight"]
    settings = settings | {"layout": layout}
    reason = decline_reason(packing, RECORDS["prepack_weight"], {"tensors": tensors, **settings})
    if reason is not None:
        target.declined[reason] += 1
        return None
    private = ops.prepack_weight(tensors, **settings)
    where = f"prepack_weight({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
    for got, given in zip(private, tensors, strict=True):
        assert (got.dtype, got.shape) == (given.dtype, given.shape), f"{where}: gives {got.dtype}{list(got.shape)}"
    assert same_bits(ops.unpack_weight(private, **settings), tensors), f"{where}: unpack_weight doesn't give back the same bits"
    return private
