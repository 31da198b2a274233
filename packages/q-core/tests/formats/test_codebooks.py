"""Code books against the definitions they come from: the paper's quantiles, and the peer's values."""

from __future__ import annotations

import itertools
import statistics

import bitsandbytes.functional as peer
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from q_core.formats import codebooks
from q_core.formats.codebooks import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, FOUR_BIT_BOOKS, NF4, FourBitType, book_tensor, dynamic_map


def test_nf4_is_made_of_normal_quantiles() -> None:
    """Quantiles of both sides, eight and seven, and zero, divided by the largest (arXiv 2305.14314)."""
    quantile = statistics.NormalDist().inv_cdf
    top = 0.9677083
    above = [quantile(top + (0.5 - top) * i / 8) for i in range(8)]
    below = [-quantile(top + (0.5 - top) * i / 7) for i in range(7)]
    values = sorted([*above, 0.0, *below])
    expected = [v / max(values) for v in values]
    torch.testing.assert_close(torch.tensor(NF4), torch.tensor(expected))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_books_are_the_peers(quant_type: FourBitType) -> None:
    assert torch.equal(book_tensor(quant_type, torch.device("cpu")), peer.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("quant_type", FOUR_BIT_BOOKS)
def test_4bit_books_are_in_order_and_within_their_bound(quant_type: FourBitType) -> None:
    book = FOUR_BIT_BOOKS[quant_type]
    ordered = [book.values[code] for code in book.ordered]
    assert ordered == sorted(set(ordered)), "every value once, ascending"
    assert book.values[book.zero_code] == 0 and book.zero_code in book.ordered
    steps = [b - a for a, b in itertools.pairwise(ordered)]
    assert max(steps) / 2 <= book.bound * (1 + 1e-4)


@pytest.mark.parametrize(("signed", "values"), [(True, DYNAMIC_SIGNED), (False, DYNAMIC_UNSIGNED)])
def test_dynamic_maps_are_the_peers_bit_for_bit(signed: bool, values: tuple[float, ...]) -> None:
    assert torch.equal(dynamic_map(signed=signed), peer.create_dynamic_map(signed=signed).float())
    assert len(values) == 256 and list(values) == sorted(values)
    assert values.index(0.0) == (127 if signed else 0)


def test_books_are_shared_and_usable_for_a_backward() -> None:
    with torch.inference_mode():
        inside = dynamic_map(signed=True, device="cpu")
    assert inside is dynamic_map(signed=True) and not inside.is_inference()


def test_no_fake_tensor_gets_into_the_cache() -> None:
    codebooks._dynamic_map.cache_clear()
    with FakeTensorMode():
        assert isinstance(codebooks.dynamic_map(signed=True), FakeTensor)
    assert type(codebooks.dynamic_map(signed=True)) is torch.Tensor
