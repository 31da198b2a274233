"""What only a fresh process shows: imports, environment variables, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("Q_BACKENDS", "Q_FALLBACK")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=clean | environment, timeout=120, check=False
    )


def test_import_loads_no_backend_and_not_even_torch() -> None:
    code = "import sys, q_core; assert 'torch' not in sys.modules; print(q_core.__version__)"
    assert run("-c", code).returncode == 0


def test_import_of_the_ops_loads_no_backend_and_allocates_no_tensor() -> None:
    code = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
class NoTensors(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f'importing called {function}')
with NoTensors():
    from q_core import ops, use_backends, explain
    import q_core.registry
assert q_core.registry._registry is None
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


CALL = "import torch; from q_core import ops; ops.silu_and_mul(torch.ones(2, 4))"


def test_q_backends_selects() -> None:
    assert run("-c", CALL, Q_BACKENDS="reference").returncode == 0
    failed = run("-c", CALL, Q_BACKENDS="q_nonesuch,reference")
    assert failed.returncode == 1 and "backend 'q_nonesuch' is not installed" in failed.stderr


def test_q_fallback() -> None:
    refused = run("-c", CALL, Q_BACKENDS="reference", Q_FALLBACK="error")
    assert refused.returncode == 1 and "Q_FALLBACK=error refuses the reference" in refused.stderr
    wrong = run("-c", CALL, Q_FALLBACK="maybe")
    assert wrong.returncode == 1 and "Q_FALLBACK is 'maybe', expected one of: allow, error" in wrong.stderr


def test_doctor() -> None:
    done = run("-m", "q_core.cli", "doctor", "--json")
    report = json.loads(done.stdout)
    reference = next(b for b in report["backends"] if b["name"] == "reference")
    assert reference["state"] == "available" and set(reference["ops"]) == set(report["ops"])
    assert report["surface_version"] == 1 and report["device"] == "cpu"
    text = run("-m", "q_core.cli", "doctor")
    assert text.returncode == done.returncode == 0
    assert "reference (q-core" in text.stdout and "paged_attention" in text.stdout


def test_explain_command() -> None:
    done = run("-m", "q_core.cli", "explain", "gemm_4bit", "--device", "cuda", "--dtype", "bfloat16")
    assert done.returncode == 0 and done.stdout.startswith("gemm_4bit on cuda: served by ")
    wrong = run("-m", "q_core.cli", "explain", "gemm_5bit")
    assert wrong.returncode == 2 and wrong.stderr.startswith("q-core: unknown op 'gemm_5bit'")
    assert "Traceback" not in wrong.stderr


def test_help_does_not_wait_for_torch() -> None:
    start = time.perf_counter()
    done = run("-X", "importtime", "-m", "q_core.cli", "--help")
    elapsed = time.perf_counter() - start
    assert done.returncode == 0 and "doctor" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.endswith(" torch")]
    assert elapsed < 5, "far above what it takes, for a busy machine"


@pytest.mark.skipif(os.name == "nt", reason="pipes of a shell")
def test_a_reader_that_has_enough_is_no_fault() -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m q_core.cli ops --json | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "[\n" and not done.stderr


@pytest.mark.parametrize("threads", [8])
def test_first_calls_from_many_threads_load_the_registry_once(threads: int) -> None:
    code = f"""
import threading, torch, q_core.registry as r
from q_core import ops
made = []
original = r.Registry.__init__
def counted(self, *a, **k):
    made.append(self); original(self, *a, **k)
r.Registry.__init__ = counted
barrier = threading.Barrier({threads}); errors = []
def work():
    barrier.wait()
    try: ops.silu_and_mul(torch.ones(2, 4))
    except Exception as e: errors.append(e)
ts = [threading.Thread(target=work) for _ in range({threads})]
[t.start() for t in ts]; [t.join() for t in ts]
assert len(made) == 1 and not errors, (made, errors)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
