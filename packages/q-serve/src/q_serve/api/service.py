"""What a request goes through before the engine sees it: encoding, limits, sampling parameters."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from q_serve.api.client import EngineClient
from q_serve.api.errors import ApiError, bad_request
from q_serve.api.generation import Answer, Choice
from q_serve.api.schemas import MAX_N, MAX_PROMPTS, ChatRequest, CompletionRequest, GenerationRequest
from q_serve.core.request import Request
from q_serve.core.sampling import MAX_SEED, SamplingParams
from q_serve.text.detokenizer import Detokenizer, StopStrings
from q_serve.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens in /v1/completions."""


@dataclass(frozen=True, slots=True)
class Service:
    """Serves one model.

    Attributes:
        client: the engine.
        tokenizer: the model's.
        stop_token_ids: tokens that end a text.
        model_name: what requests call the model.
        vocab_size: token ids of prompts are below this.
        max_model_len: tokens of prompt and output together.
        strict: unknown fields are a 400.
    """

    client: EngineClient
    tokenizer: Tokenizer
    stop_token_ids: frozenset[int]
    model_name: str
    vocab_size: int
    max_model_len: int
    strict: bool

    async def complete(self, request: CompletionRequest) -> Answer:
        """Start to answer POST /v1/completions."""
        self._check(request)
        if len(request.prompts) > MAX_PROMPTS:
            raise bad_request(f"prompt: {len(request.prompts)} prompts, expected at most {MAX_PROMPTS}", param="prompt")
        prompts = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                prompt = await asyncio.to_thread(self.tokenizer.encode, prompt)
                if not prompt:
                    raise bad_request("prompt: one of the texts has no tokens", param="prompt")
            elif (outside := next((token for token in prompt if not 0 <= token < self.vocab_size), None)) is not None:
                raise bad_request(f"prompt: token id {outside} is not in 0…{self.vocab_size - 1}", param="prompt")
            prompts.append(prompt)
        return self._submit(request, prompts, request.max_tokens, default=DEFAULT_COMPLETION_TOKENS, param="prompt")

    async def chat(self, request: ChatRequest) -> Answer:
        """Start to answer POST /v1/chat/completions."""
        self._check(request)
        messages = [
            {name: value for name in ("role", "content", "name") if (value := getattr(message, name)) is not None}
            for message in request.messages
        ]
        try:
            prompt = await asyncio.to_thread(self.tokenizer.encode_chat, messages)
        except ValueError as error:
            raise bad_request(str(error), param="messages") from error
        if not prompt:
            raise bad_request("messages: the model's chat template makes an empty prompt of them", param="messages")
        return self._submit(request, [prompt], request.limit, default=None, param="messages")

    def _check(self, request: GenerationRequest) -> None:
        self.client.admit(request.n)  # asked again when the prompts are encoded; under overload that work isn't begun
        if request.model != self.model_name:
            raise ApiError(
                404, f"model {request.model!r} is not served here; {self.model_name!r} is", param="model", code="model_not_found"
            )
        if unknown := request.unknown_fields:
            names = ", ".join(repr(name[:64]) for name in unknown[:10])
            if self.strict:
                raise bad_request(f"unknown fields: {names}", param=unknown[0][:64])
            logger.warning("a request has unknown fields, which change nothing: %s", names)

    def _submit(
        self, request: GenerationRequest, prompts: Sequence[list[int]], limit: int | None, *, default: int | None, param: str
    ) -> Answer:
        if len(prompts) * request.n > MAX_N * 4:
            raise bad_request(
                f"n: {request.n} choices of {len(prompts)} prompts are too many, expected at most {MAX_N * 4}", param="n"
            )
        seed = secrets.randbits(62) if request.seed is None else request.seed
        requests: list[Request] = []
        choices: list[Choice] = []
        for prompt in prompts:
            max_tokens = self._max_tokens(len(prompt), limit, default, param)
            for _ in range(request.n):
                index = len(choices)
                params = SamplingParams(
                    max_tokens=max_tokens,
                    temperature=request.temperature,
                    top_p=request.top_p,
                    top_k=request.top_k,
                    seed=(seed + index) % (MAX_SEED + 1),
                    stop_token_ids=self.stop_token_ids,
                )
                name = uuid.uuid4().hex
                requests.append(Request(name, list(prompt), params))
                detokenizer = Detokenizer(self.tokenizer.decode, prompt)
                choices.append(Choice(index, name, len(prompt), detokenizer, StopStrings(request.stop)))
        return Answer(choices, self.client.submit(requests), choices_per_prompt=request.n)

    def _max_tokens(self, num_prompt_tokens: int, limit: int | None, default: int | None, param: str) -> int:
        room = self.max_model_len - num_prompt_tokens
        if room < 1:
            raise bad_request(
                f"{param}: {num_prompt_tokens} tokens, but the context holds {self.max_model_len}, one or more of them for the answer; "
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )
        max_tokens = limit or min(default or room, room)
        try:
            self.client.check(num_prompt_tokens, max_tokens)
        except ValueError as error:
            raise bad_request(str(error), param="max_tokens", code="context_length_exceeded") from error
        return max_tokens
