"""Repetition: the same every time, on any number of threads."""

from __future__ import annotations

import torch

from q_core.testing.agreement import copy_call, same_bits
from q_core.testing.calls import Call, LargeMake, sample_calls
from q_core.testing.target import Target, fill_freed_memory


def test_determinism(target: Target) -> None:
    """The same call gives the same bits, whatever was in memory before.

    Mend: initialise what you sum into, write every element of an output, and sum in a fixed order: no atomics on floats.
    """

    def repeats(call: Call) -> None:
        first = target.run(copy_call(call))
        for _ in range(2):
            fill_freed_memory(first)
            second = target.run(copy_call(call))
            assert same_bits(first, second), f"{target.record.name}{call!r}: two calls differ"

    target.for_all(repeats)
    target.finish()


def test_thread_count(target: Target) -> None:
    """The number of threads doesn't change a result.

    Mend: split work so that one thread makes an output element, and that its sum has the same order in every split.
    """
    before = torch.get_num_threads()

    def independent(call: Call) -> None:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(target.run(copy_call(call)))
        assert all(same_bits(results[0], other) for other in results), f"{target.record.name}{call!r}: it depends on the threads"

    try:
        for dtype in (torch.float32, torch.bfloat16):
            target.for_each(independent, sample_calls(target.record, dtype, target.capabilities.device, LargeMake(), most=3))
    finally:
        torch.set_num_threads(before)
    target.finish()
