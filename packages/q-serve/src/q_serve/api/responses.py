"""Answers as OpenAI's API shapes them: whole, and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from q_serve.api.errors import ApiError
from q_serve.api.generation import Answer, Choice, Piece


class Shape(ABC):
    """How one kind of answer looks.

    Args:
        model: name of the model.
    """

    id_prefix: str
    whole: str
    chunk: str

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice of a whole answer."""

    @abstractmethod
    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """What a stream says of a choice before its text."""

    @abstractmethod
    def piece(self, piece: Piece) -> dict[str, Any]:
        """A choice in a chunk of a stream."""

    def answer(self, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        choices = [self.choice(choice) for choice in answer.choices]
        return {**self._head, "object": self.whole, "choices": choices, "usage": answer.usage}

    async def events(self, answer: Answer, *, include_usage: bool) -> AsyncIterator[str]:
        """An answer as server-sent events, up to ``[DONE]``; an error is an event too."""
        head = {**self._head, "object": self.chunk}
        # With include_usage every chunk has the key, null in all but the last.
        usage = {"usage": None} if include_usage else {}
        try:
            for choice in answer.choices:
                if (opening := self.opening(choice)) is not None:
                    yield _event({**head, "choices": [opening], **usage})
            async for piece in answer.pieces():
                yield _event({**head, "choices": [self.piece(piece)], **usage})
            if include_usage:
                yield _event({**head, "choices": [], "usage": answer.usage})
        except ApiError as error:
            yield _event(error.body)
        yield "data: [DONE]\n\n"


class CompletionShape(Shape):
    """Answers of /v1/completions."""

    id_prefix = "cmpl"
    whole = chunk = "text_completion"

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {"index": choice.index, "text": choice.text, "logprobs": None, "finish_reason": choice.finish_reason}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return None

    def piece(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.choice.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}


class ChatShape(Shape):
    """Answers of /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": choice.index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return self._delta(choice.index, {"role": "assistant", "content": ""}, None)

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self._delta(piece.choice.index, {"content": piece.text} if piece.text else {}, piece.finish_reason)

    @staticmethod
    def _delta(index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
