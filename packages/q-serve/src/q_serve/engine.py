"""The engine: one loop, schedule → execute → postprocess.

An error ends the request that caused it, never the engine. If a step fails as a whole, its requests are run one by one, and those that
fail alone are ended. Tokens go in and tokens come out; text is the API's concern.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from q_serve.core.request import FinishReason, Request
from q_serve.core.scheduler import ScheduledRequest, Scheduler

logger = logging.getLogger(__name__)

NOT_FINITE = "the model's output is not finite (NaN or infinity) for this prompt"
FAILED = "the model failed on this request"


class Runner(Protocol):
    """What executes a step; :class:`q_serve.worker.model_runner.ModelRunner` is one."""

    def execute(self, batch: Sequence[ScheduledRequest]) -> Sequence[int | None]:
        """A token for each request that samples, ``None`` where it isn't finite and for the others."""


@dataclass(frozen=True, slots=True)
class Output:
    """News of a request.

    Attributes:
        request_id: whose.
        token: a new token, if there is one.
        finish_reason: set with the last output of a request.
        error: what went wrong, if the reason is ERROR.
        num_cached_tokens: prompt tokens that were taken from the prefix cache.
    """

    request_id: str
    token: int | None
    finish_reason: FinishReason | None
    error: str | None
    num_cached_tokens: int


class Engine:
    """Serves requests step by step. Not thread-safe: :class:`q_serve.engine_thread.EngineThread` gives it a thread.

    Args:
        scheduler: which requests run.
        runner: runs them.
        vocab_size: token ids of prompts are below this.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, *, vocab_size: int) -> None:
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self._runner = runner

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.num_requests > 0

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it can never be served; the message says why.
        """
        outside = next((token for token in request.tokens if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise ValueError(f"the prompt has token id {outside}, expected ids in 0…{self.vocab_size - 1}")
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request, if it hasn't ended, without another output."""
        if (request := self.scheduler.get(request_id)) is not None:
            self.scheduler.finish(request, FinishReason.ABORT)

    def step(self) -> list[Output]:
        """Compute some tokens of some requests; the news of it."""
        batch = self.scheduler.schedule()
        if not batch:
            return []
        tokens, errors = self._execute(batch)
        return self._postprocess(batch, tokens, errors)

    def _execute(self, batch: Sequence[ScheduledRequest]) -> tuple[Sequence[int | None], Sequence[str | None]]:
        try:
            return self._runner.execute(batch), [None] * len(batch)
        except Exception:
            if len(batch) == 1:
                logger.exception("request %s failed", batch[0].request.id)
                return [None], [FAILED]
            logger.warning("a step with %d requests failed; running them one by one", len(batch), exc_info=True)
        alone = [self._execute([scheduled]) for scheduled in batch]
        return [tokens[0] for tokens, _ in alone], [errors[0] for _, errors in alone]

    def _postprocess(
        self, batch: Sequence[ScheduledRequest], tokens: Sequence[int | None], errors: Sequence[str | None]
    ) -> list[Output]:
        outputs = []
        for scheduled, token, error in zip(batch, tokens, errors, strict=True):
            request = scheduled.request
            if error is None and scheduled.samples and token is None:
                error = NOT_FINITE
            if error is None:
                self.scheduler.advance(scheduled, token)
                if token is None:
                    continue
            else:
                self.scheduler.finish(request, FinishReason.ERROR, error)
            outputs.append(Output(request.id, token, request.finish_reason, request.error, request.num_cached_prompt_tokens or 0))
        return outputs
