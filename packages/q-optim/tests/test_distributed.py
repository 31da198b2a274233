"""Optimizers on two real processes: DDP, FSDP2, DTensors, torch.distributed.checkpoint; all equal to one process, bit for bit.

Gradients of the model here are sums of small multiples of a power of two: exact, in whatever order processes add them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import q_optim
from q_optim.optimizer import BlockwiseOptimizer
from two_ranks import on_two_ranks, two_ranks  # noqa: F401

SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW8bit": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW4bit": {"lr": 0.01, "weight_decay": 0.1},
    "Adam8bit": {"lr": 0.01},
    "AdEMAMix8bit": {"lr": 0.01, "t_alpha": 4, "t_beta3": 4},
    "Lion8bit": {"lr": 0.01, "weight_decay": 0.1},
    "LAMB8bit": {"lr": 0.01, "weight_decay": 0.1},
    "LARS8bit": {"lr": 0.1, "momentum": 0.9},
    "RMSprop8bit": {"lr": 0.01, "momentum": 0.5},
    "Adagrad8bit": {"lr": 0.01, "initial_accumulator_value": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "SGD8bit": {"lr": 0.1, "momentum": 0.9},
    "Muon": {"lr": 0.01},
    "Muon8bit": {"lr": 0.01},
    "PagedAdamW8bit": {"lr": 0.01, "paged_budget": 1 << 14},
}
optimizers = pytest.mark.parametrize("name", list(SETTINGS))
some_optimizers = pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "LAMB8bit", "SGD"])

BLOCKS_OF = {
    # Rows are whole blocks; an odd number of rows; one row, of which the second rank gets nothing; more dimensions than two.
    "whole": ((8, 512), None),
    "odd": ((7, 1024), None),
    "single": ((1, 4096), None),
    "deep": ((6, 16, 64), None),
    # Blocks are smaller where rows are shared out: the largest that end with a row; where there are none, states are float32.
    "narrow": ((10, 416), 32),
    "ragged": ((5, 1001), 0),
    "vector": ((4097,), 0),
    "small": ((5,), 0),
}
"""The shapes of the model's parameters, and the size of the blocks that rows have, if it isn't the precision's own."""


class Products(nn.Module):
    """Parameters whose gradients are the inputs."""

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (shape, _) in BLOCKS_OF.items():
            if dim is None or len(shape) == dim:
                self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return sum(((getattr(self, name) * x).sum() for name, x in inputs.items()), start=torch.zeros(()))


def model_for(name: str) -> Products:
    return Products(2 if "Muon" in name else None)


def batch(model: Products, step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {name: torch.randint(-8, 9, BLOCKS_OF[name][0], generator=generator) / 8 for name, _ in model.named_parameters()}


def make(name: str, model: Products, *, as_if_sharded: bool = False, **settings: Any) -> BlockwiseOptimizer:
    optimizer: BlockwiseOptimizer = getattr(q_optim, name)(model.parameters(), **SETTINGS[name] | settings)
    if as_if_sharded:
        for key, parameter in model.named_parameters():
            blocksize = BLOCKS_OF[key][1]
            if blocksize:
                optimizer.override(parameter, blocksize=blocksize)
            elif blocksize == 0:
                optimizer.override(parameter, optim_bits=32)
    return optimizer


def train(run: nn.Module, model: Products, optimizer: torch.optim.Optimizer, steps: range, *, whole: bool = False) -> None:
    """Steps on this rank's share of the batches, or, in one process, on all of them."""
    for step in steps:
        optimizer.zero_grad()
        if whole:
            (sum(run(batch(model, step, rank)) for rank in (0, 1)) / 2).backward()
        else:
            run(batch(model, step, dist.get_rank())).backward()
        optimizer.step()


def full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    # torch makes lists of tuples where it flattens state dicts.
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items() if key != "params"}


def assert_same(ours: BlockwiseOptimizer, theirs: BlockwiseOptimizer) -> None:
    """Parameters and states are equal, bit for bit; what differs is how scales are laid out."""
    for group, expected in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert settings_of(group) == settings_of(expected)
        for i, (param, other) in enumerate(zip(group["params"], expected["params"], strict=True)):
            assert torch.equal(full(param), full(other)), i
            state, held = ours.state[param], theirs.state[other]
            assert state.keys() == held.keys()
            for key, value in held.items():
                if key == "step":
                    assert state[key] == value
                else:
                    found, wanted = full(state[key]), full(value)
                    assert found.dtype == wanted.dtype
                    assert torch.equal(found.reshape(-1), wanted.reshape(-1)), (i, key)


def single_process(name: str, steps: int, *, as_if_sharded: bool = True) -> BlockwiseOptimizer:
    model = model_for(name)
    optimizer = make(name, model, as_if_sharded=as_if_sharded)
    train(model, model, optimizer, range(steps), whole=True)
    return optimizer


def sharded(name: str, mesh: DeviceMesh | None = None, **settings: Any) -> tuple[Products, BlockwiseOptimizer]:
    model = model_for(name)
    fully_shard(model, mesh=mesh or init_device_mesh("cpu", (2,)))
    return model, make(name, model, **settings)


# --- training -------------------------------------------------------------------------------------------------------------


@optimizers
@on_two_ranks
def test_ddp_equals_the_single_process(name: str) -> None:
    model = model_for(name)
    optimizer = make(name, model)
    train(DistributedDataParallel(model), model, optimizer, range(3))
    assert_same(optimizer, single_process(name, 3, as_if_sharded=False))


@optimizers
@on_two_ranks
def test_fsdp_equals_the_single_process(name: str) -> None:
    model, optimizer = sharded(name)
    train(model, model, optimizer, range(3))
    assert_same(optimizer, single_process(name, 3))
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if key != "step":
                assert value.placements == param.placements
                assert value.to_local().shape[0] == param.to_local().shape[0]  # no process holds more than its share


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", ["AdamW8bit", "Muon8bit"])
@on_two_ranks
def test_hybrid_sharding_equals_the_single_process(name: str, sizes: tuple[int, int]) -> None:
    model, optimizer = sharded(name, init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")))
    train(model, model, optimizer, range(3))
    assert_same(optimizer, single_process(name, 3))


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit"])
@on_two_ranks
def test_replicas_round_the_same_noise(name: str) -> None:
    """Stochastic rounding: every replica of a DDP model, and of what is gathered for its step, stays the same as the others."""
    model = model_for(name).bfloat16()
    optimizer = make(name, model, stochastic_rounding=True)
    train(DistributedDataParallel(model), model, optimizer, range(3))
    alone = model_for(name).bfloat16()
    train(alone, alone, expected := make(name, alone, stochastic_rounding=True), range(3), whole=True)
    assert_same(optimizer, expected)


@on_two_ranks
def test_whole_parameters_are_shared_out_by_zero() -> None:
    """ZeroRedundancyOptimizer makes an optimizer of ours for this rank's parameters, and gathers what they all hold."""
    model = model_for("AdamW8bit")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), q_optim.AdamW8bit, **SETTINGS["AdamW8bit"])
    train(DistributedDataParallel(model), model, optimizer, range(3))
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        gathered = q_optim.AdamW8bit(model.parameters())
        gathered.load_state_dict(optimizer.state_dict())
        assert_same(gathered, single_process("AdamW8bit", 3, as_if_sharded=False))


@pytest.mark.parametrize("name", ["AdamW8bit", "Muon8bit", "LARS8bit"])
@on_two_ranks
def test_a_network_trains_as_on_one_process(name: str) -> None:
    """Here gradients are rounded, and added in another order."""
    x, target = torch.randn(8, 256), torch.randn(8, 64)
    half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    losses: dict[bool, list[Tensor]] = {True: [], False: []}
    for shared in losses:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.GELU(), nn.Linear(512, 64, bias=False))
        if shared:
            for module in (model[0], model[2], model):
                fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        optimizer = getattr(q_optim, name)(model.parameters(), **SETTINGS[name])
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x[half] if shared else x) - (target[half] if shared else target)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses[shared].append(loss.detach())
    mean = torch.stack(losses[True])
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, torch.stack(losses[False]), rtol=1e-3, atol=0)
    assert mean[-1] < mean[0]


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit", "Muon"])
@on_two_ranks
def test_a_gradient_that_is_not_finite_on_one_rank_alone(name: str) -> None:
    model, optimizer = sharded(name)
    train(model, model, optimizer, range(1))
    before = {key: full(parameter).clone() for key, parameter in model.named_parameters()}
    model(batch(model, 1, dist.get_rank())).backward()
    grad = model.whole.grad
    assert isinstance(grad, DTensor)
    if dist.get_rank() == 1:
        grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    after = {key: full(parameter) for key, parameter in model.named_parameters()}
    same = after["whole"] == before["whole"]
    assert same[4, :256].all()  # the first block of the second rank's first row
    assert same.all() == (name != "AdamW8bit")
    assert not torch.equal(after["odd"], before["odd"])
    assert bool(optimizer.skipped()) == (dist.get_rank() == 1 or name != "AdamW8bit")


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit"])
@on_two_ranks
def test_a_gradient_that_is_still_to_be_added_up(name: str) -> None:
    """What tensor parallelism leaves of a replicated parameter's gradient: each rank's share of the sum."""
    mesh = init_device_mesh("cpu", (2,))
    value, shares = torch.randn(8, 512), [torch.randint(-8, 9, (8, 512)) / 8 for _ in (0, 1)]
    parameter = nn.Parameter(distribute_tensor(value, mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(shares[dist.get_rank()], mesh, [Partial()])
    alone = nn.Parameter(value.clone())
    alone.grad = shares[0] + shares[1]
    found = []
    for param in (parameter, alone):
        optimizer = getattr(q_optim, name)([param], **SETTINGS[name])
        optimizer.step()
        found.append(optimizer)
    assert_same(*found)


@on_two_ranks
def test_what_is_not_sharded_by_rows_is_refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    columns = nn.Parameter(distribute_tensor(torch.randn(8, 512), mesh, [Shard(1)]))
    with pytest.raises(
        TypeError, match=r"AdamW8bit: head of shape \[8, 512\] is placed .*Shard\(dim=1\).*expected Replicate or Shard"
    ):
        q_optim.AdamW8bit([("head", columns)])


@on_two_ranks
def test_state_bytes_are_those_of_this_process() -> None:
    _, optimizer = sharded("AdamW")
    model, optimizer = sharded("AdamW")
    train(model, model, optimizer, range(1))
    assert q_optim.state_bytes(optimizer) == 8 * sum(param.to_local().numel() for param in model.parameters())


# --- checkpoints ----------------------------------------------------------------------------------------------------------


@some_optimizers
@on_two_ranks
def test_state_dict_of_a_sharded_model(name: str) -> None:
    model, optimizer = sharded(name)
    train(model, model, optimizer, range(2))
    other, resumed = sharded(name, lr=1.0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert_same(resumed, optimizer)
    train(other, other, resumed, range(2, 4))
    assert_same(resumed, single_process(name, 4))


@some_optimizers
@on_two_ranks
def test_a_whole_state_dict_is_shared_out(name: str) -> None:
    """Of a model that is on one process; and back, every process gets the whole."""
    alone = single_process(name, 2)
    model, optimizer = sharded(name)
    saved = alone.state_dict()
    for state, (_, (_, blocksize)) in zip(saved["state"].values(), named_blocks(name), strict=True):
        assert blocksize != 32 or "absmax1" not in state or state["absmax1"].dim() == 2
    optimizer.load_state_dict(saved)
    for param, whole in zip(model.parameters(), alone.param_groups[0]["params"], strict=True):
        param.data.copy_(distribute_tensor(whole.detach(), param.device_mesh, param.placements))
    assert_same(optimizer, alone)
    back = make(name, model_for(name), as_if_sharded=True)
    back.load_state_dict(optimizer.state_dict())
    for param, whole in zip(back.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True):
        param.data.copy_(whole)
    assert_same(back, alone)
    train(model, model, optimizer, range(2, 3))
    assert_same(optimizer, single_process(name, 3))


def named_blocks(name: str) -> Iterator[tuple[str, tuple[tuple[int, ...], int | None]]]:
    for key, _ in model_for(name).named_parameters():
        yield key, BLOCKS_OF[key]


@pytest.mark.parametrize(
    "options",
    [
        StateDictOptions(),
        StateDictOptions(flatten_optimizer_state_dict=True),
        StateDictOptions(full_state_dict=True),
        StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
    ],
    ids=["sharded", "flat", "full", "from rank 0"],
)
@pytest.mark.parametrize("name", ["AdamW8bit", "SGD"])
@on_two_ranks
def test_get_and_set_optimizer_state_dict(name: str, options: StateDictOptions) -> None:
    model, optimizer = sharded(name)
    train(model, model, optimizer, range(2))
    other, resumed = sharded(name)
    other.load_state_dict(model.state_dict())
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if options.full_state_dict and not options.broadcast_from_rank0:
        assert not any(isinstance(value, DTensor) for held in state["state"].values() for value in held.values())
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert_same(resumed, optimizer)
    train(other, other, resumed, range(2, 3))
    assert_same(resumed, single_process(name, 3))


@pytest.mark.parametrize(("name", "flat"), [("AdamW8bit", False), ("AdamW8bit", True), ("AdamW4bit", False), ("Muon8bit", True)])
@on_two_ranks
def test_checkpoint_of_two_loads_into_two_and_into_one(name: str, flat: bool, tmp_path: Path) -> None:
    folder, options = str(tmp_path / "checkpoint"), StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = sharded(name)
    train(model, model, optimizer, range(2))
    weights, states = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)

    other, resumed = sharded(name)
    load(other, resumed, folder, options)
    train(other, other, resumed, range(2, 4))
    assert_same(resumed, single_process(name, 4))

    alone = model_for(name)
    single = make(name, alone, as_if_sharded=True)
    load(alone, single, folder, options, no_dist=True)
    train(alone, alone, single, range(2, 4), whole=True)
    assert_same(single, resumed)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
@on_two_ranks
def test_checkpoint_of_one_loads_into_two(name: str, tmp_path: Path) -> None:
    folder, options = str(tmp_path / "checkpoint"), StateDictOptions()
    if dist.get_rank() == 0:
        alone = model_for(name)
        single = make(name, alone, as_if_sharded=True)
        train(alone, alone, single, range(2), whole=True)
        weights, states = get_state_dict(alone, single, options=options)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder, no_dist=True)
    dist.barrier()
    model, optimizer = sharded(name)
    load(model, optimizer, folder, options)
    train(model, model, optimizer, range(2, 4))
    assert_same(optimizer, single_process(name, 4))


def load(model: Products, optimizer: BlockwiseOptimizer, folder: str, options: StateDictOptions, **how: Any) -> None:
    weights, states = get_state_dict(model, optimizer, options=options)
    state = {"model": weights, "optimizer": states}
    dcp.load(state, checkpoint_id=folder, **how)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)


@on_two_ranks
def test_states_of_another_model_are_refused_and_nothing_is_changed() -> None:
    model, optimizer = sharded("AdamW8bit")
    train(model, model, optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "absmax1": saved["state"][1]["absmax1"]}
    _, other = sharded("AdamW8bit")
    with pytest.raises(
        ValueError, match=r"parameter 0 of shape \[8, 512\]: absmax1 is torch.float32 \[7, 4\], expected .* \[8, 2\]"
    ):
        other.load_state_dict(saved)
    assert not other.state
