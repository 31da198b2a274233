"""Which tile a call gets: the first source that knows the kernel decides, and in it the first tile whose size isn't exceeded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from q_triton import tiles
from q_triton.targets import compiling_for, target_named
from q_triton.tiles import Tile, Tiles, tile

DEVICE = torch.device("meta")
SMALL, LARGE = tile(BLOCK=16, up_to=100), tile(BLOCK=64)
WIDE, TUNED = tile(BLOCK=128, warps=8), tile(BLOCK=256, warps=8, stages=3)


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("_tables", "_tuned", "KERNELS"):
        monkeypatch.setattr(tiles, name, {})
    tiles._source.cache_clear()
    yield
    tiles._source.cache_clear()


@pytest.fixture
def its() -> Tiles:
    return Tiles("kernel", (SMALL, LARGE), size="tokens")


def on(its: Tiles, target: str, size: int = 0) -> Tile:
    with compiling_for(target_named(target)):
        return its.on(DEVICE, size)


@pytest.mark.parametrize(("size", "expected"), [(0, SMALL), (100, SMALL), (101, LARGE), (10**9, LARGE)])
def test_the_first_tile_that_is_for_the_size(its: Tiles, size: int, expected: Tile) -> None:
    assert on(its, "gfx942", size) == expected


def test_a_table_comes_before_the_portable_tiles_and_a_measurement_before_the_table(its: Tiles) -> None:
    assert on(its, "gfx942") == SMALL
    tiles.register({"gfx942": {"kernel": (WIDE,)}})
    assert on(its, "gfx942") == WIDE
    tiles.use_tuned("gfx942", {"kernel": (TUNED,)})
    assert on(its, "gfx942") == TUNED
    assert on(its, "gfx90a") == SMALL


def test_what_a_source_lacks_the_next_one_decides(its: Tiles) -> None:
    other = Tiles("other", (LARGE,))
    tiles.use_tuned("gfx942", {"kernel": (TUNED,)})
    tiles.register({"gfx942": {"other": (WIDE,)}})
    assert (on(its, "gfx942"), on(other, "gfx942")) == (TUNED, WIDE)
    tiles.use_tuned("gfx942", {"other": (TUNED,)})
    assert (on(its, "gfx942"), on(other, "gfx942")) == (TUNED, TUNED)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("sm_75", SMALL), ("sm_80", LARGE), ("sm_89", LARGE), ("sm_90", WIDE), ("sm_100", WIDE), ("gfx90a", SMALL), ("xe", SMALL)],
)
def test_a_target_without_a_table_has_that_of_the_newest_older_one_of_nvidia(its: Tiles, target: str, expected: Tile) -> None:
    tiles.register({"sm_80": {"kernel": (LARGE,)}, "sm_90": {"kernel": (WIDE,)}, "gfx942": {"kernel": (TUNED,)}})
    assert on(its, target) == expected


def test_tiles_of_one_kernel_are_declared_once(its: Tiles) -> None:
    with pytest.raises(ValueError, match="'kernel' are declared twice"):
        Tiles("kernel", (LARGE,))


def test_every_known_tile_once(its: Tiles) -> None:
    tiles.register({"sm_80": {"kernel": (LARGE, WIDE)}, "gfx942": {"kernel": (WIDE,), "other": (TUNED,)}})
    assert its.known() == [SMALL, LARGE, WIDE]


@pytest.mark.parametrize("one", [SMALL, TUNED])
def test_json_and_back(one: Tile) -> None:
    assert tiles.from_json(tiles.as_json(one)) == one
    assert hash(tiles.from_json(tiles.as_json(one))) == hash(one)


@pytest.mark.parametrize(
    "data", [{}, {"blocks": 3}, {"blocks": {"BLOCK": None}, "warps": 4, "stages": 1, "up_to": None}, {"blocks": {}}]
)
def test_what_is_no_tile_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is no tile"):
        tiles.from_json(data)
