"""States of a request, sampling parameters, and that the core needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from q_serve.core.request import TRANSITIONS, Request, RequestState
from q_serve.core.sampling import SamplingParams


def test_the_core_imports_no_torch() -> None:
    code = (
        "import sys, q_serve.core.request, q_serve.core.kv_blocks, q_serve.core.scheduler, q_serve.core.sampling\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("start", RequestState)
@pytest.mark.parametrize("end", RequestState)
def test_only_the_table_s_transitions_are_possible(start: RequestState, end: RequestState) -> None:
    request = Request("r", [1], SamplingParams(max_tokens=1))
    request.state = start
    if end in TRANSITIONS[start]:
        request.move_to(end)
        assert request.state is end
    else:
        with pytest.raises(AssertionError, match="not a legal transition"):
            request.move_to(end)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        Request("r", [], SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_bad_sampling_parameters_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{"max_tokens": 1, field: value})  # type: ignore[arg-type]
