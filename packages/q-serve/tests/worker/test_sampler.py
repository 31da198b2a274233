"""The sampler: its distribution, its limits, and that draws don't depend on the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q_serve.core.sampling import SamplingParams
from q_serve.worker.sampler import Draw, sample, uniform


def draw(index: int = 0, **params: float) -> Draw:
    return Draw(SamplingParams(**{"max_tokens": 1, "seed": 1} | params), index)  # type: ignore[arg-type]


def counts(logits: torch.Tensor, number: int = 20_000, **params: float) -> torch.Tensor:
    tokens = sample(logits.expand(number, -1), [draw(index, **params) for index in range(number)])
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, -2.0, 0.0, float("-inf")])
    expected = (logits / temperature).softmax(-1)
    seen = counts(logits, temperature=temperature) / 20_000
    # five standard deviations of a binomial share
    assert ((seen - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_truncation_keeps_the_shares_of_what_is_left() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    for params, kept in (
        ({"top_k": 2}, [2, 3]),
        ({"top_p": 0.6}, [2, 3]),
        ({"top_p": 0.39}, [3]),
        ({"top_k": 3, "top_p": 0.5}, [2, 3]),
    ):
        seen = counts(logits, **params)  # type: ignore[arg-type]
        assert seen.nonzero().flatten().tolist() == kept
        share = logits.exp()[kept] / logits.exp()[kept].sum()
        assert ((seen[kept] / 20_000 - share).abs() < 0.02).all()


def test_top_p_keeps_no_token_that_it_does_not_need() -> None:
    assert counts(torch.zeros(4), 500, top_p=0.5).count_nonzero() == 2
    assert counts(torch.zeros(4), 500, top_p=0.51).count_nonzero() == 3


parameters = st.tuples(st.sampled_from([0.0, 1e-300, 0.3, 1.0, 2.0]), st.sampled_from([1e-9, 0.5, 1.0]), st.integers(0, 9))
rows = st.lists(st.lists(st.floats(-50, 50, width=32), min_size=7, max_size=7), min_size=1, max_size=6)


@given(rows=rows, params=st.lists(parameters, min_size=6, max_size=6), index=st.integers(0, 1000))
def test_a_row_is_sampled_as_if_it_were_alone(rows: list[list[float]], params: list[tuple[float, float, int]], index: int) -> None:
    logits = torch.tensor(rows)
    draws = [draw(index + row, temperature=t, top_p=p, top_k=k, seed=row) for row, (t, p, k) in enumerate(params[: len(rows)])]
    together = sample(logits, draws)
    alone = [sample(logits[row : row + 1], [draws[row]])[0] for row in range(len(rows))]
    assert together == alone
    for row, token in enumerate(together):
        assert token is not None
        if draws[row].params.greedy or draws[row].params.top_p == 1e-9 or draws[row].params.temperature == 1e-300:
            assert logits[row, token] == logits[row].max()
        if (k := draws[row].params.top_k) and k < 7:
            assert (logits[row] > logits[row, token]).sum() < k


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[:, 2] = 9
    logits[1, 4] = bad
    tokens = sample(logits, [draw(temperature=temperature, top_k=1 if temperature else 0)] * 3)
    assert tokens == [2, None, 2]
    assert sample(torch.full((1, 5), float("-inf")), [draw(temperature=temperature)]) == [None]


def test_seeds_give_different_reproducible_numbers() -> None:
    numbers = {uniform(seed, index) for seed in range(100) for index in range(100)}
    assert len(numbers) == 10_000
    assert all(0 <= number < 1 for number in numbers)
    assert math.isclose(sum(numbers) / len(numbers), 0.5, abs_tol=5 * math.sqrt(1 / 12 / 10_000))
    assert uniform(7, 3) == uniform(7, 3)
    assert 0 <= uniform(2**63 - 1, 2**40) < 1
