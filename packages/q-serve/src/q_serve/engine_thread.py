"""Gives the engine a thread of its own; commands go in and outputs come out by thread-safe means."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from q_serve.core.request import FinishReason, Request
from q_serve.engine import Engine, Output

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Add:
    """Serve this request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """End the request of this id, if it hasn't ended."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread; whatever runs is aborted."""


Command = Add | Abort | Stop


class EngineThread:
    """Runs an engine until stopped.

    Args:
        engine: from now on touched by this thread only.
        deliver: called in this thread with each step's outputs.
        died: called in this thread if the engine itself fails, which is a bug of ours; no output comes after.
    """

    def __init__(self, engine: Engine, *, deliver: Callable[[Sequence[Output]], None], died: Callable[[], None]) -> None:
        self._engine = engine
        self._deliver = deliver
        self._died = died
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="q-serve-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def send(self, command: Command) -> None:
        """Give a command; never waits."""
        self._commands.put(command)

    def stop(self, timeout: float) -> bool:
        """End the thread after its current step; whether it ended in time."""
        self.send(Stop())
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def seconds_in_step(self) -> float:
        """How long the current step has taken by now; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def _run(self) -> None:
        try:
            while self._obey():
                self._step_began = time.monotonic()
                outputs = self._engine.step()
                self._step_began = None
                self._deliver(outputs)
        except Exception:
            logger.exception("the engine failed; this is a bug in q-serve")
            self._died()

    def _obey(self) -> bool:
        """Take all commands that are there, and wait for one if there is nothing else to do; False if one was to stop."""
        while not (self._commands.empty() and self._engine.has_work):
            match self._commands.get():
                case Add(request):
                    self._add(request)
                case Abort(request_id):
                    self._engine.abort(request_id)
                case Stop():
                    return False
        return True

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except ValueError as error:
            self._deliver([Output(request.id, None, FinishReason.ERROR, str(error), 0)])
