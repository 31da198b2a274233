"""What a benchmark says of a measurement: which peer counts, and whether a target is met."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import report
from benchmarks.case import Call, Case, Target, Work
from benchmarks.clock import milliseconds
from benchmarks.record import measure


def lasting(seconds: float) -> Call:
    return lambda _: time.sleep(seconds)


def case(**settings: Any) -> Case:
    return Case("op", "1 × 1", "float32", lasting(0.004), {"slow": lasting(0.040), "quick": lasting(0.012)}, **settings)


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
    ],
)
def test_target(target: Target, threads: int, met: bool | None) -> None:
    record = measure(case(target=target, work=Work("read", 1)), threads, yardstick(0.5))
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
        "op", "shape", "dtype", "threads", "ours_ms", "peer", "peer_ms", "ratio", "bound", "bound_fraction", "target", "met",
    ]  # fmt: skip
    page = report.markdown(records, ["a machine"])
    assert "| op | 1 × 1, float32 | 1 |" in page and "**no**" in page and "- a machine" in page
