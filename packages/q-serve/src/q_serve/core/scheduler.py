"""Decides what runs in the next step.

One rule for prefill, chunked prefill and decode: a request has tokens, some of them are computed, and a step computes some more, within
one budget of tokens for all. Running requests come first, in the order of their arrival, then waiting ones. If the running ones need
more blocks than there are, the youngest gives its own up and is computed again later (preemption by recompute).

Why nothing starves: requests run in the order of arrival, and every running request is older than every waiting one. So the oldest
running request is never preempted while another runs; alone it fits, since :meth:`Scheduler.add` refuses what doesn't; and each step
computes at least one of its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from q_serve.core.kv_blocks import BlockPool
from q_serve.core.request import FinishReason, Request, RequestState


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the scheduler.

    Attributes:
        max_batch_tokens: tokens computed in one step, over all requests.
        max_requests: requests that run at the same time.
        max_model_len: tokens of one sequence, prompt and output together.
    """

    max_batch_tokens: int
    max_requests: int
    max_model_len: int

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_requests", "max_model_len"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"SchedulerConfig: {name} is {value}, expected 1 or more")


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's part of one step: compute ``tokens[start:end]``, and sample if that is the end of the sequence."""

    request: Request
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the step ends with a new token for this request."""
        return self.end == len(self.request.tokens)


class Scheduler:
    """Holds the unfinished requests, and the blocks through the pool."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self.num_preemptions = 0

    @property
    def num_requests(self) -> int:
        """Requests that are not finished."""
        return len(self._requests)

    @property
    def requests(self) -> Iterable[Request]:
        """The requests that are not finished."""
        return self._requests.values()

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise ValueError if a request can't be served, however long it waits."""
        length = num_prompt_tokens + max_tokens
        if length > self.config.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, {length} in all; "
                f"the context holds {self.config.max_model_len}: shorten the prompt or lower max_tokens"
            )
        # The last token is returned, never computed.
        if (needed := self.pool.blocks_for(length - 1)) > self.pool.num_blocks:
            raise ValueError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, which needs {needed} cache blocks; "
                f"the cache has {self.pool.num_blocks}: shorten the prompt, lower max_tokens, or serve with a larger KV cache"
            )

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            ValueError: its id is taken, or it can never be served.
        """
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use")
        self.check(request.num_prompt_tokens, request.params.max_tokens)
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.id] = request
        self._waiting.append(request)

    def get(self, request_id: str) -> Request | None:
        """The unfinished request of that id."""
        return self._requests.get(request_id)

    # --- a step --------------------------------------------------------------------------------------------------------

    def schedule(self) -> list[ScheduledRequest]:
        """Choose the next step; empty only if no request is left."""
        budget = self.config.max_batch_tokens
        preemptions = self.num_preemptions
        batch: list[ScheduledRequest] = []
        while len(batch) < len(self._running) and budget > 0:
            request = self._running[len(batch)]
            end = min(len(request.tokens), request.num_computed + budget)
            if not self._grow(request, end):
                break
            budget -= end - request.num_computed
            batch.append(ScheduledRequest(request, request.num_computed, end))

        # What was just taken from a running request isn't given to a new one.
        while (
            self._waiting and budget > 0 and len(self._running) < self.config.max_requests and self.num_preemptions == preemptions
        ):
            request = self._waiting[0]
            if not self._admit(request):
                break
            end = min(len(request.tokens), request.num_computed + budget)
            budget -= end - request.num_computed
            batch.append(ScheduledRequest(request, request.num_computed, end))
        assert batch or not self._requests, "requests are left, and none of them can run"
        return batch

    def advance(self, scheduled: ScheduledRequest, token: int | None) -> None:
        """Record that a request's part of a step was computed.

        Args:
            scheduled: what :meth:`schedule` chose.
            token: the sampled token, if the part samples. That it could be sampled says that all keys and values behind it are
                finite; only then are the full blocks published in the prefix cache.
        """
        request = scheduled.request
        assert scheduled.samples == (token is not None), f"request {request.id}: a token where none is due, or none where one is"
        request.num_computed = scheduled.end
        if token is None:
            return
        self._publish(request)
        request.tokens.append(token)
        if token in request.params.stop_token_ids:
            self.finish(request, FinishReason.STOP)
        elif request.num_output_tokens >= request.params.max_tokens:
            self.finish(request, FinishReason.LENGTH)

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request and give its blocks back, once.

        Args:
            request: one that is not finished.
            reason: why. After an ERROR nothing of what the request computed stays in the prefix cache.
            error: what went wrong.
        """
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        request.move_to(RequestState.FINISHED)
        request.finish_reason = reason
        request.error = error
        del self._requests[request.id]
        blocks, request.blocks = request.blocks, []
        self.pool.release(blocks, discard=reason is FinishReason.ERROR)

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, states and the order of requests are as they must be. For any moment between steps."""
        self.pool.check_integrity(request.blocks for request in self._requests.values())
        assert all(request.state is RequestState.RUNNING for request in self._running)
        assert all(request.state in (RequestState.WAITING, RequestState.PREEMPTED) for request in self._waiting)
        assert all(not request.blocks for request in self._waiting), "a waiting request holds blocks"
        order = [request.arrival for request in (*self._running, *self._waiting)]
        assert order == sorted(set(order)), "requests are out of the order of their arrival"
        assert len(order) == len(self._requests) and len(self._running) <= self.config.max_requests
        for request in self._running:
            assert request.num_computed < len(request.tokens), f"request {request.id} runs and has nothing to compute"
            assert self.pool.blocks_for(request.num_computed) <= len(request.blocks), f"request {request.id} has too few blocks"

    # --- blocks of a request -------------------------------------------------------------------------------------------

    def _grow(self, request: Request, end: int) -> bool:
        """Give a running request the blocks for ``tokens[:end]``, the youngest ones' if need be; False if it was the youngest."""
        missing = self.pool.blocks_for(end) - len(request.blocks)
        while missing > self.pool.num_available:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        if missing > 0:
            request.blocks += self.pool.allocate(missing)
        return True

    def _admit(self, request: Request) -> bool:
        """Start a waiting request if there are blocks for all its tokens, so that its prefill can't be preempted half-way by itself."""
        # At least one token must be computed, or there would be nothing to sample from.
        reusable = (len(request.tokens) - 1) // self.pool.block_size
        self.pool.extend_keys(request.block_keys, request.tokens, reusable)
        cached = self.pool.match(request.block_keys[:reusable], request.tokens)
        missing = self.pool.blocks_for(len(request.tokens)) - len(cached)
        if missing + self.pool.num_idle(cached) > self.pool.num_available:
            return False
        self.pool.hold(cached)
        request.blocks = [*cached, *self.pool.allocate(missing)]
        request.num_computed = len(cached) * self.pool.block_size
        request.num_published = len(cached)
        if request.num_cached_prompt_tokens is None:
            request.num_cached_prompt_tokens = request.num_computed
        request.move_to(RequestState.RUNNING)
        self._running.append(self._waiting.popleft())
        return True

    def _preempt(self, request: Request) -> None:
        blocks, request.blocks = request.blocks, []
        self.pool.release(blocks)
        request.num_computed = request.num_published = 0
        request.move_to(RequestState.PREEMPTED)
        self._running.remove(request)
        self._waiting.appendleft(request)
        self.num_preemptions += 1

    def _publish(self, request: Request) -> None:
        full = request.num_computed // self.pool.block_size
        self.pool.extend_keys(request.block_keys, request.tokens, full)
        for index in range(request.num_published, full):
            self.pool.publish(request.blocks[index], request.block_keys, index, request.tokens)
        request.num_published = full
