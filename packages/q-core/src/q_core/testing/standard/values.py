"""Values: what the reference says, of finite numbers and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q_core.record import OpRecord
from q_core.specs import RECORDS
from q_core.specs.check import FLOATS
from q_core.testing.agreement import copy_call, reference_function, tensors_of
from q_core.testing.calls import LAYOUTS, Call, activation, calls_with_non_finite_values, laid_out, sample_calls
from q_core.testing.standard.applies import only_ops
from q_core.testing.target import Target


def test_samples(target: Target) -> None:
    """The op's own samples, which touch the corners of its contract in every dtype, agree with the reference.

    Mend: as for ``test_agreement``, whose calls are drawn.
    """
    for dtype in FLOATS:
        for call in sample_calls(target.record, dtype, target.capabilities.device):
            if target.serves(call):
                messages = target.disagreements(call)
                assert not messages, messages[0]
    target.finish()


def test_agreement(target: Target) -> None:
    """Results are the reference's: equal where the contract is exact (codes, absmax, caches), within the format's bound elsewhere.

    Mend: run the printed call through ``q_core.testing.disagreements_of``, element by element. Usual causes: strides or a storage
    offset ignored, a partial last block, the nibble order (first element high), ties (to the lower entry), an argument unused, sums in
    16 bits. The bound is in ``q_core.specs.bounds``; the rule is in the docstring of ``q_core.ops.<op>``.
    """

    def agrees(call: Call) -> None:
        messages = target.disagreements(call)
        assert not messages, messages[0]

    target.for_all(agrees)
    target.finish()


def test_layouts(target: Target) -> None:
    """Arguments may lie anywhere in memory: off alignment, strided, transposed, expanded, as far as the contract allows it.

    Mend: read through strides and the storage offset, or take ``.contiguous()`` of what is only read.
    """
    for dtype in FLOATS[:2]:
        for call in sample_calls(target.record, dtype, target.capabilities.device, most=2):
            for layout in LAYOUTS[1:]:  # the samples lie plainly
                laid = laid_out(target.record, call, {name: layout for name in call if tensors_of(call[name])})
                if target.serves(laid):
                    messages = target.disagreements(laid)
                    assert not messages, messages[0]
    target.finish()


def test_non_finite_values(target: Target) -> None:
    """NaN and infinity in the activations reach what depends on them, and nothing else.

    Mend: a maximum that drops NaN (``fmax``, ``x > best``), a clamp that turns it into a number, a scale of 0 · inf, a value that leaks
    into another row or block. Block formats: one such element makes its block's absmax non-finite and its codes those of 0.
    """

    def agrees(call: Call) -> None:
        messages = target.disagreements(call)
        assert not messages, messages[0]

    target.for_all(agrees, calls_with_non_finite_values(target.record, target.capabilities.device))
    target.finish()


@only_ops(lambda record: record.name.startswith("quantize_"))
def test_zero_encodes_to_zero(target: Target) -> None:
    """What is 0, or -0, decodes to exactly 0, in blocks of zeros and among other values.

    Mend: take the code book's entry for 0 (in NF4 code 7, in the signed dynamic map 127), and don't divide by an absmax of 0.
    """

    def keeps_zeros(call: Call) -> None:
        name = activation(target.record, call)
        assert name is not None
        for zeros in (slice(1, None, 2), slice(None)):
            values = call[name].clone(memory_format=torch.contiguous_format)
            values.view(-1)[zeros] = 0
            values.view(-1)[1::4] *= -1
            outputs = list(target.run(copy_call(call | {name: values})).values())
            decoded = _decoded(target.record, call | {name: values}, outputs)
            assert bool((decoded[values == 0] == 0).all()), f"{target.record.name}{call!r}: a zero decodes to another value"

    target.for_all(keeps_zeros)
    target.finish()


def _decoded(record: OpRecord, call: dict[str, Any], outputs: list[Tensor]) -> Tensor:
    """By the reference of the inverse op, whose first arguments are this one's outputs; where there is none, the codes."""
    inverse = RECORDS.get(f"de{record.name}")
    if inverse is None:
        return outputs[0]
    known = call | {"dtype": torch.float32, "shape": list(call[record.arguments[0]].shape)}
    rest = [known[name] for name in inverse.arguments[len(outputs) :]]
    decoded: Tensor = reference_function(inverse)(*outputs, *rest)
    return decoded
