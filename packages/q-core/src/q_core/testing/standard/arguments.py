"""Arguments: wrong ones are refused by q-core, and a predicate can be asked without values."""

from __future__ import annotations

import pytest

from q_core import ops
from q_core.chain import decline_reason
from q_core.specs.check import FLOATS
from q_core.testing.agreement import describe, map_call
from q_core.testing.calls import Call, bad_calls, sample_calls
from q_core.testing.target import Target


def test_bad_arguments(target: Target) -> None:
    """A wrong argument is the documented error of the public function, which names the op and what it expected.

    Mend: q-core validates; this fails if something of the backend's stands in the public function's place.
    """
    for bad in bad_calls(target.record, target.capabilities.device):
        with pytest.raises((TypeError, ValueError)) as raised:
            getattr(ops, target.record.name)(**bad.call)
        got, message = type(raised.value), str(raised.value)
        where = f"{bad.argument} is {bad.what}: {got.__name__}: {message}"
        assert (got, message) == (type(bad.error), str(bad.error)), f"{where}; the check says {bad.error!r}"
        assert message.startswith(f"{target.record.name}: ") and "expected" in message, where


def test_predicate_answers_without_values(target: Target) -> None:
    """The predicate says the same of tensors without values as of real ones: ``q-core explain`` asks it so.

    Mend: let ``accepts`` ask for shapes, strides and dtypes only, and return None or a reason in words.
    """

    def same(call: Call) -> None:
        meta = map_call(lambda tensor: tensor.to("meta"), call)
        reasons = [decline_reason(target.implementation, target.record, arguments) for arguments in (call, meta)]
        assert reasons[0] == reasons[1], f"{target.record.name}({describe(call)}): {reasons[0]!r}, without values {reasons[1]!r}"
        assert reasons[0] is None or (isinstance(reasons[0], str) and reasons[0].strip()), "a reason is words"

    for dtype in FLOATS:
        for call in sample_calls(target.record, dtype, target.capabilities.device):
            same(call)
