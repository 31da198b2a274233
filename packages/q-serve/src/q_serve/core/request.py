"""A request and the states it goes through."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from q_serve.core.sampling import SamplingParams


class RequestState(enum.Enum):
    """Where a request stands in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.PREEMPTED, RequestState.FINISHED}),
    RequestState.PREEMPTED: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}
"""The one table of legal transitions; :meth:`Request.move_to` knows no other."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated.

    Attributes:
        id: unique name.
        tokens: the prompt's token ids, then the generated ones.
        num_prompt_tokens: how many of ``tokens`` are the prompt.
        params: how tokens are sampled.
        state: see :data:`TRANSITIONS`; changed by :meth:`move_to` only.
        arrival: rank among all requests, given by the scheduler; lower is served first.
        blocks: ids of the cache blocks held, in the order of the sequence.
        block_keys: prefix-cache keys of the full blocks of ``tokens``, as far as they were needed.
        num_computed: how many of ``tokens`` have their keys and values in the cache.
        num_published: how many of ``blocks`` the prefix cache has been offered.
        num_cached_prompt_tokens: prompt tokens that were found in the prefix cache when the request first ran.
        finish_reason: set when finished.
        error: what went wrong, if the reason is ERROR.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    num_prompt_tokens: int = field(init=False)
    state: RequestState = field(default=RequestState.WAITING, init=False)
    arrival: int = field(default=-1, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    block_keys: list[bytes] = field(default_factory=list, init=False)
    num_computed: int = field(default=0, init=False)
    num_published: int = field(default=0, init=False)
    num_cached_prompt_tokens: int | None = field(default=None, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError(f"request {self.id}: the prompt has no tokens, expected one or more")
        self.num_prompt_tokens = len(self.tokens)

    @property
    def output_tokens(self) -> Sequence[int]:
        """The generated tokens."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def max_len(self) -> int:
        """Length of the sequence if it generates all it may."""
        return self.num_prompt_tokens + self.params.max_tokens

    @property
    def finished(self) -> bool:
        """Whether the request has ended, for whatever reason."""
        return self.state is RequestState.FINISHED

    def move_to(self, state: RequestState) -> None:
        """Change the state; an illegal transition is a bug of ours."""
        assert state in TRANSITIONS[self.state], f"request {self.id}: {self.state.value} → {state.value} is not a legal transition"
        self.state = state
