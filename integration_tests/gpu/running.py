"""Runs jobs, each with its time limit; what one of them does stops none of the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Literal

from gpu.plan import ROOT, Job

TAIL = 40
"""Lines of a job's output that its result keeps; the log has them all."""


Status = Literal["passed", "failed", "timed out", "not run"]


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended.

    Attributes:
        name: the job's.
        status: by its exit code, or a time limit; "not run" where the time for all jobs was over before.
        seconds: that it took.
        summary: the last line that it printed.
        tail: the end of its output, where it didn't pass.
    """

    name: str
    status: Status
    seconds: float
    summary: str
    tail: list[str]


def run_all(
    jobs: Sequence[Job], *, python: str, environment: Mapping[str, str], log: Path, at_once: int, within: float
) -> Iterator[Result]:
    """Run jobs in their order, those that may together ``at_once``.

    Args:
        jobs: what to run.
        python: what runs them.
        environment: variables that they get beside this process's.
        log: file that gets their whole output, job by job.
        at_once: how many that may run together do.
        within: seconds for all of them.

    Yields:
        Each one's result, once it and those before it have ended.
    """
    deadline = time.monotonic() + within
    with log.open("w") as file:
        for together, group in groupby(jobs, key=lambda job: job.together):
            with ThreadPoolExecutor(at_once if together else 1) as pool:
                for result, output in pool.map(lambda job: _run(job, python, {**os.environ, **environment}, deadline), group):
                    _note(file, result, output)
                    yield result


def _run(job: Job, python: str, environment: Mapping[str, str], deadline: float) -> tuple[Result, str]:
    start = time.monotonic()
    if start >= deadline:
        return Result(job.name, "not run", 0.0, "", []), ""
    process = subprocess.Popen(
        [python, *job.arguments], cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=min(job.seconds, deadline - start))
        status: Status = "failed" if process.returncode else "passed"
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started, such as a server
        output, _ = process.communicate()
        status = "timed out"
    lines = output.splitlines()
    summary = next((line.strip() for line in reversed(lines) if line.strip()), "")
    seconds = round(time.monotonic() - start, 1)
    return Result(job.name, status, seconds, summary, [] if status == "passed" else lines[-TAIL:]), output


def _note(file: IO[str], result: Result, output: str) -> None:
    file.write(f"==== {result.name}: {result.status}, {result.seconds} s\n{output}\n")
    file.flush()
