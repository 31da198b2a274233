"""The suite from outside: what it makes of right, wrong, declining and absent backends, and of a test file that cheats."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.backend import Availability, Backend, impl
from q_core.cli import main
from q_core.testing import Capabilities, family_module, installed_backends
from q_core.testing.report import Report, conformance


@impl
def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype).contiguous()


def report_of(function: Callable[..., Any], **declared: Any) -> Report:
    with family_module("made_up_family", function) as family:
        backend = Backend(
            name="made_up", device_types=("cpu",), surface_version=1, priority=5,
            probe=lambda: Availability(True, "made up"), families=(family,),
        )  # fmt: skip
        with installed_backends(backend):
            return conformance(Capabilities(backend="made_up", examples=5, **declared))


def test_a_right_backend_passes() -> None:
    report = report_of(silu_and_mul)
    (result,) = report.ops
    assert (result.op, result.state, result.declined, result.failures) == ("silu_and_mul", "pass", (), ())
    assert not report.failed and "gemm" in report.absent
    assert "1 passed, 0 declined, 0 failed" in str(report)


def test_a_wrong_one_fails_and_says_where() -> None:
    @impl
    def silu_and_mul(x: Tensor) -> Tensor:
        up, gate = x.float().chunk(2, -1)
        return (F.silu(gate) * up).to(x.dtype).contiguous()

    report = report_of(silu_and_mul)
    assert report.failed and report.ops[0].state == "failed"
    first = report.ops[0].failures[0]
    assert first.test == "test_samples" and re.match(r"silu_and_mul\(x=float32\[4, 64\]\): output 0 misses in", first.message)


def test_what_is_declined_is_not_failed() -> None:
    @impl(accepts=lambda x: None if x.dtype is torch.float32 else f"x is {x.dtype}; only float32")
    def silu_and_mul(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return (F.silu(gate) * up).contiguous()

    (result,) = report_of(silu_and_mul).ops
    assert result.state == "pass" and set(result.declined) == {
        "x is torch.bfloat16; only float32",
        "x is torch.float16; only float32",
    }

    @impl(accepts=lambda x: "never")
    def never(x: Tensor) -> Tensor:
        raise AssertionError("it declines everything")

    never.__name__ = "silu_and_mul"
    report = report_of(never)
    assert report.ops[0].state == "declined" and report.ops[0].declined == ("never",) and not report.failed


def test_a_known_failure_is_strict() -> None:
    report = report_of(silu_and_mul, known_failures={"test_opcheck[silu_and_mul]": "not yet"})
    assert [failure.test for failure in report.ops[0].failures] == ["test_opcheck"], "it passes, so the list is stale"
    unknown = report_of(silu_and_mul, known_failures={"test_speed[silu_and_mul]": "slow"})
    assert unknown.failures[0].test == "test_no_standard_test_is_overridden"
    with pytest.raises(ValueError, match="expected the reason why"):
        Capabilities(backend="x", known_failures={"test_opcheck[gemm]": " "})


def test_a_known_failure_is_reported_with_its_reason() -> None:
    @impl
    def silu_and_mul(x: Tensor) -> Tensor:
        gate, up = x.float().nan_to_num().chunk(2, -1)
        return (F.silu(gate) * up).to(x.dtype).contiguous()

    report = report_of(silu_and_mul, known_failures={"test_non_finite_values[silu_and_mul]": "NaN is dropped on this chip"})
    (result,) = report.ops
    assert (result.state, [failure.test for failure in result.known]) == ("pass", ["test_non_finite_values"])
    assert "test_non_finite_values: known to fail: NaN is dropped on this chip" in str(report)


def test_a_promised_op_that_got_lost_fails() -> None:
    report = report_of(silu_and_mul, ops=("silu_and_mul", "gemm"))
    assert [failure.test for failure in report.failures] == ["test_promised_ops_are_implemented"]


CLAIM = "from q_core.testing.suite import *\n\nCAPABILITIES = Capabilities(backend='reference')\n"


def run_pytest(folder: Path, *sources: str, only: str = "") -> str:
    """What pytest says of test files of these sources, one by one in one process, and "exit code …"."""
    files = [folder / f"test_vendor_{i}.py" for i in range(len(sources))]
    for file, source in zip(files, sources, strict=True):
        file.write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\n")
    chosen = ["-k", only] if only else ["--collect-only"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", str(folder / "pytest.ini"), "--continue-on-collection-errors", *chosen, *files],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return f"{done.stdout}\nexit code {done.returncode}"


def test_a_standard_test_may_not_be_overridden_or_removed(tmp_path: Path) -> None:
    cheats = {"test_agreement": "def test_agreement(): pass", "test_determinism": "del test_determinism", "target": "target = 1"}
    said = run_pytest(tmp_path, *(CLAIM + cheat for cheat in cheats.values()), only="overridden")
    for cheat in cheats:
        assert f"{cheat} is overridden or removed" in said, said
    assert "3 failed" in said and "exit code 1" in said


def test_a_standard_test_may_not_be_skipped_and_the_backend_is_named(tmp_path: Path) -> None:
    cheats = (
        "pytestmark = pytest.mark.skip(reason='later')",
        "pytestmark = [pytest.mark.xfail(reason='later')]",
        "test_opcheck = pytest.mark.skipif(True, reason='later')(test_opcheck)",
    )
    nameless = "from q_core.testing.suite import *\n"
    said = run_pytest(tmp_path, *(f"import pytest\n{CLAIM}{cheat}\n" for cheat in cheats), nameless)
    for i, mark in enumerate(("skip", "xfail", "skipif")):
        assert re.search(rf"test_vendor_{i}: test_\w+ is marked {mark}; a backend declines calls by its predicate", said), said
    assert 'test_vendor_3: CAPABILITIES is missing; write CAPABILITIES = Capabilities(backend="…")' in said
    assert "4 errors" in said


ACME = """
from q_core import Availability, Backend
from q_core.registry import Registry, Source, set_registry
from q_core.reference import backend as reference

acme = Backend("acme", ("cpu",), 1, 5, lambda: Availability(True, ""), families=("q_core.reference.attention",))
set_registry(Registry([Source("reference", "", lambda: reference), Source("acme", "", lambda: acme)], selected=None, fallback="allow"))
"""


def test_what_applies_to_no_op_is_not_collected(tmp_path: Path) -> None:
    """Nor skipped: the ops of the attention family have no gradient and quantize nothing."""
    (tmp_path / "conftest.py").write_text(ACME)
    said = run_pytest(tmp_path, CLAIM.replace("reference", "acme"))
    assert "exit code 0" in said
    assert "test_agreement[paged_attention]" in said and "test_vmap[paged_attention]" in said
    assert "test_vmap_of_what_is_mutated_raises[write_kv]" in said and "test_vmap[write_kv]" not in said
    for absent in ("test_gradients", "test_zero_encodes_to_zero", "NOTSET", "rms_norm"):
        assert absent not in said


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--backend", "reference", "--op", "silu_and_mul", "--examples", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [op["op"] for op in report["ops"]] == ["silu_and_mul"] and report["ops"][0]["state"] == "pass"
    assert main(["conformance", "--backend", "nonesuch"]) == 2
    assert "backend 'nonesuch' is not installed" in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("q_core.cli.conformance.find_spec", lambda name: None)
    assert main(["conformance", "--backend", "reference"]) == 2
    assert "pip install 'q-core[testing]'" in capsys.readouterr().err


def test_ops_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops"]) == 0
    assert "gemm_4bit" in capsys.readouterr().out
    assert main(["ops", "silu_and_mul"]) == 0
    assert capsys.readouterr().out.startswith("q::silu_and_mul(Tensor x) -> Tensor\n\nGated activation")
    assert main(["ops", "--json"]) == 0
    assert {"op", "schema", "neutral", "mutates", "contract"} <= set(json.loads(capsys.readouterr().out)[0])


def test_bench_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q_core.bench.dispatch.find_spec", lambda name: None)
    output = tmp_path / "bench" / "dispatch.json"
    assert main(["bench", "--repeats", "1", "--output", str(output)]) == 0
    assert "bitsandbytes is not installed" in capsys.readouterr().out
    measured = json.loads(output.read_text())["measurements"]
    assert {(m["layer"], m["mode"]) for m in measured} == {
        (layer, mode) for layer in ("bound", "public") for mode in ("inference_mode", "no_grad", "recording")
    }
    assert all(m["microseconds"] >= 0 for m in measured)
    assert {m["subject"] for m in measured if m["target"]} == {"q-core int8_gemm"}
