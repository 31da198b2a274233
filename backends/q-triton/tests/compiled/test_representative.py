"""The representative calls are calls, and they reach everything that is to be compiled, tuned and measured."""

from __future__ import annotations

import pytest
import torch

from q_core.specs import record_of
from q_triton import tiles
from q_triton.aot.gate import SHARED_BYTES
from q_triton.aot.variants import register_tables
from q_triton.implementations import call, declined, implementations
from q_triton.launch import recorded
from q_triton.representative import Values, examples
from q_triton.targets import compiling_for, target_named
from q_triton.tiles import Tile, Tiles

register_tables()
TARGETS = (*SHARED_BYTES, "xe")


@pytest.mark.parametrize("op", implementations())
def test_every_op_has_calls_that_its_contract_allows(op: str) -> None:
    record = record_of(op)
    made = list(examples(Values("meta"), [op]))
    assert made
    for example in made:
        assert set(example.arguments) == set(record.arguments)
        record.check(**example.arguments)
    assert len({example.title for example in made}) == len(made), "two calls have one title"


def test_an_op_without_calls_is_refused() -> None:
    with pytest.raises(ValueError, match="no representative call of prepack_weight"):
        list(examples(Values("meta"), ["prepack_weight"]))


def test_values_are_the_same_every_time() -> None:
    first, second = (next(iter(examples(Values("cpu"), ["route_topk"]))).arguments["logits_TE"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", TARGETS)
def test_every_tile_is_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile that a table has for a target, or where it has none the portable ones.

    Mend: add a call of that size or setting to q_triton/representative, or take away a tile that no call can have.
    """
    reached: set[tuple[str, Tile]] = set()
    choose = Tiles.on

    def on(self: Tiles, device: torch.device, size: int = 0) -> Tile:
        chosen = choose(self, device, size)
        reached.add((self.kernel, chosen))
        return chosen

    monkeypatch.setattr(Tiles, "on", on)
    target, hosts = target_named(name), implementations()
    with compiling_for(target), recorded(lambda launch: None):
        for example in examples(Values("meta"), hosts):
            if not declined(hosts[example.op], example.arguments):
                call(hosts[example.op], example.arguments)
    table = tiles.table_of(target)
    assert not set(table) - set(tiles.KERNELS), "the table has tiles of kernels that there aren't"
    there = {(kernel, tile) for kernel, its in tiles.KERNELS.items() for tile in table.get(kernel, its.portable)}
    assert reached == there, f"no representative call has {there - reached}"
