"""Requests, read strictly: each field has a type and a range, and nothing is dropped in silence.

A field that OpenAI's API has and this server hasn't is accepted at the value that asks for nothing, and refused by name at any other.
A field that neither knows is reported by :attr:`GenerationRequest.unknown_fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from q_serve.api.errors import bad_request, invalid_fields
from q_serve.core.sampling import MAX_SEED

MAX_N = 64
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Fields of OpenAI's that this server doesn't have, and the values (besides null) that ask for nothing."""

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Strict(BaseModel):
    """No coercion; unknown fields are kept for :func:`_unknown`."""

    model_config = ConfigDict(strict=True, extra="allow")


def _asks_for_nothing(name: str, value: object) -> bool:
    # 0 is 0.0, but True isn't 1.
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name])


class StreamOptions(_Strict):
    """What a streamed answer holds besides text."""

    include_usage: bool = False


class GenerationRequest(_Strict):
    """What both kinds of request have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Annotated[list[str], Field(max_length=MAX_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, Mapping) else fields

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: list[str]) -> list[str]:
        if not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in stop):
            raise ValueError(f"each stop string must have 1…{MAX_STOP_CHARACTERS} characters")
        return stop

    @property
    def include_usage(self) -> bool:
        """Whether the last event of a stream is the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def unknown_fields(self) -> list[str]:
        """Names of the fields that mean nothing here."""
        names = [name for name in self.model_extra or {} if name not in _NEUTRAL]
        if self.stream_options is not None:
            names += [f"stream_options.{name}" for name in self.stream_options.model_extra or {}]
        return names

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and not _asks_for_nothing(name, value):
                raise bad_request(f"{name}: not supported by this server; leave it out", param=name)
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options: only allowed with stream true", param="stream_options")
        return self


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: PositiveInt | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("empty; expected some text")
            return prompt
        if not isinstance(prompt, list):
            raise ValueError("expected text, a list of texts, a list of token ids, or a list of lists of token ids")
        if not prompt:
            raise ValueError("empty; expected one prompt or more")
        if all(isinstance(text, str) for text in prompt):
            if not all(prompt):
                raise ValueError("one of the texts is empty")
        elif all(isinstance(ids, list) for ids in prompt):
            if not all(prompt) or not all(type(token) is int for ids in prompt for token in ids):
                raise ValueError("each list of token ids must hold one integer or more, and nothing else")
        elif not all(type(token) is int for token in prompt):
            raise ValueError("expected text, a list of texts, a list of token ids, or a list of lists of token ids")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class ChatMessage(_Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, Mapping) else fields

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) and len(part) == 2):
                raise ValueError('expected text, or a list of parts {"type": "text", "text": …}; this model reads text only')
        return "\n".join(part["text"] for part in content)


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise bad_request("max_completion_tokens: differs from max_tokens; give one of them", param="max_completion_tokens")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens to generate, if the request says."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def unknown_fields(self) -> list[str]:
        """Also those of messages."""
        return super().unknown_fields + [
            f"messages.{index}.{name}" for index, message in enumerate(self.messages) for name in message.model_extra or {}
        ]


RequestType = TypeVar("RequestType", bound=GenerationRequest)


def parse(kind: type[RequestType], body: bytes) -> RequestType:
    """Read a body.

    Raises:
        ApiError: 400; it is not JSON, not an object, or a field is wrong.
    """
    try:
        fields = from_json(body)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise bad_request(f"the body is a JSON {type(fields).__name__}, expected an object")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid_fields(error) from error
