"""Jobs in processes of their own: results, errors, crashes and hangs, each told from the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from q_triton.aot.processes import Failure, in_processes


def work(job: str) -> int:
    match job:
        case "raise":
            raise ValueError("it is wrong") from KeyError("where")
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
    return len(job)


def test_each_job_ends_in_its_own_way() -> None:
    jobs = ["a", "raise", "hang", "crash", "bcd"]
    done = {one.job: one for one in in_processes(work, jobs, workers=2, limit_s=2)}
    assert {job: one.result for job, one in done.items()} == {
        "a": 1,
        "bcd": 3,
        "raise": Failure("ValueError: it is wrong\nfrom KeyError: 'where'"),
        "crash": Failure(f"the process ended with -{int(signal.SIGKILL)}"),
        "hang": Failure("not done after 2 s"),
    }
    assert 2 <= done["hang"].seconds < 60


def test_no_job_no_process() -> None:
    assert not list(in_processes(work, [], workers=2, limit_s=1))


def test_what_a_job_runs_is_killed_with_it(tmp_path: Path) -> None:
    number = tmp_path / "pid"

    def run_a_program(job: str) -> None:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as program:
            number.write_text(str(program.pid))

    (one,) = in_processes(run_a_program, ["job"], workers=1, limit_s=2)
    assert one.result == Failure("not done after 2 s")
    assert ended(int(number.read_text()))


def ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not yet collected, soon."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False
