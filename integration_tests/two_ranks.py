"""Tests whose bodies run in two processes joined by gloo; this file is the processes' program too.

A test module imports ``two_ranks`` and ``on_two_ranks``; a function marked with the latter is a test that fails if it raises in either
process. The two live for the whole module, because starting one takes seconds, and are replaced after a test that they didn't answer in
time.
"""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

SECONDS_TO_START = 180
SECONDS_A_TEST = 60
SECONDS_A_COLLECTIVE = 20


class TwoRanks:
    """Two processes that run the cases of a test module."""

    def __init__(self, module: Path) -> None:
        self.module = module
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = Path(self.folder.name, "store")
        with Listener(("127.0.0.1", 0)) as listener:  # a port that is free
            listener._listener._socket.settimeout(SECONDS_TO_START)  # type: ignore[attr-defined]
            port = str(listener.address[1])
            program = [sys.executable, __file__, str(self.module), port]
            self.processes = [subprocess.Popen([*program, str(rank), store.as_uri()]) for rank in (0, 1)]
            accepted = [listener.accept() for _ in self.processes]
        if not all(connection.poll(SECONDS_TO_START) for connection in accepted):
            self.stop()
            pytest.fail("the two processes didn't find each other in time")
        self.connections = [connection for _, connection in sorted((c.recv(), c) for c in accepted)]

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.wait()
        if self.processes:
            self.folder.cleanup()
        self.processes, self.connections = [], []

    def run(self, case: str, arguments: dict[str, Any]) -> None:
        if not self.processes:
            self.start()
        deadline = time.monotonic() + SECONDS_A_TEST
        for connection in self.connections:
            connection.send((case, arguments))
        problems = []
        for rank, connection in enumerate(self.connections):
            try:
                answered = connection.poll(max(0, deadline - time.monotonic()))
                problem = connection.recv() if answered else "no answer in time"
            except (EOFError, ConnectionError):
                problem = "the process ended"
            if problem is not None:
                problems.append(f"rank {rank}: {problem}")
        if problems:
            self.stop()  # the ranks may be out of step now
            pytest.fail("\n".join(problems), pytrace=False)


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest) -> Iterator[TwoRanks]:
    ranks = TwoRanks(request.path)
    yield ranks
    ranks.stop()


def on_two_ranks(case: Callable[..., None]) -> Callable[..., None]:
    """Make a test of a function that is to run in both processes; its arguments come from parametrization and fixtures."""

    def test(two_ranks: TwoRanks, **arguments: Any) -> None:
        two_ranks.run(case.__name__, arguments)

    parameters = [inspect.Parameter("two_ranks", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += inspect.signature(case).parameters.values()
    test.__name__, test.__doc__ = case.__name__, case.__doc__
    test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    test.case = case  # type: ignore[attr-defined]
    return test


def serve(path: str, port: int, rank: int, store: str) -> None:
    """Run the cases of a module that the test process asks for, until it is gone."""
    torch.set_num_threads(1)
    with Client(("127.0.0.1", port)) as connection:
        module = _module_at(path)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS_A_COLLECTIVE))
        connection.send(rank)
        while True:
            try:
                name, arguments = connection.recv()
            except EOFError:
                return
            try:
                torch.manual_seed(0)
                getattr(module, name).case(**arguments)
                dist.barrier()  # a rank that was left waiting, or a collective too many, shows here
                connection.send(None)
            except Exception:
                connection.send(traceback.format_exc())


def _module_at(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cases", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cases"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
