"""``python -m q_triton.aot``: what it compiles, what it writes, and when it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from q_triton.aot import __main__ as command
from q_triton.aot.gate import Checked
from q_triton.aot.resources import Resources

ONE = ("--op", "silu_and_mul", "--target", "sm_90", "--workers", "1")


def test_figures_and_faults_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(variant: Any) -> Checked:
        return Checked(Resources(40, 0, 0, 16, 0), ("it is slow",) if "BLOCK_T=8" in variant.label else ())

    monkeypatch.setattr(command, "check", check)
    output = tmp_path / "aot" / "report.json"
    assert command.main([*ONE, "--output", str(output)]) == 1
    printed = capsys.readouterr().out
    assert "FAULT: it is slow\n    of silu_and_mul, 65536 rows of 128, bf16" in printed
    assert "1 of 3 compilations are at fault" in printed
    report = json.loads(output.read_text())["variants"]
    assert [one["faults"] for one in report].count(["it is slow"]) == 1
    assert {one["registers"] for one in report} == {40}
    assert {one["target"] for one in report} == {"sm_90"}


def test_a_compilation_that_fails_is_a_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def check(variant: Any) -> Checked:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(command, "check", check)
    assert command.main(ONE) == 1
    assert "FAULT: RuntimeError: no such instruction" in capsys.readouterr().out


def test_the_snapshot_is_held_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    registers = 40
    monkeypatch.setattr(command, "check", lambda variant: Checked(Resources(registers, 0, 0, 16, 0), ()))
    path = tmp_path / "registers.json"
    assert command.main(["--workers", "1", "--snapshot", str(path), "--update"]) == 0
    assert command.main([*ONE, "--snapshot", str(path)]) == 0
    registers = 41
    capsys.readouterr()
    assert command.main([*ONE, "--snapshot", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "silu_and_mul_kernel (2 bf16; BLOCK_T=1 BLOCK_N=1024; 4 warps) on sm_90: 40 → 41 registers" in printed
    assert "3 differences" in printed
    assert "nox -s kernels-aot -- --update" in printed


def test_the_snapshot_of_another_triton_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "check", lambda variant: Checked(Resources(40, 0, 0, 16, 0), ()))
    path = tmp_path / "registers.json"
    path.write_text('{"triton": "3.0.0", "kernels": {}}')
    assert command.main([*ONE, "--snapshot", str(path)]) == 0
    assert "is of Triton 3.0.0" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--update"], ["--update", "--snapshot", "x.json", "--op", "rms_norm"]])
def test_an_update_is_of_everything(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(options) == 2
    assert "--update needs --snapshot, and everything" in capsys.readouterr().err


def test_interpreted_kernels_are_not_compiled() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run([sys.executable, "-m", "q_triton.aot"], env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "unset TRITON_INTERPRET" in ended.stderr


def test_it_compiles() -> None:
    assert command.main(["--kernel", "silu", "--target", "gfx942"]) == 0
