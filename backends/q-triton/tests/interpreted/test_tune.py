"""Tuning with a timer that is made up: what it says is chosen, kept, and used by the next process; what is no such file is not."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from q_triton import norm, tiles, tune, tuned
from q_triton.launch import Launch, recorded
from q_triton.representative import Example, Values
from q_triton.tiles import Tile, tile
from q_triton.tune import Answers, Question, Run

CPU = torch.device("cpu")
NARROW, WIDE, DEEP = (tile(BLOCK_H=width, warps=2, stages=stages) for width, stages in ((8, 1), (16, 1), (8, 3)))
ROTARY = Question(norm.ROTARY, 0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("Q_TRITON_CACHE", str(tmp_path / "cache"))
    # Of targets that nobody interprets for: what tuning tries, and no call gets.
    monkeypatch.setattr(tiles, "_tables", {"sm_998": {"rotary": (WIDE,)}, "sm_999": {"rotary": (DEEP,)}})
    tiles._source.cache_clear()
    tuned.tuned_tiles.cache_clear()
    yield
    tiles._source.cache_clear()
    tuned.tuned_tiles.cache_clear()


def call() -> dict[str, Any]:
    values = Values("cpu")
    table, heads = values.uniform(4, 8), values.normal(1, 1, 16)
    return {"q_THD": heads, "k_TGD": heads, "positions": torch.zeros(1).long(), "cos": table, "sin": table, "interleaved": False}


def used() -> Tile:
    """The tile that a call gets."""
    (choice,) = tune.asked(lambda: norm.rotary_embedding(**call())).values()
    return choice


def timed(times: dict[Tile, float | Exception], monkeypatch: pytest.MonkeyPatch) -> dict[Question, Answers]:
    """What is found where calls take as long as ``times`` says of the tile that their kernel is launched with, or fail as it says."""
    monkeypatch.setattr(tune, "examples", lambda values, ops: [Example("rotary_embedding", "small", call())])
    blocks = {(choice.blocks["BLOCK_H"], choice.stages): took for choice, took in times.items()}

    def timer(run: Run) -> float:
        launches: list[Launch] = []
        with recorded(launches.append):
            run()
        (took,) = {blocks[launch.tile.blocks["BLOCK_H"], launch.tile.stages] for launch in launches}
        if isinstance(took, Exception):
            raise took
        return took

    return tune.answer(Values("cpu"), ["rotary_embedding"], timer, report=lambda line: None)


@pytest.mark.parametrize("best", [NARROW, WIDE, DEEP])
def test_the_timer_decides(best: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed({choice: 1.0 if choice == best else 2.0 for choice in (NARROW, WIDE, DEEP)}, monkeypatch)
    assert tune.table_of(found) == {"rotary": [best]}


def test_what_fails_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    too_large, broken = OutOfResources(300000, 232448, "shared memory"), RuntimeError("PassManager failed\n...")
    found = timed({NARROW: 2.0, WIDE: too_large, DEEP: broken}, monkeypatch)
    assert tune.table_of(found) == {"rotary": [NARROW]}
    first, *skipped = tune.lines_of(found)
    assert first == "rotary: BLOCK_H=8 2 warps 1 stages"
    assert "BLOCK_H=16" in skipped[0] and "shared memory" in skipped[0]
    assert skipped[1].endswith("PassManager failed")


def test_a_lost_device_is_no_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.AcceleratorError):
        timed({NARROW: torch.AcceleratorError("illegal memory access"), WIDE: 1.0, DEEP: 1.0}, monkeypatch)


def test_nothing_is_kept_where_no_tile_works(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed(dict.fromkeys((NARROW, WIDE, DEEP), RuntimeError("no")), monkeypatch)
    assert tune.table_of(found) == {}
    assert tune.lines_of(found)[0] == "rotary: no tile works, the tables' stay"


def test_a_gain_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.lines_of(timed({NARROW: 3.0, WIDE: 2.0, DEEP: 4.0}, monkeypatch)) == [
        "rotary: BLOCK_H=16 2 warps 1 stages, 1.50 times as fast as BLOCK_H=8 2 warps 1 stages"
    ]


def test_calls_count_alike_however_long_they_take() -> None:
    found = Answers(NARROW)
    found.times[NARROW] = [100.0, 2.0]
    found.times[WIDE] = [101.0, 1.0]
    assert found.best() == WIDE


def test_a_tile_is_for_every_size_up_to_the_one_it_was_measured_at() -> None:
    kernel = norm.RMS_NORM
    best = {512: NARROW, 1024: NARROW, 4096: WIDE, 16384: DEEP}
    found = {Question(kernel, size): Answers(NARROW, {choice: [1.0]}) for size, choice in best.items()}
    assert tune.table_of(found) == {"rms_norm": [tile(BLOCK_H=8, warps=2, up_to=1024), tile(BLOCK_H=16, warps=2, up_to=4096), DEEP]}


def test_only_tiles_that_are_for_the_size_are_tried() -> None:
    assert [choice.blocks["BLOCK_K"] for choice in Question(norm.RMS_NORM, 1024).candidates] == [1024, 4096, 8192]


def test_a_file_is_used_from_the_next_call_on_and_by_a_new_process() -> None:
    assert used() == NARROW
    path = tuned.write(CPU, {"rotary": [WIDE]})
    tiles._source.cache_clear()
    assert used() == WIDE
    code = "import torch; from q_triton import norm; print(norm.ROTARY.on(torch.device('cpu')).blocks['BLOCK_H'])"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (again.stdout.strip(), again.stderr) == ("16", "")
    assert json.loads(path.read_text())["device"] == tuned.device_name(CPU)


def test_the_command_measures_keeps_and_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "register_tables", lambda: None)
    found = timed({NARROW: 3.0, WIDE: 2.0, DEEP: 4.0}, monkeypatch)
    monkeypatch.setattr(tune, "answer", lambda values, ops, timer: found)
    tuned.write(CPU, {"silu_and_mul": [tile(BLOCK_T=2, BLOCK_N=512)], "rotary": [DEEP]})
    assert tune.main(["--op", "rotary_embedding"]) == 0
    assert "1.50 times as fast" in capsys.readouterr().out
    assert tuned.tuned_tiles(CPU) == {"silu_and_mul": [tile(BLOCK_T=2, BLOCK_N=512)], "rotary": [WIDE]}
    assert tune.main(["--op", "no_such_op"]) == 2
    assert "rotary_embedding" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "no 'kernels'"),
        ('{"kernels": {"rotary": 3}}', "expected a list of tiles"),
        ('{"kernels": {"rotary": [{"blocks": 3}]}}', "is no tile"),
        ('{"kernels": {"rotary": [{"blocks": {"BLOCK_H": 8}, "warps": 2, "stages": 1, "up_to": 7}]}}', "null for the last"),
        ('{"kernels": {"rotary": [{"blocks": {"BLOCK": 8}, "warps": 2, "stages": 1, "up_to": null}]}}', "no such blocks as BLOCK"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_ignored(text: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tuned.write(CPU, {"rotary": [WIDE]})
    path.write_text(text)
    tiles._source.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert used() == NARROW
        assert used() == NARROW
    (record,) = caplog.records
    assert str(path) in record.message and reason in record.message and "q_triton.tune" in record.message
