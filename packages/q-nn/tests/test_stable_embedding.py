"""StableEmbedding: bitsandbytes' values and state dict, and what optimizers learn from it."""

from __future__ import annotations

import copy
import pickle

import bitsandbytes
import pytest
import torch

import q_nn
from q_core.optimizers import preferences


def test_values_gradients_and_state_dict_are_those_of_bitsandbytes() -> None:
    torch.manual_seed(0)
    theirs = bitsandbytes.nn.StableEmbedding(40, 24, padding_idx=3)
    torch.manual_seed(0)
    ours = q_nn.StableEmbedding(40, 24, padding_idx=3)
    assert torch.equal(ours.weight, theirs.weight) and not ours.weight[3].any()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(40, (5, 7))
    for module in (ours, theirs):
        module(ids).square().sum().backward()
    assert torch.equal(ours(ids), theirs(ids))
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_it_computes_in_the_norm_s_precision() -> None:
    embedding = q_nn.StableEmbedding(10, 8).bfloat16()
    embedding.norm.float()
    ids = torch.arange(10)
    exact = torch.nn.functional.layer_norm(embedding.weight.double(), (8,))
    assert embedding(ids).dtype == torch.bfloat16
    torch.testing.assert_close(embedding(ids).double(), exact, atol=0, rtol=2**-8)


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda module: module.bfloat16()]
)
def test_its_weight_and_nothing_else_wants_32_bits(make) -> None:
    embedding = make(q_nn.StableEmbedding(10, 8))
    wanted = preferences()
    assert wanted[embedding.weight] == {"optim_bits": 32}
    assert embedding.norm.weight not in wanted


def test_a_replaced_weight_is_meant_too() -> None:
    embedding = q_nn.StableEmbedding(10, 8)
    embedding.weight = torch.nn.Parameter(torch.zeros(10, 8))
    assert preferences()[embedding.weight] == {"optim_bits": 32}


def test_a_module_that_is_gone_wants_nothing() -> None:
    weight = q_nn.StableEmbedding(10, 8).weight
    assert weight not in preferences()


def test_sparse_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="sparse is True, expected False"):
        q_nn.StableEmbedding(10, 8, sparse=True)
