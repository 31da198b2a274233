"""The registers and shared memory of every variant, as they were when someone last looked: a change shows in a review.

The file has a line a variant: ``[registers, bytes]`` by target. They are of one version of Triton; of another they say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

Figures = Mapping[str, Mapping[str, Mapping[str, tuple[int, int]]]]
"""Registers and shared bytes, by kernel, label and target."""


def write(path: Path, triton: str, figures: Figures) -> None:
    """Write a snapshot: sorted, a line a variant."""
    kernels = (f"{json.dumps(kernel)}: {{\n{_lines(figures[kernel])}\n}}" for kernel in sorted(figures))
    path.write_text(f'{{\n"triton": {json.dumps(triton)},\n"kernels": {{\n' + ",\n".join(kernels) + "\n}\n}\n")


def _lines(labels: Mapping[str, Mapping[str, tuple[int, int]]]) -> str:
    return ",\n".join(f"  {json.dumps(label)}: {json.dumps(labels[label])}" for label in sorted(labels))


def read(path: Path) -> tuple[str, Figures]:
    """The version of Triton and the figures of a snapshot."""
    data = json.loads(path.read_text())
    return data["triton"], {
        kernel: {label: {target: tuple(pair) for target, pair in by_target.items()} for label, by_target in labels.items()}
        for kernel, labels in data["kernels"].items()
    }


def differences(before: Figures, now: Figures, *, partial: bool) -> Iterator[str]:
    """What changed, in words.

    Args:
        before: of the snapshot.
        now: as compiled.
        partial: not everything was compiled, so what isn't there needn't be gone.
    """
    old, new = _flat(before), _flat(now)
    for place in sorted(old | new):
        if place not in new:
            if not partial:
                yield f"{_words(place)}: gone"
        elif place not in old:
            yield f"{_words(place)}: new, {new[place][0]} registers, {new[place][1]} bytes of shared memory"
        elif old[place] != new[place]:
            pairs = zip(("registers", "bytes of shared memory"), old[place], new[place], strict=True)
            yield f"{_words(place)}: " + ", ".join(f"{a} → {b} {what}" for what, a, b in pairs if a != b)


def _flat(figures: Figures) -> dict[tuple[str, str, str], tuple[int, int]]:
    return {
        (kernel, label, target): pair
        for kernel, labels in figures.items()
        for label, by_target in labels.items()
        for target, pair in by_target.items()
    }


def _words(place: tuple[str, str, str]) -> str:
    kernel, label, target = place
    return f"{kernel} ({label}) on {target}"
