"""The block pool and its prefix cache."""

from __future__ import annotations

import pytest

from q_serve.core.kv_blocks import BlockPool

S = 4


def publish_all(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Compute a sequence of full blocks as a request would, and leave it in the cache."""
    count = len(tokens) // S
    keys: list[bytes] = []
    pool.extend_keys(keys, tokens, count)
    blocks = pool.allocate(count)
    for index, block in enumerate(blocks):
        pool.publish(block, keys, index, tokens)
    return blocks


def match(pool: BlockPool, tokens: list[int]) -> list[int]:
    keys: list[bytes] = []
    pool.extend_keys(keys, tokens, len(tokens) // S)
    return pool.match(keys, tokens)


def test_a_prefix_is_found_up_to_the_first_difference() -> None:
    pool = BlockPool(8, S, model="m")
    tokens = list(range(12))
    blocks = publish_all(pool, tokens)
    assert match(pool, tokens) == blocks
    assert match(pool, tokens[:8] + [99] * 4) == blocks[:2]
    assert match(pool, [99, *tokens[1:]]) == []
    # The same tokens behind another prefix are another block.
    assert match(pool, [99] * 4 + tokens[4:]) == []


def test_least_recently_used_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, S, model="m")
    first, second = list(range(8)), list(range(100, 108))
    a, b = publish_all(pool, first), publish_all(pool, second)
    pool.release(a)
    pool.release(b)
    pool.hold(match(pool, first))
    pool.release(a)  # used again: now the most recent
    assert pool.allocate(1) == [b[1]]
    assert match(pool, second) == b[:1]
    assert match(pool, first) == a
    pool.release([b[1]])
    pool.check_integrity([])


def test_a_collision_of_keys_is_not_a_hit() -> None:
    pool = BlockPool(4, S, model="m")
    tokens, other = [1, 2, 3, 4], [5, 6, 7, 8]
    publish_all(pool, tokens)
    keys: list[bytes] = []
    pool.extend_keys(keys, tokens, 1)
    assert pool.match(keys, tokens) == [0]
    assert pool.match(keys, other) == []


def test_models_do_not_share_keys() -> None:
    keys_of = []
    for model in ("m", "n"):
        keys: list[bytes] = []
        BlockPool(1, S, model=model).extend_keys(keys, [1, 2, 3, 4], 1)
        keys_of.append(keys)
    assert keys_of[0] != keys_of[1]


def test_discarded_blocks_are_forgotten_even_if_shared() -> None:
    pool = BlockPool(4, S, model="m")
    tokens = list(range(8))
    blocks = publish_all(pool, tokens)
    pool.hold(blocks[:1])
    pool.release(blocks, discard=True)
    assert match(pool, tokens) == []
    pool.check_integrity([blocks[:1]])
    pool.release(blocks[:1])
    pool.check_integrity([])


def test_a_second_block_of_the_same_contents_stays_unknown() -> None:
    pool = BlockPool(4, S, model="m")
    tokens = [1, 2, 3, 4]
    first, second = publish_all(pool, tokens), publish_all(pool, tokens)
    assert match(pool, tokens) == first
    pool.release(second)
    pool.release(first)
    pool.check_integrity([])


def test_bugs_are_caught() -> None:
    pool = BlockPool(2, S, model="m")
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="block tables differ"):
        pool.check_integrity([])
    pool.release(blocks)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="3 blocks were asked for"):
        pool.allocate(3)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockPool(0, S, model="m")
