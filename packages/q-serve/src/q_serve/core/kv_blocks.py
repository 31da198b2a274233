"""The pool of KV-cache blocks, and the prefix cache over it.

A block is in one of three places, and :meth:`BlockPool.check_integrity` counts them:

- *held*: some request's block table names it; ``ref_count`` says how many;
- *cached*: nobody holds it, but its contents are known to be those of a prefix, and the next request with that prefix takes it back;
- *free*: nobody holds it, and nobody would want what is in it.

Blocks are handed out from the free list, then from the cached ones, least recently used first.

A full block's key is a link of a SHA-256 chain, over the key before it and its length-prefixed token ids; the chain starts from the
model's name. A hit compares the link before and the tokens too, so that not even a collision hands one request's cache to another.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What the prefix cache knows of a block: its key, the key before it in the chain, and its tokens."""

    key: bytes
    parent: bytes
    tokens: tuple[int, ...]


class BlockPool:
    """Hands out cache blocks, counts who holds them, and finds those whose contents can be used again.

    Args:
        num_blocks: blocks in the pool, ids 0…num_blocks - 1.
        block_size: tokens a block.
        model: name of the model (and whatever else keys and values depend on); prefixes of different names never match.
    """

    def __init__(self, num_blocks: int, block_size: int, *, model: str) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"BlockPool: num_blocks is {num_blocks} and block_size {block_size}, expected 1 or more of each")
        self.num_blocks = num_blocks
        self.block_size = block_size
        name = model.encode()
        self._root = hashlib.sha256(struct.pack("<Q", len(name)) + name).digest()
        self._ref_counts = [0] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._contents: dict[int, CachedPrefix] = {}
        self._by_key: dict[bytes, int] = {}

    # --- handing out ---------------------------------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take blocks that nobody holds; the caller has asked :attr:`num_available` first."""
        assert count <= self.num_available, f"{count} blocks were asked for, {self.num_available} are available"
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._ref_counts[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int], *, discard: bool = False) -> None:
        """Give up one hold on each of the blocks.

        The last blocks of a sequence become the least recently used, since a prefix is worth more without its tail than the other
        way round.

        Args:
            blocks: a request's blocks in the order of its sequence.
            discard: what is in them can't be trusted, so the prefix cache forgets them.
        """
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} is released, but nobody holds it"
            self._ref_counts[block] -= 1
            if discard:
                self._forget(block)
            if self._ref_counts[block] > 0:
                continue
            if block in self._contents:
                self._cached[block] = None
            else:
                self._free.append(block)

    # --- prefixes ------------------------------------------------------------------------------------------------------

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int], num_blocks: int) -> None:
        """Append the keys of the full blocks of ``tokens`` to those that ``keys`` has already, up to ``num_blocks`` of them."""
        for index in range(len(keys), num_blocks):
            content = tokens[index * self.block_size : (index + 1) * self.block_size]
            assert len(content) == self.block_size, "only full blocks have a key"
            packed = struct.pack(f"<Q{len(content)}q", len(content), *content)
            keys.append(hashlib.sha256(self._parent(keys, index) + packed).digest())

    def match(self, keys: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """Find the cached blocks of the longest prefix of ``tokens``; they aren't held before :meth:`hold`."""
        found: list[int] = []
        for index, key in enumerate(keys):
            block = self._by_key.get(key)
            if block is None:
                break
            content = tuple(tokens[index * self.block_size : (index + 1) * self.block_size])
            if self._contents[block] != CachedPrefix(key, self._parent(keys, index), content):
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks nobody holds, so that holding them makes fewer available."""
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Hold blocks that :meth:`match` found."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1

    def publish(self, block: int, keys: Sequence[bytes], index: int, tokens: Sequence[int]) -> None:
        """Let others find a held, full block, the ``index``-th of a sequence.

        If another block has that key already, this one stays unknown, and is free when it is released.
        """
        assert self._ref_counts[block] > 0, f"block {block} is published, but nobody holds it"
        key = keys[index]
        if block in self._contents or key in self._by_key:
            return
        content = tuple(tokens[index * self.block_size : (index + 1) * self.block_size])
        self._contents[block] = CachedPrefix(key, self._parent(keys, index), content)
        self._by_key[key] = block

    # --- invariants ----------------------------------------------------------------------------------------------------

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless free + cached + held = all, each block in one place, and each hold is a holder's.

        Args:
            holders: the block table of every request that has one.
        """
        counts = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counts[block] += 1
        assert counts == self._ref_counts, "holds and block tables differ"
        free, cached = set(self._free), set(self._cached)
        held = {block for block, count in enumerate(counts) if count}
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "free + cached + held is not all"
        assert free | cached | held == set(range(self.num_blocks)), "a block is lost"
        assert cached <= self._contents.keys() <= cached | held, "the prefix cache knows a free block, or doesn't know a cached one"
        assert {content.key: block for block, content in self._contents.items()} == self._by_key, "keys and contents differ"

    def _parent(self, keys: Sequence[bytes], index: int) -> bytes:
        return keys[index - 1] if index else self._root

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block, None)
        if content is not None:
            del self._by_key[content.key]
