"""The event loop's side of the engine: requests go to its thread, outputs come back to the coroutine that waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from q_serve.api.errors import overloaded, unavailable
from q_serve.core.request import FinishReason, Request
from q_serve.engine import Engine, Output
from q_serve.engine_thread import Abort, Add, EngineThread


class RequestGroup:
    """The requests of one HTTP request, and their outputs as they come. Closing it aborts what isn't finished."""

    def __init__(self, client: EngineClient, ids: Sequence[str]) -> None:
        self._client = client
        self._open = set(ids)
        self.outputs: asyncio.Queue[Output] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Output]:
        while self._open:
            output = await self.outputs.get()
            if output.request_id not in self._open:
                continue  # aborted meanwhile
            if output.finish_reason is not None:
                self._open.discard(output.request_id)
            yield output

    def abort(self, request_id: str) -> None:
        """End one request; no more of its outputs come."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._client.forget(request_id)

    def close(self) -> None:
        """End all that is left."""
        for request_id in list(self._open):
            self.abort(request_id)


class EngineClient:
    """Submits requests to an engine in its own thread. Lives in one event loop.

    Args:
        engine: handed over; nobody else may touch it.
        capacity: unfinished requests that are let in.
        died: called in the event loop if the engine fails.
    """

    def __init__(self, engine: Engine, *, capacity: int, died: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._groups: dict[str, RequestGroup] = {}
        self._capacity = capacity
        self._closed: str | None = None
        self._scheduler = engine.scheduler

        def deliver(outputs: Sequence[Output]) -> None:
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

        def dead() -> None:
            self._loop.call_soon_threadsafe(self.close, "the engine failed")
            self._loop.call_soon_threadsafe(died)

        self.thread = EngineThread(engine, deliver=deliver, died=dead)

    @property
    def num_requests(self) -> int:
        """Requests that were submitted and aren't finished."""
        return len(self._groups)

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise ValueError if a request can never be served. Reads limits only, which never change."""
        self._scheduler.check(num_prompt_tokens, max_tokens)

    def admit(self, count: int) -> None:
        """Raise ApiError if that many more requests wouldn't be taken now: 429 if there are too many, 503 if no more are taken at all."""
        if self._closed is not None:
            raise unavailable(self._closed)
        if self.num_requests + count > self._capacity:
            raise overloaded(f"{self.num_requests} requests are being served or wait, and {self._capacity} may; try again later")

    def submit(self, requests: Sequence[Request]) -> RequestGroup:
        """Hand requests to the engine, all or none.

        Raises:
            ApiError: as :meth:`admit`.
        """
        self.admit(len(requests))
        group = RequestGroup(self, [request.id for request in requests])
        for request in requests:
            self._groups[request.id] = group
            self.thread.send(Add(request))
        return group

    def forget(self, request_id: str) -> None:
        """End a request whose outputs nobody wants any more."""
        if self._groups.pop(request_id, None) is not None:
            self.thread.send(Abort(request_id))

    def refuse(self, reason: str) -> None:
        """Take no more requests; those that run go on."""
        self._closed = self._closed or reason

    def close(self, reason: str) -> None:
        """Take no more requests, and end those that run with an error."""
        self.refuse(reason)
        for request_id, group in list(self._groups.items()):
            self.forget(request_id)
            group.outputs.put_nowait(Output(request_id, None, FinishReason.ERROR, reason, 0))

    @property
    def closed(self) -> str | None:
        """Why no more requests are taken, if so."""
        return self._closed

    def _dispatch(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if (group := self._groups.get(output.request_id)) is not None:
                if output.finish_reason is not None:
                    del self._groups[output.request_id]
                group.outputs.put_nowait(output)
