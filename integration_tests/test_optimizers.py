"""The evidence for the optimizers' precisions is gathered as it says; here on small models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import q_nn
import q_optim
from optimizers import convergence, memory, paging, report
from optimizers.__main__ import STATES_SHARE, missed


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are faster so, and the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def memories() -> dict[int, memory.Memory]:
    return {bits: memory.measure(bits, layers=2, width=512) for bits in (32, 8, 4)}


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> paging.Paging:
    return paging.measure(8, tmp_path_factory.mktemp("states"), layers=3, width=256, tokens=4)


@pytest.fixture(scope="module")
def losses() -> convergence.Losses:
    return convergence.classification(steps=40, seeds=(0, 1))


def test_states_take_what_is_promised(memories: dict[int, memory.Memory]) -> None:
    assert memories[32].bytes_a_parameter == 8
    for bits, share in STATES_SHARE.items():
        assert 0.9 * share < memories[bits].states / memories[32].states <= share


def test_a_paged_run_is_the_unpaged_one(paged: paging.Paging) -> None:
    assert paged.equal and paged.states == 4 * paged.budget


def test_a_short_training_has_learned_and_8_bits_follow(losses: convergence.Losses) -> None:
    exact, eight, *_ = (losses[variant.title] for variant in convergence.VARIANTS)
    assert all(loss < 2.0 for loss in exact), "a guess among ten answers costs 2.3"
    assert exact != eight and convergence.departure(losses, convergence.VARIANTS[1].title) < convergence.MARGIN_8BIT


def test_the_language_model_learns() -> None:
    from demo.settings import SMOKE

    losses = convergence.language_model(SMOKE, steps=30, seeds=(0,))
    assert all(loss < 5.9 for (loss,) in losses.values()), "a guess among 512 tokens costs 6.2"


def test_the_page_has_every_figure(losses: convergence.Losses, memories: dict[int, memory.Memory], paged: paging.Paging) -> None:
    page = report.markdown({"task": losses}, list(memories.values()), [paged], threads=1)
    assert all(variant.title in page for variant in convergence.VARIANTS)
    assert f"{memories[8].states:,}" in page and f"{paged.budget:,}" in page


def test_what_is_missed_is_said(memories: dict[int, memory.Memory], paged: paging.Paging) -> None:
    exact, eight = (variant.title for variant in convergence.VARIANTS[:2])
    good = {"task": {exact: [1.0, 2.0], eight: [1.009, 1.99]}}
    assert missed(good, memories, [paged]) == []
    bad = {"task": {exact: [1.0, 2.0], eight: [1.0, 2.03]}}
    assert missed(bad, {**memories, 8: memories[32]}, [replace(paged, equal=False)]) == [
        "task: a final loss of 8-bit states is 1.50% off, over 1%",
        "states of 8 bits take 100.0% of those of 32, over 26%",
        "the paged run of 8 bits differs from the unpaged one",
    ]


def test_the_scratch_file_is_gone(tmp_path: Path) -> None:
    paging.measure(32, tmp_path, layers=2, width=128, tokens=2)
    assert list(tmp_path.iterdir()) == []


def test_a_stable_embedding_has_32_bit_states_wherever_it_is_trained() -> None:
    model = torch.nn.ModuleDict({"embedding": q_nn.StableEmbedding(100, 64), "head": torch.nn.Linear(64, 100)})
    for trained in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = q_optim.AdamW8bit(trained.parameters())
        trained["head"](trained["embedding"](torch.arange(100))).square().mean().backward()
        optimizer.step()
        kept = {name: optimizer.state[param]["state1"].dtype for name, param in trained.named_parameters()}
        assert kept["embedding.weight"] == torch.float32 and kept["head.weight"] == torch.uint8
