"""What `python -m gpu` plans and how it runs it, on a machine without a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_cases import FAMILIES
from gpu import plan
from gpu.__main__ import table
from gpu.plan import Job, Setting, jobs
from gpu.running import run_all
from q_core.specs import RECORDS

HERE = Path(__file__).parent
SETTING = Setting("python", "cuda:0", "q_cuda", Path("out"), Path("scratch"))


def test_every_op_family_and_test_has_a_job() -> None:
    names = {job.name for job in jobs(list(plan.STEPS), SETTING)}
    assert {f"conformance:{op}" for op in RECORDS if not op.endswith("pack_weight")} <= names
    assert {f"bench:{family}" for family in FAMILIES} <= names
    assert {f"tests:{path.stem.removeprefix('test_')}" for path in (HERE / "gpu").glob("test_*.py")} <= names
    assert {"doctor", "demo"} <= names


def test_a_part_of_a_step() -> None:
    (op,) = jobs(["conformance:gemm_4bit"], SETTING)
    assert list(op.arguments)[-1] == "gemm_4bit" and "cuda:0" in op.arguments and op.together
    family, *tests = jobs(["bench:moe", "tests"], SETTING)
    assert "moe" in family.arguments and not family.together and len(tests) == len(plan.TESTS)


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step 'benchmark:moe' is unknown, expected of: doctor, conformance"):
        jobs(["benchmark:moe"], SETTING)


def test_what_a_job_does_stops_no_other(tmp_path: Path) -> None:
    def job(name: str, code: str, seconds: float = 60, *, together: bool = False) -> Job:
        return Job(name, ["-c", code], seconds, together=together)

    patient = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(50)'])"
    given = [
        job("good", "import os; print('one'); print(os.environ['COLOUR'])"),
        job("bad", "print('about to'); raise SystemExit(3)", together=True),
        job("slow", patient, 1.0, together=True),
        job("after", "print('still here')"),
    ]
    start = time.monotonic()
    log = tmp_path / "log.txt"
    results = list(run_all(given, python=sys.executable, environment={"COLOUR": "blue"}, log=log, at_once=2, within=60))
    assert time.monotonic() - start < 40
    assert [(result.name, result.status) for result in results] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("slow", "timed out"),
        ("after", "passed"),
    ]
    assert [result.summary for result in results] == ["blue", "about to", "", "still here"]
    assert results[0].tail == [] and results[1].tail == ["about to"]
    assert "==== bad: failed" in log.read_text() and "one\nblue" in log.read_text()
    assert "timed out" in table(results)


def test_the_time_for_all_jobs_is_kept(tmp_path: Path) -> None:
    slow = Job("slow", ["-c", "import time; time.sleep(50)"], 60)
    results = list(run_all([slow, slow], python=sys.executable, environment={}, log=tmp_path / "log.txt", at_once=1, within=0.5))
    assert [result.status for result in results] == ["timed out", "not run"]
