"""The snapshot of registers: as written so read, a line a variant, and every difference told."""

from __future__ import annotations

from pathlib import Path

from q_triton.aot import snapshot

BEFORE = {
    "b_kernel": {"2 bf16; 4 warps": {"sm_90": (32, 0), "gfx942": (24, 256)}},
    "a_kernel": {"bf16; 8 warps": {"sm_90": (40, 1024)}, "bf16; 4 warps": {"sm_90": (38, 0)}},
}


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "registers.json"
    snapshot.write(path, "3.7.1", BEFORE)
    assert snapshot.read(path) == ("3.7.1", BEFORE)
    lines = path.read_text().splitlines()
    assert lines[3:6] == ['"a_kernel": {', '  "bf16; 4 warps": {"sm_90": [38, 0]},', '  "bf16; 8 warps": {"sm_90": [40, 1024]}']


def test_nothing_compiled_is_a_snapshot(tmp_path: Path) -> None:
    snapshot.write(tmp_path / "registers.json", "3.7.1", {})
    assert snapshot.read(tmp_path / "registers.json") == ("3.7.1", {})


def test_what_is_the_same_is_no_difference() -> None:
    assert not list(snapshot.differences(BEFORE, BEFORE, partial=False))


def test_every_difference_is_told() -> None:
    now = {
        "b_kernel": {"2 bf16; 4 warps": {"sm_90": (34, 0), "gfx942": (24, 512)}},
        "a_kernel": {"bf16; 8 warps": {"sm_90": (40, 1024)}, "f32; 4 warps": {"sm_90": (30, 16)}},
    }
    same = [
        "a_kernel (f32; 4 warps) on sm_90: new, 30 registers, 16 bytes of shared memory",
        "b_kernel (2 bf16; 4 warps) on gfx942: 256 → 512 bytes of shared memory",
        "b_kernel (2 bf16; 4 warps) on sm_90: 32 → 34 registers",
    ]
    assert list(snapshot.differences(BEFORE, now, partial=True)) == same
    assert list(snapshot.differences(BEFORE, now, partial=False)) == ["a_kernel (bf16; 4 warps) on sm_90: gone", *same]
