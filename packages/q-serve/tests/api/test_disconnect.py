"""A client that goes away aborts its requests, in whatever phase, and nothing is left of them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence

import pytest
import uvicorn
from transformers import PreTrainedTokenizerFast

from q_serve.api.app import create_app
from q_serve.api.client import EngineClient
from q_serve.api.service import Service
from q_serve.core.kv_blocks import BlockPool
from q_serve.core.scheduler import ScheduledRequest, Scheduler, SchedulerConfig
from q_serve.engine import Engine
from q_serve.text.tokenizer import Tokenizer


class Slow:
    """A runner that takes its time and always says the same."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def execute(self, batch: Sequence[ScheduledRequest]) -> list[int | None]:
        time.sleep(self.seconds)
        return [70 if scheduled.samples else None for scheduled in batch]


class Harness:
    """The real app behind the real uvicorn on loopback, with an engine that a test can look into."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seconds: float = 0.002) -> None:
        self.runner = Slow(seconds)
        self.scheduler = Scheduler(SchedulerConfig(64, 4, 10_000), BlockPool(700, 16, model="m"))
        self.died = asyncio.Event()
        self.client = EngineClient(Engine(self.scheduler, self.runner, vocab_size=320), capacity=64, died=self.died.set)
        service = Service(
            client=self.client,
            tokenizer=Tokenizer(tokenizer.backend_tokenizer.to_str(), chat_template=None),
            stop_token_ids=frozenset(),
            model_name="m",
            vocab_size=320,
            max_model_len=10_000,
            strict=False,
        )
        app = create_app(service, api_key=None, max_body_bytes=1 << 20)
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)

    async def __aenter__(self) -> Harness:
        self.client.thread.start()
        self._serving = asyncio.create_task(self.server._serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.close("the test is over")
        self.server.should_exit = True
        await self._serving
        assert self.client.thread.stop(timeout=10)

    async def ask(self, **body: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request; the connection, on which nothing has been read."""
        content = json.dumps({"model": "m", "prompt": "The quick brown fox", "max_tokens": 5000} | body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        await writer.drain()
        return reader, writer

    async def idle(self) -> None:
        """Wait until the engine has nothing left, then check that nothing leaked."""
        for _ in range(1000):
            if self.client.num_requests == 0 and self.scheduler.num_requests == 0:
                break
            await asyncio.sleep(0.01)
        assert self.client.num_requests == 0
        assert self.scheduler.num_requests == 0
        self.scheduler.check_integrity()
        assert self.scheduler.pool.num_available == self.scheduler.pool.num_blocks


def test_disconnects_at_random_times(tokenizer: PreTrainedTokenizerFast) -> None:
    async def leave(harness: Harness, rng: random.Random) -> None:
        _, writer = await harness.ask(stream=rng.random() < 0.5, n=rng.choice([1, 3]), prompt="x" * rng.randrange(1, 300))
        await asyncio.sleep(rng.random() * 0.1)
        if rng.random() < 0.5:
            writer.transport.abort()
        writer.close()

    async def main() -> None:
        rng = random.Random(0)
        async with Harness(tokenizer) as harness:
            for _ in range(8):
                await asyncio.gather(*(leave(harness, rng) for _ in range(12)))
            await harness.idle()
            assert harness.scheduler._arrivals > 96, "the test has lost its point: hardly a request got through"
            # And it still answers.
            reader, writer = await harness.ask(max_tokens=3)
            assert b"200 OK" in await reader.readline()
            writer.close()
            await harness.idle()

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_is_noticed_at_once(stream: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    async def main() -> None:
        async with Harness(tokenizer) as harness:
            _, writer = await harness.ask(stream=stream)
            while harness.client.num_requests == 0:
                await asyncio.sleep(0.001)
            writer.close()
            async with asyncio.timeout(1):  # its 5,000 tokens would take 10 s
                await harness.idle()

    asyncio.run(main())


def test_a_stalled_engine_is_not_ready(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q_serve.api.app.STALLED_SECONDS", 0.05)

    async def ready(harness: Harness) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", harness.port)
        writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    async def main() -> None:
        async with Harness(tokenizer, seconds=0.5) as harness:
            assert b"200 OK" in await ready(harness)
            _, writer = await harness.ask(max_tokens=1)
            await asyncio.sleep(0.25)
            answer = await ready(harness)
            assert b"503 Service Unavailable" in answer and b"no progress" in answer
            await harness.idle()
            assert b"200 OK" in await ready(harness)
            writer.close()

    asyncio.run(main())


def test_a_dead_engine_fails_its_requests_and_says_so(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Harness(tokenizer) as harness:
            reader, writer = await harness.ask(stream=True)
            assert b"200 OK" in await reader.readline()

            def bug() -> None:
                raise KeyError("a bug of ours")

            monkeypatch.setattr(harness.scheduler, "schedule", bug)
            async with asyncio.timeout(5):
                await harness.died.wait()
                assert b"the engine failed" in await reader.readuntil(b"[DONE]")
            writer.close()
            reader, writer = await harness.ask()
            assert b"503 Service Unavailable" in await reader.readline()
            writer.close()

    asyncio.run(main())
