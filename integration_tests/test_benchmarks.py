"""What a benchmark says of a measurement: which peer counts, and whether a target is met."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_clock, gpu_page, report
from benchmarks.case import Call, Case, Check, Target, Work
from benchmarks.cases import modules
from benchmarks.clock import milliseconds
from benchmarks.gpu_cases import FAMILIES
from benchmarks.gpu_cases.sizes import small
from benchmarks.optimizer_settings import SETTINGS
from benchmarks.record import Record, measure
from q_core.optimizers import RULES


def lasting(seconds: float) -> Call:
    return lambda _: time.sleep(seconds)


def case(**settings: Any) -> Case:
    return Case("op", "1 × 1", "float32", lasting(0.004), {"slow": lasting(0.040), "quick": lasting(0.012)}, **settings)


def clock(contenders: Any, sets: int, seconds: float) -> dict[str, float]:
    return {"ours": 4.0, "slow": 40.0, "quick": 12.0}


def yardstick(fraction: float) -> Any:
    return SimpleNamespace(fraction=lambda work, ms: fraction)


@pytest.mark.parametrize(
    ("target", "threads", "met"),
    [
        (Target(), 1, None),
        (Target(ratio=1.5), 1, True),
        (Target(ratio=6), 1, False),
        (Target(ratio=6, peers=("slow",)), 1, True),
        (Target(ratio=1.5, ratio_of_all=6), 1, True),
        (Target(ratio=1.5, ratio_of_all=6), 2, False),
        (Target(fraction=0.4), 1, True),
        (Target(fraction=0.6), 1, False),
        (Target(fraction=0.6), 2, None),
        (Target(ratio=1.5, fraction=0.6), 1, False),
        (Target(ratios={"slow": 6, "quick": 1.5}), 1, True),
        (Target(ratios={"slow": 6, "quick": 6}), 1, False),
        (Target(ratios={"one that isn't there": 6}), 1, None),
        (Target(rate=2e9), 1, True),
        (Target(rate=2e12), 1, False),
    ],
)
def test_target(target: Target, threads: int, met: bool | None) -> None:
    record = measure(case(target=target, work=Work("read", 10**7)), threads, yardstick(0.5), clock)
    assert record.met is met
    assert record.peer == ("slow" if target.peers else "quick")
    assert (
        record.ratio is not None and record.peer_ms is not None and record.ratio == pytest.approx(record.peer_ms / record.ours_ms)
    )
    assert record.bound == "read" and record.bound_fraction == 0.5


def test_no_contender_finds_the_inputs_of_the_one_before_in_cache() -> None:
    taken: list[tuple[str, int]] = []
    contenders: dict[str, Call] = {name: (lambda i, name=name: taken.append((name, i))) for name in "abc"}
    milliseconds(contenders, 6)
    turns = [dict(taken[i : i + 3]) for i in range(3, len(taken), 3)]
    assert all(len(set(turn.values())) == 3 for turn in turns)
    assert {turn["a"] for turn in turns} == set(range(6))


def test_records_are_written_for_people_and_for_programs(tmp_path: Path) -> None:
    records = [measure(case(target=Target(ratio=6)), 1, yardstick(0.5))]
    report.write_json(records, tmp_path / "deep" / "cpu.json")
    (written,) = json.loads((tmp_path / "deep" / "cpu.json").read_text())
    assert list(written) == [
        "op", "shape", "dtype", "threads", "ours_ms", "peer", "peer_ms", "peers_ms", "ratio", "bound", "bound_fraction", "target", "met",
        "rate", "error", "stretch", "stretched",
    ]  # fmt: skip
    page = report.ops_page(records, ["a machine"])
    assert "| op | 1 × 1, float32 | 1 |" in page and "**no**" in page and "- a machine" in page


def modules_records() -> list[Record]:
    peers = {"bitsandbytes": 12.0, "torch bf16": 4.0}
    return [
        Record(
            op,
            f"{tokens} × 4096²",
            "bfloat16",
            threads,
            2.0,
            "torch bf16",
            4.0,
            peers,
            2.0,
            None,
            None,
            "1.2× the best peer",
            True,
            None,
            None,
            "",
            None,
        )
        for op in ("LinearNF4, forward", "LinearNF4, forward and backward")
        for tokens in (1, 16, 2048)
        for threads in (1, 2)
    ]


def test_every_peer_of_a_module_is_on_its_page_and_in_the_summary() -> None:
    records = modules_records()
    page = report.modules_page(records, ["a machine"])
    assert page.count("## LinearNF4, forward") == 2 and "- a machine" in page
    rows = [line for line in page.splitlines() if line.startswith(("| 1 |", "| 16 |", "| 2048 |"))]
    assert len(rows) == len(records) == 12
    assert rows[3] == "| 16 | 2 | 2 | 12 | 4 | 6.00 | 2.00 | 1.2× the best peer | yes |"
    assert report.modules_summary(records) == [
        "| × bitsandbytes · torch bf16 | 1 token | 16 tokens |",
        "| --- | --- | --- |",
        "| LinearNF4, forward | 6.0 · 2.0 | 6.0 · 2.0 |",
        "| LinearNF4, forward and backward | 6.0 · 2.0 | 6.0 · 2.0 |",
    ]


def test_modules_are_made_and_called_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "SIDE", 128)
    monkeypatch.setattr(modules, "TOKENS", (1, 3))
    monkeypatch.setattr(modules, "sets_for", lambda size: 2)
    with torch.inference_mode():
        cases = list(modules.cases())
        assert len(cases) == 2 * 2 * len(modules.KINDS)
        for made in cases:
            kind = next(kind for kind in modules.KINDS if made.op.rpartition(",")[0] == kind.name)
            calls = {"ours": made.ours, **made.peers}
            assert set(made.peers) == {"torch bf16"} | ({"bitsandbytes"} if kind.theirs else set())
            results = {name: call(1) for name, call in calls.items()}
            if made.op.endswith("backward"):
                assert all(len(found) == (3 if kind.rank else 1) for found in results.values())
                results = {name: found[0] for name, found in results.items()}
            exact = results["torch bf16"].float()
            for result in results.values():
                assert (result.float() - exact).norm() < 0.2 * exact.norm(), made.op


@pytest.mark.parametrize(("error", "met", "stretched"), [(0.01, True, True), (0.02, False, None), (float("nan"), False, None)])
def test_a_wrong_result_meets_nothing(error: float, met: bool, stretched: bool | None) -> None:
    made = case(target=Target(ratio=1.5), stretch=Target(ratio=1.6), check=Check(lambda: error, allowed=0.01))
    record = measure(made, 1, yardstick(0.5), clock)
    assert record.met is met and record.stretched is stretched


@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_cases_are_made_and_called_as_they_are_measured(family: str) -> None:
    with torch.inference_mode():
        for made in FAMILIES[family](small(torch.device("cpu"))):
            where = f"{made.op}, {made.shape}"
            assert made.check is None or made.check.error() <= made.check.allowed, where
            assert set(made.launched) <= {"ours", *made.peers}, where
            for call in (made.ours, *made.peers.values()):
                call(made.sets - 1)


def test_runs_on_a_gpu_are_kept_and_shown(tmp_path: Path) -> None:
    record = measure(case(target=Target(ratios={"quick": 6}), work=Work("matrix", 10**9)), 1, yardstick(0.5), clock)
    runs = [gpu_page.Run(date, ["a GPU", "versions"], [record]) for date in ("2026-01-01", "2026-01-02")]
    path = tmp_path / "deep" / "gpu.json"
    assert gpu_page.read(path) == []
    gpu_page.write(runs, path)
    assert gpu_page.read(path) == runs
    page = gpu_page.page(runs)
    assert page.index("## 2026-01-02: a GPU") < page.index("## 2026-01-01: a GPU")
    assert page.count("| op | 1 × 1, float32 |") == 2 and "TFLOP/s | 50% matrix |" in page and "6× quick | **no** |" in page


class PlayedEvent:
    """A device's event, by this machine's clock."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: PlayedEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


def test_times_of_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A device is played: each contender is measured over all sets, in a replayed graph where it can be captured; a broken peer goes."""
    replayed = []

    def captured(function: Any, device: torch.device) -> tuple[Any, None]:
        called.clear()
        function()
        if "waiting" in called:
            raise RuntimeError("operation not permitted when stream is capturing")
        return (lambda: replayed.append(function())), None

    called: set[str] = set()
    sets_seen = set()

    def ours(i: int) -> None:
        sets_seen.add(i)
        time.sleep(0.001)

    def waiting(i: int) -> None:
        called.add("waiting")
        time.sleep(0.003)

    def broken(i: int) -> None:
        raise ValueError("no kernel image")

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=PlayedEvent))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(gpu_clock, "can_capture", lambda device: True)
    monkeypatch.setattr(gpu_clock, "captured", captured)
    clock = gpu_clock.DeviceClock(torch.device("cuda", 0), launched=["launched"])
    times = clock({"ours": ours, "waiting": waiting, "broken": broken, "launched": ours}, 3, 0.05)
    assert times.keys() == {"ours", "waiting", "launched"} and sets_seen == {0, 1, 2}
    assert 1 <= times["ours"] < times["waiting"] and replayed
    printed = capsys.readouterr().err
    assert "broken isn't measured: ValueError" in printed and "stream is capturing" in printed
    with pytest.raises(ValueError, match="no kernel image"):
        clock({"ours": broken}, 3, 0.05)


def test_every_optimizer_rule_is_measured() -> None:
    assert SETTINGS.keys() == RULES.keys()
