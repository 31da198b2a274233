"""The server process: engine, app and uvicorn, from the first line to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn

from q_serve.api.app import create_app
from q_serve.api.client import EngineClient
from q_serve.api.service import Service
from q_serve.build import BuiltEngine, build
from q_serve.errors import ModelError
from q_serve.options import EngineOptions, ServerOptions

logger = logging.getLogger(__name__)

_HARD_LIMIT = 2
"""Seconds beyond the grace period for answers to be written, before connections are cut."""


def serve(engine_options: EngineOptions, options: ServerOptions) -> int:
    """Load a model and serve it until a signal; the exit code.

    Raises:
        ModelError: the model can't be served, or the address can't be had.
    """
    listener = _listen(options)
    with listener:
        built = build(engine_options)
        name = options.served_model_name or engine_options.model.resolve().name
        return asyncio.run(_serve(built, name, engine_options, options, listener))


async def _serve(
    built: BuiltEngine, name: str, engine_options: EngineOptions, options: ServerOptions, listener: socket.socket
) -> int:
    server: _Server
    engine_failed = asyncio.Event()

    def died() -> None:
        engine_failed.set()
        server.should_exit = True

    capacity = engine_options.max_requests + options.max_queue
    client = EngineClient(built.engine, capacity=capacity, died=died)
    service = Service(
        client=client,
        tokenizer=built.tokenizer,
        stop_token_ids=built.stop_token_ids,
        model_name=name,
        vocab_size=built.engine.vocab_size,
        max_model_len=built.max_model_len,
        strict=options.strict,
    )
    app = create_app(service, api_key=options.api_key, max_body_bytes=options.max_body_bytes)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(options.grace_period) + _HARD_LIMIT,
    )
    server = _Server(config, client, options)
    client.thread.start()
    try:
        await server.serve(sockets=[listener])
    finally:
        client.close("the server is shutting down")
        if not client.thread.stop(timeout=10):
            logger.error("the engine did not stop within 10 s")
    return 1 if engine_failed.is_set() else 0


class _Server(uvicorn.Server):
    """uvicorn, told how to say where it listens and how to end: let go in peace what ends within the grace period, then fail the rest."""

    def __init__(self, config: uvicorn.Config, client: EngineClient, options: ServerOptions) -> None:
        super().__init__(config)
        self._client = client
        self._grace_period = options.grace_period
        self._loop = asyncio.get_running_loop()
        self._stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM as a wish to end, which is fulfilled with exit code 0; uvicorn would raise them again afterwards."""
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            self._loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                self._loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the first signal, stop gently; at the second, at once."""
        if self._stopping:
            self._client.close("the server is shutting down")
            return
        self._stopping = True
        logger.info("stopping; running requests have %g s", self._grace_period)
        self._client.refuse("the server is shutting down")
        self._loop.call_later(self._grace_period, self._client.close, "the server is shutting down")
        self.should_exit = True


def _listen(options: ServerOptions) -> socket.socket:
    """Bind first, so that a taken port is known before weights are read."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ModelError(f"can't listen on {options.host} port {options.port}: {error.strerror or error}") from error
    return listener
