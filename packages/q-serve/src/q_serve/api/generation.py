"""From an engine's tokens to the choices of an answer, piece by piece; streamed and whole answers go the same way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from q_serve.api.client import RequestGroup
from q_serve.api.errors import ApiError
from q_serve.core.request import FinishReason
from q_serve.engine import Output
from q_serve.text.detokenizer import Detokenizer, StopStrings


@dataclass(slots=True)
class Choice:
    """One of an answer's choices.

    Attributes:
        index: its number in the answer.
        request_id: the engine's name for it.
        num_prompt_tokens: tokens of its prompt.
        num_tokens: tokens generated, the one that ended it included.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        finish_reason: "stop" or "length" once finished.
        text: all text so far.
    """

    index: int
    request_id: str
    num_prompt_tokens: int
    detokenizer: Detokenizer
    stops: StopStrings
    num_tokens: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    finish_reason: str | None = field(default=None, init=False)
    text: str = field(default="", init=False)

    def take(self, output: Output) -> str:
        """The text that an output adds.

        Raises:
            ApiError: the request failed.
        """
        if output.error is not None:
            raise ApiError(500, output.error, type="server_error")
        self.num_cached_tokens = output.num_cached_tokens
        new = ""
        if output.token is not None:
            self.num_tokens += 1
            if output.finish_reason is not FinishReason.STOP:  # the token that ends a text is no part of it
                new = self.stops.push(self.detokenizer.push(output.token))
        if output.finish_reason is not None and not self.stops.hit:
            new += self.stops.push(self.detokenizer.flush())
            new += self.stops.flush()
            self.finish_reason = output.finish_reason.value
        if self.stops.hit:
            self.finish_reason = FinishReason.STOP.value
        self.text += new
        return new


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of a choice, and its finish reason if it is the last."""

    choice: Choice
    text: str
    finish_reason: str | None


class Answer:
    """The choices of one HTTP request.

    Args:
        choices: by the order of their indices.
        group: their requests in the engine.
        choices_per_prompt: how many choices in a row have the same prompt.
    """

    def __init__(self, choices: Sequence[Choice], group: RequestGroup, *, choices_per_prompt: int) -> None:
        self.choices = choices
        self._group = group
        self._choices_per_prompt = choices_per_prompt
        self._by_id = {choice.request_id: choice for choice in choices}

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes. Whoever stops listening calls :meth:`close`."""
        async for output in self._group:
            choice = self._by_id[output.request_id]
            text = choice.take(output)
            if choice.finish_reason is not None:
                self._group.abort(choice.request_id)
            if text or choice.finish_reason is not None:
                yield Piece(choice, text, choice.finish_reason)

    def close(self) -> None:
        """Abort what isn't finished."""
        self._group.close()

    async def complete(self) -> None:
        """Wait for all of it."""
        async for _ in self.pieces():
            pass

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object; a prompt counts once, however many choices it has."""
        first = self.choices[:: self._choices_per_prompt]
        prompt = sum(choice.num_prompt_tokens for choice in first)
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in first)},
        }
