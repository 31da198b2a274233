"""The scheduler against a model of the cache: a hypothesis state machine, and the livelock promise."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from q_serve.core.kv_blocks import BlockPool
from q_serve.core.request import FinishReason, Request
from q_serve.core.sampling import SamplingParams
from q_serve.core.scheduler import ScheduledRequest, Scheduler, SchedulerConfig


class ShadowCache:
    """Stands for the KV cache: a slot holds the whole history of its token, as real keys and values depend on it."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, tuple[int, ...]] = {}

    def compute(self, scheduled: ScheduledRequest) -> None:
        """Write the step's slots, then check all that attention would read."""
        request = scheduled.request
        for position in range(scheduled.end):
            slot = request.blocks[position // self.block_size] * self.block_size + position % self.block_size
            history = tuple(request.tokens[: position + 1])
            if position >= scheduled.start:
                self.slots[slot] = history
            else:
                assert self.slots.get(slot) == history, f"request {request.id} reads another's cache at position {position}"


def make(*, blocks: int, block_size: int = 4, batch_tokens: int = 16, requests: int = 8, model_len: int = 1000) -> Scheduler:
    return Scheduler(SchedulerConfig(batch_tokens, requests, model_len), BlockPool(blocks, block_size, model="m"))


def run_all(scheduler: Scheduler, cache: ShadowCache | None = None, token: int = 7, max_steps: int = 100_000) -> None:
    """Step until every request is finished."""
    cache = cache or ShadowCache(scheduler.pool.block_size)
    for _ in range(max_steps):
        batch = scheduler.schedule()
        if not batch:
            return
        for scheduled in batch:
            cache.compute(scheduled)
        for scheduled in batch:
            scheduler.advance(scheduled, token if scheduled.samples else None)
    raise AssertionError(f"not finished after {max_steps} steps")


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps, aborts and failures in any order; invariants after each; in the end everything finishes."""

    @initialize(
        blocks=st.integers(4, 12),
        block_size=st.sampled_from([1, 2, 4]),
        batch_tokens=st.integers(1, 12),
        requests=st.integers(1, 4),
    )
    def start(self, blocks: int, block_size: int, batch_tokens: int, requests: int) -> None:
        self.scheduler = make(blocks=blocks, block_size=block_size, batch_tokens=batch_tokens, requests=requests)
        self.cache = ShadowCache(block_size)
        self.unfinished: dict[str, Request] = {}
        self.failed_blocks: set[int] = set()
        self.count = 0

    # Two token ids and short prompts, so that prefixes are shared all the time.
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), max_tokens=st.integers(1, 12))
    def add(self, tokens: list[int], max_tokens: int) -> None:
        request = Request(f"r{self.count}", tokens, SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({2})))
        self.count += 1
        pool = self.scheduler.pool
        if pool.blocks_for(len(tokens) + max_tokens - 1) > pool.num_blocks:
            with pytest.raises(ValueError, match="cache blocks"):
                self.scheduler.add(request)
        else:
            self.scheduler.add(request)
            self.unfinished[request.id] = request

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        oldest = next(iter(self.unfinished.values()))
        batch = self.scheduler.schedule()
        assert batch[0].request is oldest, "the oldest request doesn't run"
        assert sum(scheduled.end - scheduled.start for scheduled in batch) <= self.scheduler.config.max_batch_tokens
        assert all(scheduled.start < scheduled.end for scheduled in batch)
        for scheduled in batch:
            self.cache.compute(scheduled)
        for scheduled in batch:
            outcome = data.draw(st.sampled_from([0, 0, 1, 1, 1, 2, "error"]))
            if outcome == "error":
                self.scheduler.finish(scheduled.request, FinishReason.ERROR, "NaN")
            else:
                self.scheduler.advance(scheduled, outcome if scheduled.samples else None)
        self.unfinished = {id: request for id, request in self.unfinished.items() if not request.finished}

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = self.unfinished.pop(data.draw(st.sampled_from(sorted(self.unfinished))))
        self.scheduler.finish(request, FinishReason.ABORT)
        assert self.scheduler.get(request.id) is None and not request.blocks

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.scheduler.num_requests == len(self.unfinished)

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            for _ in range(10_000):
                batch = self.scheduler.schedule()
                if not batch:
                    break
                for scheduled in batch:
                    self.cache.compute(scheduled)
                for scheduled in batch:
                    self.scheduler.advance(scheduled, 0 if scheduled.samples else None)
            assert self.scheduler.num_requests == 0
            self.scheduler.pool.check_integrity([])
            assert self.scheduler.pool.num_available == self.scheduler.pool.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_500_requests_on_little_more_than_the_longest_all_finish() -> None:
    rng = random.Random(0)
    requests = [
        Request(f"r{i}", [rng.randrange(50) for _ in range(rng.randrange(1, 120))], SamplingParams(max_tokens=rng.randrange(1, 80)))
        for i in range(500)
    ]
    longest = max(request.max_len for request in requests)
    scheduler = make(blocks=int(1.1 * longest / 16) + 1, block_size=16, batch_tokens=64, requests=32)
    for request in requests:
        scheduler.add(request)
    run_all(scheduler)
    assert all(request.finish_reason is FinishReason.LENGTH for request in requests)
    assert all(request.num_output_tokens == request.params.max_tokens for request in requests)
    assert scheduler.num_preemptions > 0, "the test has lost its point: nothing was preempted"
    scheduler.check_integrity()


def test_10000_aborts_leak_nothing() -> None:
    rng = random.Random(1)
    scheduler = make(blocks=32, batch_tokens=24, requests=6)
    cache = ShadowCache(scheduler.pool.block_size)
    aborted = 0
    while aborted < 10_000:
        while scheduler.num_requests < 12:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 60))]
            scheduler.add(Request(str(rng.random()), tokens, SamplingParams(max_tokens=rng.randrange(1, 40))))
        batch = scheduler.schedule()
        for scheduled in batch:
            cache.compute(scheduled)
        for scheduled in batch:
            scheduler.advance(scheduled, rng.randrange(2) if scheduled.samples else None)
        for request in rng.sample(list(scheduler.requests), k=min(4, scheduler.num_requests)):
            scheduler.finish(request, FinishReason.ABORT)
            aborted += 1
    run_all(scheduler, cache)
    scheduler.pool.check_integrity([])


def test_running_first_then_waiting_within_the_budget() -> None:
    scheduler = make(blocks=100, batch_tokens=10)
    scheduler.add(Request("long", [1] * 25, SamplingParams(max_tokens=4)))
    scheduler.add(Request("short", [2] * 3, SamplingParams(max_tokens=4)))
    parts = []
    for _ in range(4):
        batch = scheduler.schedule()
        parts.append([(scheduled.request.id, scheduled.start, scheduled.end) for scheduled in batch])
        for scheduled in batch:
            scheduler.advance(scheduled, 7 if scheduled.samples else None)
    assert parts == [
        [("long", 0, 10)],
        [("long", 10, 20)],
        [("long", 20, 25), ("short", 0, 3)],
        [("long", 25, 26), ("short", 3, 4)],
    ]


def test_a_prefix_is_computed_once() -> None:
    scheduler = make(blocks=100, batch_tokens=100)
    prompt = list(range(10))
    scheduler.add(Request("first", list(prompt), SamplingParams(max_tokens=1)))
    run_all(scheduler)
    second = Request("second", [*prompt[:8], 99], SamplingParams(max_tokens=1))
    scheduler.add(second)
    assert [(s.start, s.end) for s in scheduler.schedule()] == [(8, 9)]
    assert second.num_cached_prompt_tokens == 8


def test_blocks_are_published_only_once_a_token_was_sampled_behind_them() -> None:
    scheduler = make(blocks=100, batch_tokens=8)
    prompt = list(range(20))
    scheduler.add(Request("first", list(prompt), SamplingParams(max_tokens=2)))
    for starts_at in (0, 0, 20):
        (scheduled,) = scheduler.schedule()
        scheduler.advance(scheduled, 7 if scheduled.samples else None)
        keys: list[bytes] = []
        scheduler.pool.extend_keys(keys, prompt, 5)
        assert len(scheduler.pool.match(keys, prompt)) * 4 == starts_at


def test_what_a_failed_request_had_published_is_forgotten() -> None:
    scheduler = make(blocks=100, batch_tokens=100)
    request = Request("bad", list(range(20)), SamplingParams(max_tokens=5))
    scheduler.add(request)
    (scheduled,) = scheduler.schedule()
    scheduler.advance(scheduled, 7)
    scheduler.schedule()
    scheduler.finish(request, FinishReason.ERROR, "NaN")
    scheduler.add(Request("again", list(range(20)), SamplingParams(max_tokens=1)))
    assert scheduler.schedule()[0].start == 0


def test_nothing_of_a_failed_request_is_cached() -> None:
    scheduler = make(blocks=100, batch_tokens=8)
    request = Request("bad", list(range(20)), SamplingParams(max_tokens=1))
    scheduler.add(request)
    scheduler.advance(scheduler.schedule()[0], None)
    scheduler.schedule()
    scheduler.finish(request, FinishReason.ERROR, "NaN")
    scheduler.pool.check_integrity([])
    again = Request("again", list(range(20)), SamplingParams(max_tokens=1))
    scheduler.add(again)
    assert scheduler.schedule()[0].start == 0


def test_what_can_never_be_served_is_refused_up_front() -> None:
    scheduler = make(blocks=4, block_size=4, model_len=20)
    with pytest.raises(ValueError, match="the context holds 20"):
        scheduler.add(Request("a", [1] * 18, SamplingParams(max_tokens=3)))
    with pytest.raises(ValueError, match="needs 5 cache blocks; the cache has 4"):
        scheduler.add(Request("b", [1] * 17, SamplingParams(max_tokens=1)))
    scheduler.add(Request("c", [1] * 15, SamplingParams(max_tokens=2)))
    with pytest.raises(ValueError, match="'c' is in use"):
        scheduler.add(Request("c", [1], SamplingParams(max_tokens=1)))
    run_all(scheduler)


def test_limits_are_validated() -> None:
    with pytest.raises(ValueError, match="max_requests is 0"):
        SchedulerConfig(1, 0, 1)
