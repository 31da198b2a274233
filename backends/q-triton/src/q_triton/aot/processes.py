"""One process a job: what hangs is killed, and what crashes takes nothing with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job has no result."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done(Generic[Job, Result]):
    """A job that ended, one way or the other, after so many seconds."""

    job: Job
    result: Result | Failure
    seconds: float


def in_processes(
    work: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int, limit_s: float
) -> Iterator[Done[Job, Result]]:
    """Do each job in a fork of this process, so that it finds what this one has imported.

    Args:
        work: what to do with a job; its result is pickled.
        jobs: they aren't.
        workers: processes at a time.
        limit_s: a job that takes longer is killed.
    """
    waiting = deque(jobs)
    running: dict[Connection, tuple[Job, BaseProcess, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                connection, process = _start(work, job)
                running[connection] = job, process, time.monotonic()
            oldest = min(started for *_, started in running.values())
            ready = wait(list(running), max(0.0, oldest + limit_s - time.monotonic()))
            for connection in [connection for connection in running if connection in ready]:
                job, process, started = running.pop(connection)
                yield Done(job, _received(connection, process), time.monotonic() - started)
            for connection, (job, process, started) in list(running.items()):
                if time.monotonic() - started > limit_s:
                    del running[connection]
                    _kill(process)
                    yield Done(job, Failure(f"not done after {limit_s:.0f} s"), time.monotonic() - started)
    finally:
        for _, process, _ in running.values():
            _kill(process)


def _start(work: Callable[[Job], Result], job: Job) -> tuple[Connection, BaseProcess]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(work, job, sender))
    process.start()
    sender.close()
    return receiver, process


def _work(work: Callable[[Job], Result], job: Job, sender: Connection) -> None:
    os.setsid()  # a group of its own, with the programs that it runs
    result: Result | Failure
    try:
        result = work(job)
    except Exception as error:
        result = Failure(_reason(error))
    sender.send(result)


def _reason(error: BaseException) -> str:
    """What an error says, and what the error says that it was raised from: the compiler's own words are at the end of a chain."""
    reason = f"{type(error).__name__}: {error}"
    return reason if error.__cause__ is None else f"{reason}\nfrom {_reason(error.__cause__)}"


def _received(connection: Connection, process: BaseProcess) -> Any:
    try:
        result = connection.recv()
    except EOFError:
        result = None
    process.join()
    return Failure(f"the process ended with {process.exitcode}") if result is None else result


def _kill(process: BaseProcess) -> None:
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
