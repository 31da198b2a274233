"""Paged states: four times the budget and equal to the last bit, in files that leave nothing behind, in as much memory as was given."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from q_optim import AdamW, AdamW8bit, Muon, PagedAdamW, PagedAdamW8bit, paging, state_bytes
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.segment import Segment
from q_optim.storage import Storage, storage_of

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def big(matrices: bool, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Larger than a batch, so that they are split, and small ones that share one; not all of whole pages."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((150, 300), (3, 5), (7, 1000), (64, 64)) if matrices else ((150, 300), (15,), (70_001,), (8, 8, 8, 9))
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [nn.Parameter(param) for param in params]


@pytest.mark.parametrize("where", ["file", "host"])
def test_four_times_the_budget(
    variant: Any,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    train: Callable[..., None],
    assert_same: Callable[..., None],
) -> None:
    """Equal bit for bit to the run in memory: in a file, and as for an accelerator, from this memory to this memory."""
    if where == "host":
        monkeypatch.setattr(paging, "InFile", lambda budget, directory: paging.InHostMemory(torch.device("cpu"), budget))
    matrices = variant.algorithm is Muon
    plain, paged = big(matrices), big(matrices)
    one = variant(plain, min_8bit_size=100)
    train(one, plain, range(2))
    other = variant(paged, min_8bit_size=100, is_paged=True, paged_budget=state_bytes(one) // 4)
    train(other, paged, range(2))
    assert_same(plain, paged, (one, other))

    other.load_state_dict(one.state_dict())
    train(one, plain, range(2, 4))
    train(other, paged, range(2, 4))
    assert_same(plain, paged, (one, other))


@pytest.mark.parametrize("budget", [0, 1, 10_000, 1 << 40])
def test_any_budget(budget: int, train: Callable[..., None], assert_same: Callable[..., None]) -> None:
    plain, paged = big(False), big(False)
    one, other = AdamW8bit(plain), PagedAdamW8bit(paged, paged_budget=budget)
    train(one, plain, range(3))
    train(other, paged, range(3))
    assert_same(plain, paged, (one, other))


def in_files(optimizer: BlockwiseOptimizer, params: list[nn.Parameter]) -> int:
    """Bytes of states that are in mapped files, by the system's account."""
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        if path and "(deleted)" in path[0]:
            first, last = (int(end, 16) for end in span.split("-"))
            mapped.append((first, last))
    held = [value for param in params for value in optimizer.state[param].values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in held if any(first <= value.data_ptr() < last for first, last in mapped))


@linux
def test_states_beyond_half_the_budget_are_in_files(train: Callable[..., None]) -> None:
    params = big(False)
    optimizer = PagedAdamW(params, paged_budget=1 << 20)
    train(optimizer, params, range(1))
    total = state_bytes(optimizer)
    assert total - (1 << 19) <= in_files(optimizer, params) < total
    everything = PagedAdamW(params, paged_budget=2 * total)
    train(everything, params, range(1))
    assert in_files(everything, params) == 0


@linux
def test_a_copy_is_paged_too(train: Callable[..., None]) -> None:
    params = big(False)
    optimizer = PagedAdamW(params, paged_budget=1 << 20)
    train(optimizer, params, range(1))
    copied, other = copy.deepcopy((params, optimizer))
    assert in_files(other, copied) == in_files(optimizer, params) > 0
    train(other, copied, range(1, 2))
    assert optimizer.state[params[0]]["step"] == 1


def test_each_state_is_saved_alone(train: Callable[..., None]) -> None:
    """Not with all of the file that it's in: formats that refuse shared memory take it."""
    params = big(False)
    optimizer = PagedAdamW8bit(params, paged_budget=0)
    train(optimizer, params, range(1))
    states = {
        f"{i}.{key}": value for i, param in enumerate(params) for key, value in optimizer.state[param].items() if key != "step"
    }
    loaded = safetensors.torch.load(safetensors.torch.save(states))
    assert all(torch.equal(value, loaded[key]) for key, value in states.items())


@linux
def test_nothing_is_left_behind(tmp_path: Path, train: Callable[..., None]) -> None:
    """The file has no name from the start, and its space is given back with the optimizer, or when states are loaded."""
    params = big(False)
    optimizer = PagedAdamW(params, paged_budget=0, paged_directory=tmp_path)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        train(optimizer, params, range(1))
        assert in_files(optimizer, params) == state_bytes(optimizer)
        assert list(tmp_path.iterdir()) == []
        optimizer.load_state_dict(optimizer.state_dict())
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    del optimizer
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_many_parameters_are_one_file(train: Callable[..., None]) -> None:
    """Loaded ones too: a file each would be more than a process may have open."""
    params = [nn.Parameter(torch.randn(40)) for _ in range(1500)]
    optimizer = PagedAdamW(params, paged_budget=0)
    train(optimizer, params, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, range(1, 2))


def test_no_directory() -> None:
    with pytest.raises(ValueError, match="PagedAdamW8bit: paged_directory is '/no/such/place', expected a directory that exists"):
        PagedAdamW8bit(big(False), paged_directory="/no/such/place")
    with pytest.raises(ValueError, match="on cuda:0 are paged to host memory; leave it out"):
        paging.paged_placement(torch.device("cuda:0"), 0, "/tmp")


def in_a_process(program: str, *arguments: Any) -> str:
    """What a program prints, run with what this one imports from."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FULL = """
import resource, sys, torch
from q_optim import PagedAdamW
params = [torch.nn.Parameter(torch.ones(100_000)) for _ in range(2)]
optimizer = PagedAdamW(params, paged_budget=0, paged_directory=sys.argv[1])
for param in params:
    param.grad = torch.ones_like(param)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    optimizer.step()
except OSError as error:
    print(error)
assert all(bool((param == 1).all()) for param in params) and not optimizer.state_dict()["state"]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
optimizer.step()
assert all(bool((param < 1).all()) for param in params)
"""


@linux
def test_no_room(tmp_path: Path) -> None:
    """An error that says how much is needed and where, instead of a process that is killed when it writes; and a step after it works."""
    printed = in_a_process(FULL, tmp_path)
    assert f"paged states need 1,600,000 bytes in {tmp_path}" in printed
    assert "File too large" in printed


MEMORY = """
import re, sys, torch
torch.set_num_threads(1)
from q_optim import AdamW, state_bytes

def resident():
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{key}:\\s+(\\d+) kB", status)[1]) << 10 for key in ("RssAnon", "RssFile", "RssShmem"))

budget, directory = int(sys.argv[1]), sys.argv[2]
params = [torch.nn.Parameter(torch.empty(1 << 20, dtype=torch.bfloat16)) for _ in range(48)]
grad = torch.ones(1 << 20, dtype=torch.bfloat16)
for param in params:
    param.grad = grad
small = torch.nn.Parameter(torch.ones(64)); small.grad = torch.ones(64)
warm = AdamW([small]); warm.step()

def measured(**paging):
    for param in params:
        param.data.fill_(1.0)
    optimizer = AdamW(params, **paging)
    before = resident()
    sizes = []
    for _ in range(2):
        optimizer.step()
        sizes.append(resident() - before)
    print(state_bytes(optimizer), max(sizes), sum(param.double().sum().item() for param in params))

measured(is_paged=True, paged_budget=budget, paged_directory=directory)
measured()
"""


@linux
def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """400 MB of states and a budget of 64 MiB: after each step the budget at most is resident, and all of the states without paging."""
    budget = 64 << 20
    paged, unpaged = (line.split() for line in in_a_process(MEMORY, budget, tmp_path).splitlines())
    total = 48 * (8 << 20)
    assert int(unpaged[0]) == int(paged[0]) == total
    assert int(unpaged[1]) >= total - budget  # which may have been kept of the run before
    assert int(paged[1]) <= budget
    assert unpaged[2] == paged[2]


def test_resident_states_are_shared_out_first_come(train: Callable[..., None]) -> None:
    """For an accelerator: half the budget stays on the device, the rest goes to and fro, and what is saved is what is there."""
    placement = paging.InHostMemory(torch.device("cpu"), 1000)
    parts = [paging.Part(f"state{i}", torch.float32, torch.Size((100,)), 0.5) for i in range(3)]
    tensors = placement.make(parts)
    assert [tensor.data_ptr() in placement._on_host for tensor in tensors] == [False, True, True]
    assert all(bool((tensor == 0.5).all()) for tensor in tensors)


class Lane:
    """A stand-in for a stream or an event: what of each lane is sure to be done before what comes next on this one."""

    def __init__(self, name: str = "", done: dict[str, int] | None = None) -> None:
        self.name = name
        self.done = dict(done or {})

    def work(self) -> dict[str, int]:
        self.done[self.name] = self.done.get(self.name, 0) + 1
        return dict(self.done)

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None:
        self.work()

    def record_event(self) -> Lane:
        return Lane(done=self.done)

    def wait_event(self, event: Lane) -> None:
        self.done = {name: max(self.done.get(name, 0), event.done.get(name, 0)) for name in {*self.done, *event.done}}

    wait_stream = wait_event

    def synchronize(self) -> None: ...


def test_batches_come_in_while_others_are_updated_and_go_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an accelerator: a batch's update waits for its arrival alone, and its memory is taken again as soon as it is written back."""
    placement = paging.InHostMemory(torch.device("cpu"), 0)
    states = placement.make([paging.Part("state1", torch.float32, torch.Size((4096,)), 0.0)] * 6)
    inward, outward, compute = (Lane(name) for name in ("in", "out", "compute"))
    monkeypatch.setattr(placement, "_inward", inward)
    monkeypatch.setattr(placement, "_outward", outward)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: compute)
    segments = [
        Segment(torch.Size((4096,)), torch.zeros(4096), torch.zeros(4096), {"state1": state}, torch.zeros(())) for state in states
    ]
    done: list[dict[str, int]] = []

    class Recorded:
        whole = False

        def __call__(self, present: Sequence[Segment], storage: Storage) -> None:
            present[0].states["state1"].add_(1)
            done.append(compute.work())
            written_before_the_next_arrives.append(inward.done.get("out", 0))

    written_before_the_next_arrives: list[int] = []
    placement.run(Recorded(), segments, storage_of(32, 0))
    assert all(bool((state == 1).all()) for state in states)
    assert [update["in"] for update in done] == [1, 2, 3, 4, 5, 6]
    assert [update.get("out", 0) for update in done] == [0, 0, 0, 1, 2, 3]
    assert written_before_the_next_arrives == [0, 0, 1, 2, 3, 4]
    assert outward.done == {"in": 6, "compute": 6, "out": 6}


def test_without_parameters_that_have_gradients() -> None:
    params = big(False)
    optimizer = PagedAdamW8bit(params)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    assert AdamW(params, is_paged=True, optim_bits=4).defaults["optim_bits"] == 4
