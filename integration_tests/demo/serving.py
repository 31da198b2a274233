"""The server as its own process, and questions through the official client."""

from __future__ import annotations

import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from openai import OpenAI
from tqdm import tqdm

from demo.report import Serve

START_TIMEOUT = 120
STOP_TIMEOUT = 30
CONCURRENT = 16
LISTENING = "listening on "


@contextmanager
def serve(directory: Path, device: torch.device, log: Path) -> Iterator[str]:
    """Run ``q-serve serve`` on a free loopback port.

    It computes in float32, in which two tokens hardly ever tie, so that its greedy answers can be compared token by token.

    Args:
        directory: the model.
        device: where it computes.
        log: file that takes what the server prints.

    Yields:
        Its address.

    Raises:
        RuntimeError: it doesn't start, or doesn't end cleanly when asked to.
    """
    program = Path(sysconfig.get_path("scripts")) / "q-serve"
    with log.open("w") as output:
        command = [program, "serve", directory, "--port", "0", "--dtype", "float32", "--device", str(device)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _address(process, log)
            process.send_signal(signal.SIGINT)
            if (code := process.wait(STOP_TIMEOUT)) != 0:
                raise RuntimeError(f"q-serve ended with exit code {code}, expected 0:\n{log.read_text()}")
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the line that says where it listens."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith(LISTENING):
                return line.removeprefix(LISTENING)
        time.sleep(0.1)
    raise RuntimeError(f"q-serve did not start within {START_TIMEOUT} s:\n{log.read_text()}")


@dataclass(frozen=True, slots=True)
class Answers:
    """What the server answered, greedily unless said otherwise.

    Attributes:
        completion: to the first prompt.
        streamed: to the first prompt, as a stream, joined.
        chat: to the first prompt as a user's message.
        alone: to each prompt, one after the other.
        together: to each prompt, all at the same time.
        sample: a longer text, drawn at random with a seed.
        figures: how many requests were made; tokens a second of those together; seconds to the stream's first token.
    """

    completion: str
    streamed: str
    chat: str
    alone: list[str]
    together: list[str]
    sample: str
    figures: Serve


def ask(address: str, prompts: list[str], *, max_tokens: int, sample_prompt: str, sample_tokens: int) -> Answers:
    """Ask a server in every way that the demo shows.

    Args:
        address: of the server, http://host:port.
        prompts: what to complete.
        max_tokens: tokens of an answer.
        sample_prompt: what the sample begins with.
        sample_tokens: tokens of the sample.
    """
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def complete(prompt: str) -> tuple[str, int]:
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
        assert answer.usage is not None
        return answer.choices[0].text, answer.usage.completion_tokens

    def stream(prompt: str) -> tuple[str, float]:
        start = time.perf_counter()
        first = None
        text = ""
        for chunk in client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True):
            first = first or time.perf_counter()
            text += chunk.choices[0].text if chunk.choices else ""
        return text, (first or time.perf_counter()) - start

    def chat(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, temperature=0)
        return answer.choices[0].message.content or ""

    def sample() -> str:
        answer = client.completions.create(
            model=model, prompt=sample_prompt, max_tokens=sample_tokens, temperature=0.6, top_p=0.9, seed=1
        )
        return sample_prompt + answer.choices[0].text

    completion, _ = complete(prompts[0])
    streamed, time_to_first_token = stream(prompts[0])
    alone = [complete(prompt)[0] for prompt in tqdm(prompts, desc="asked one by one", unit="request")]
    start = time.perf_counter()
    together = _all_at_once(complete, prompts)
    seconds = time.perf_counter() - start
    return Answers(
        completion=completion,
        streamed=streamed,
        chat=chat(prompts[0]),
        alone=alone,
        together=[text for text, _ in together],
        sample=sample(),
        figures=Serve(
            requests=4 + 2 * len(prompts),
            tokens_per_second=sum(tokens for _, tokens in together) / seconds,
            time_to_first_token_s=time_to_first_token,
        ),
    )


def _all_at_once(complete: Callable[[str], tuple[str, int]], prompts: list[str]) -> list[tuple[str, int]]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(tqdm(pool.map(complete, prompts), desc="asked together", total=len(prompts), unit="request"))
