"""The server as its users meet it: a process of its own, asked through the official client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PROMPT = "The quick brown fox"


class Server:
    """A running q-serve."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.log: list[str] = []

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, content=body if isinstance(body, bytes) else json.dumps(body), timeout=60)


@contextmanager
def running(directory: Path, *arguments: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "q_serve", "serve", str(directory), "--port", "0", "--served-model-name", "tiny"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # tiny tensors are faster so, and the machine is shared
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    stderr = process.stderr
    server = Server(process, "")
    reader = threading.Thread(target=lambda: server.log.extend(stderr), daemon=True)
    reader.start()
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), "".join(server.log)
        server.url = line.split()[-1]
        yield server
    finally:
        process.kill()
        process.wait(timeout=30)
        reader.join(timeout=30)


@pytest.fixture(scope="module")
def server(tiny_directory: Path) -> Iterator[Server]:
    with running(tiny_directory, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@torch.no_grad()
def expected_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], count: int) -> str:
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def test_completion(client: openai.OpenAI, tiny_llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    ids = tokenizer(PROMPT)["input_ids"]
    assert answer.choices[0].text == expected_text(tiny_llama, tokenizer, ids, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
    assert answer.usage.total_tokens == len(ids) + 20


def test_chat(client: openai.OpenAI, tiny_llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=12, temperature=0)  # type: ignore[arg-type]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert answer.choices[0].message.content == expected_text(tiny_llama, tokenizer, ids, 12)
    assert answer.choices[0].message.role == "assistant"


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "max_tokens": 30, "temperature": 1.0, "seed": 7, "n": 3}
    whole = client.completions.create(prompt=PROMPT, **settings)
    texts, reasons, usage = [""] * 3, [""] * 3, None
    for chunk in client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **settings):
        assert usage is None, "something comes after the usage"
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or ""
        if not chunk.choices:
            usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 3, "choices of different seeds are the same"
    assert reasons == ["length"] * 3
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 90

    messages: Any = [{"role": "user", "content": "hello"}]
    whole_chat = client.chat.completions.create(messages=messages, **settings)
    texts = [""] * 3
    roles = []
    for chunk in client.chat.completions.create(messages=messages, stream=True, **settings):
        assert chunk.usage is None
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        roles.append(chunk.choices[0].delta.role)
    assert texts == [choice.message.content for choice in whole_chat.choices]
    assert roles[:3] == ["assistant"] * 3 and not any(roles[3:])


def test_sixteen_at_once_answer_as_alone(client: openai.OpenAI) -> None:
    def ask(i: int) -> tuple[str, str]:
        greedy = client.completions.create(model="tiny", prompt=f"{i} {PROMPT * (i % 5 + 1)}", max_tokens=24, temperature=0)
        drawn = client.completions.create(
            model="tiny", prompt=f"{PROMPT} {i}", max_tokens=24, seed=i, top_p=0.9, extra_body={"top_k": 50}
        )
        return greedy.choices[0].text, drawn.choices[0].text

    alone = [ask(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == alone


def test_prompts_as_lists_and_tokens(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    def texts(prompt: Any, **settings: Any) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0, **settings)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    ids = tokenizer(PROMPT)["input_ids"]
    (one,), (other,) = texts(PROMPT), texts("def add(")
    assert texts([PROMPT, "def add("]) == [one, other]
    assert texts(ids) == texts([ids]) == [one]
    assert texts([PROMPT, "def add("], n=2) == [one, one, other, other]


def test_cached_tokens_are_counted(client: openai.OpenAI) -> None:
    prompt = "class Point: naïve 你好 " * 5
    usages = [client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages if usage and usage.prompt_tokens_details]
    assert cached[0] == 0
    assert usages[1] is not None and cached[1] is not None and usages[1].prompt_tokens - 16 <= cached[1] < usages[1].prompt_tokens


def test_stop_strings(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 3}
    text = client.completions.create(**settings).choices[0].text
    stop = text[len(text) // 2 :][:3]
    stopped = client.completions.create(stop=[stop, "never to be seen"], **settings)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    chunks = [chunk.choices[0] for chunk in client.completions.create(stop=stop, stream=True, **settings)]
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].finish_reason == "stop"
    usage = stopped.usage
    assert usage is not None and usage.completion_tokens < 40


def test_models(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.completions.create(model="other", prompt="x")
    for path in ("/health", "/ready"):
        assert httpx.get(server.url + path).status_code == 200


HI = [{"role": "user", "content": "hi"}]
BAD = {
    "not JSON": ("completions", b"{'model'", None),
    "nothing": ("completions", b"", None),
    "not UTF-8": ("completions", b'{"model": "\xff"}', None),
    "a list": ("completions", b"[]", None),
    "deep": ("completions", b"[" * 100_000, None),
    "a half surrogate": ("completions", b'{"model": "tiny", "prompt": "\\ud800"}', None),
    "no model": ("completions", {"prompt": "x"}, "model"),
    "no prompt": ("completions", {"model": "tiny"}, "prompt"),
    "empty prompt": ("completions", {"model": "tiny", "prompt": ""}, "prompt"),
    "empty list": ("completions", {"model": "tiny", "prompt": []}, "prompt"),
    "mixed list": ("completions", {"model": "tiny", "prompt": ["x", 1]}, "prompt"),
    "prompt of a wrong type": ("completions", {"model": "tiny", "prompt": {"x": 1}}, "prompt"),
    "unknown token": ("completions", {"model": "tiny", "prompt": [1, 320]}, "prompt"),
    "negative token": ("completions", {"model": "tiny", "prompt": [-1]}, "prompt"),
    "huge token": ("completions", {"model": "tiny", "prompt": [10**30]}, "prompt"),
    "too long": ("completions", {"model": "tiny", "prompt": "x" * 600}, "prompt"),
    "long answer": ("completions", {"model": "tiny", "prompt": "x", "max_tokens": 600}, "max_tokens"),
    "max_tokens 0": ("completions", {"model": "tiny", "prompt": "x", "max_tokens": 0}, "max_tokens"),
    "max_tokens huge": ("completions", {"model": "tiny", "prompt": "x", "max_tokens": 10**40}, "max_tokens"),
    "max_tokens text": ("completions", {"model": "tiny", "prompt": "x", "max_tokens": "5"}, "max_tokens"),
    "temperature NaN": ("completions", b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "temperature"),
    "temperature infinite": ("completions", b'{"model": "tiny", "prompt": "x", "temperature": Infinity}', "temperature"),
    "temperature negative": ("completions", {"model": "tiny", "prompt": "x", "temperature": -1}, "temperature"),
    "top_p 0": ("completions", {"model": "tiny", "prompt": "x", "top_p": 0}, "top_p"),
    "top_k negative": ("completions", {"model": "tiny", "prompt": "x", "top_k": -1}, "top_k"),
    "seed negative": ("completions", {"model": "tiny", "prompt": "x", "seed": -1}, "seed"),
    "n 0": ("completions", {"model": "tiny", "prompt": "x", "n": 0}, "n"),
    "n huge": ("completions", {"model": "tiny", "prompt": "x", "n": 10_000}, "n"),
    "n true": ("completions", {"model": "tiny", "prompt": "x", "n": True}, "n"),
    "n times prompts": ("completions", {"model": "tiny", "prompt": ["x"] * 200, "n": 60}, "n"),
    "many prompts": ("completions", {"model": "tiny", "prompt": ["x"] * 2000}, "prompt"),
    "many stops": ("completions", {"model": "tiny", "prompt": "x", "stop": ["a"] * 17}, "stop"),
    "empty stop": ("completions", {"model": "tiny", "prompt": "x", "stop": [""]}, "stop"),
    "long stop": ("completions", {"model": "tiny", "prompt": "x", "stop": "a" * 2000}, "stop"),
    "unsupported": ("completions", {"model": "tiny", "prompt": "x", "logprobs": 5}, "logprobs"),
    "penalty": ("completions", {"model": "tiny", "prompt": "x", "presence_penalty": 0.5}, "presence_penalty"),
    "stream options": (
        "completions",
        {"model": "tiny", "prompt": "x", "stream_options": {"include_usage": True}},
        "stream_options",
    ),
    "no messages": ("chat/completions", {"model": "tiny", "messages": []}, "messages"),
    "role": ("chat/completions", {"model": "tiny", "messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    "no content": ("chat/completions", {"model": "tiny", "messages": [{"role": "user"}]}, "messages.0.content"),
    "an image": (
        "chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content",
    ),
    "tools": ("chat/completions", {"model": "tiny", "messages": HI, "tools": [{"type": "function"}]}, "tools"),
    "two limits": (
        "chat/completions",
        {"model": "tiny", "messages": HI, "max_tokens": 1, "max_completion_tokens": 2},
        "max_completion_tokens",
    ),
    "long chat": ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_400_that_names_the_field(case: str, server: Server) -> None:
    path, body, param = BAD[case]
    answer = server.post(f"/v1/{path}", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 600


def test_after_all_that_it_lives(server: Server, client: openai.OpenAI) -> None:
    for case in BAD:
        path, body, _ = BAD[case]
        server.post(f"/v1/{path}", body)
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2).choices[0].finish_reason == "length"
    assert server.process.poll() is None
    assert not any("Traceback" in line for line in server.log)


def test_wrong_routes_have_openai_errors_too(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert httpx.get(server.url + path).status_code == 404


def test_unknown_fields_are_logged(server: Server) -> None:
    assert server.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1, "colour": "red"}).status_code == 200
    deadline = time.monotonic() + 5
    while not any("unknown fields, which change nothing: 'colour'" in line for line in server.log):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_key_strict_caps_and_overload(tiny_directory: Path) -> None:
    limits = ("--max-requests", "1", "--max-queue", "1", "--max-body-bytes", "1000")
    with running(tiny_directory, "--api-key", "secret-ß", "--strict", *limits) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/ready").status_code == 200
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret-ß".encode()},
            {"Authorization": b"Bearer \xff"},
        ):
            for path in ("/v1/models", "/v1/nothing", "/health/"):
                answer = httpx.get(server.url + path, headers=header)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        headers = {"Authorization": "Bearer secret-ß".encode()}

        def post(**body: Any) -> httpx.Response:
            content = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 150} | body)
            return httpx.post(f"{server.url}/v1/completions", content=content, headers=headers, timeout=60)

        assert post(max_tokens=1).status_code == 200
        assert post(colour="red").json()["error"]["param"] == "colour"
        assert post(prompt="x" * 1000).status_code == 413
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: post(), range(8)))
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert post(n=3).status_code == 429
        assert post(max_tokens=1).status_code == 200


@pytest.fixture(scope="module")
def long_directory(save: Callable[[PreTrainedModel], Path], make_llama: Callable[..., LlamaForCausalLM]) -> Path:
    """A model with room for answers that take long."""
    return save(make_llama(max_position_embeddings=1 << 16))


def test_shutdown_ends_streams_and_exits_0(long_directory: Path) -> None:
    with running(long_directory, "--grace-period", "0.5") as server:
        client = server.client()
        endless = client.completions.create(model="tiny", prompt="x", max_tokens=60_000, stream=True)
        assert next(iter(endless))
        waiting = ThreadPoolExecutor(1).submit(
            server.post, "/v1/completions", {"model": "tiny", "prompt": "y", "max_tokens": 60_000}
        )
        time.sleep(0.3)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in endless:
                pass
        assert waiting.result(timeout=20).json()["error"]["message"] == "the server is shutting down"
        assert server.process.wait(timeout=20) == 0
        assert time.monotonic() - began < 10
        assert not any("Traceback" in line for line in server.log), "".join(server.log)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_what_finishes_in_the_grace_period_is_whole(long_directory: Path) -> None:
    with running(long_directory, "--grace-period", "20") as server:
        client = server.client()
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=300, stream=True)
        chunks = [next(iter(stream))]
        server.process.send_signal(signal.SIGINT)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.process.wait(timeout=20) == 0
