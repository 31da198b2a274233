"""``python -m q_triton.tune``: measure on this machine's own device which of all known tiles is best, and keep the answer.

A command on purpose, and nothing that a call does by itself: who measures must wait for the device, which a CUDA graph can't record,
and two runs of a program that measured for themselves may add up in different orders. So the choice is made once, and every process
after that reads it from a file (:mod:`q_triton.tuned`). Delete the file to have the tables back.

The representative calls are run with every tile that some table has for a kernel and the call's size. Of each kernel and size the tile wins
whose calls take the least time, in the geometric mean.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import triton.testing
from triton.errors import TritonError

from q_triton.aot.variants import register_tables
from q_triton.environment import interpreted
from q_triton.implementations import call, declined, implementations
from q_triton.representative import Values, examples
from q_triton.tiles import KERNELS, Table, Tile, Tiles, chosen_by
from q_triton.tuned import device_name, tuned_tiles, write

Run = Callable[[], object]
Timer = Callable[[Run], float]
"""Measures a call; in milliseconds, though only ratios count."""


def median_ms(run: Run) -> float:
    """The median of many runs on the device, each with cold caches."""
    return float(triton.testing.do_bench(run, return_mode="median"))


@dataclass(frozen=True, slots=True)
class Question:
    """Which tile a kernel should have for calls of a size."""

    tiles: Tiles
    size: int

    @property
    def candidates(self) -> list[Tile]:
        return [choice for choice in self.tiles.known() if choice.is_for(self.size)]

    def __str__(self) -> str:
        return self.tiles.kernel + (f", {self.size} {self.tiles.size}" if self.tiles.size else "")


@dataclass(slots=True)
class Answers:
    """What was measured for a question.

    Attributes:
        times: of each candidate, a call after another.
        skipped: why a candidate failed.
        before: the tile that calls get so far.
    """

    before: Tile
    times: dict[Tile, list[float]] = field(default_factory=lambda: defaultdict(list))
    skipped: dict[Tile, str] = field(default_factory=dict)

    def score(self, choice: Tile) -> float:
        """Geometric mean of the times."""
        times = self.times[choice]
        return math.exp(sum(map(math.log, times)) / len(times))

    def best(self) -> Tile | None:
        """The fastest of those that never failed."""
        return min((choice for choice in self.times if choice not in self.skipped), key=self.score, default=None)


def asked(run: Run) -> dict[Question, Tile]:
    """Which tiles a call asks for, and what it gets."""
    found: dict[Question, Tile] = {}

    def note(tiles: Tiles, size: int, choice: Tile) -> Tile:
        return found.setdefault(Question(tiles, size), choice)

    with chosen_by(note):
        run()
    return found


def measure(run: Run, question: Question, answers: Answers, timer: Timer) -> None:
    """Time a call with each candidate for one of its kernels, the others as they are."""
    for candidate in question.candidates:
        if candidate in answers.skipped:
            continue

        def choose(tiles: Tiles, size: int, choice: Tile, candidate: Tile = candidate) -> Tile:
            return candidate if Question(tiles, size) == question else choice

        try:
            with chosen_by(choose):
                answers.times[candidate].append(timer(run))
        except torch.AcceleratorError:
            raise  # the device is lost to this process
        except (TritonError, RuntimeError) as error:  # it needs too much of the device, or doesn't compile
            answers.skipped[candidate] = next(iter(str(error).splitlines()), "") or type(error).__name__


def answer(values: Values, ops: Iterable[str], timer: Timer, report: Callable[[str], None] = print) -> dict[Question, Answers]:
    """Measure the representative calls of these ops."""
    hosts = implementations()
    found: dict[Question, Answers] = {}
    for example in examples(values, ops):
        if reason := declined(hosts[example.op], example.arguments):
            report(f"{example}: declined, {reason}")
            continue
        report(str(example))
        run = functools.partial(call, hosts[example.op], example.arguments)
        for question, before in asked(run).items():
            measure(run, question, found.setdefault(question, Answers(before)), timer)
    return found


def table_of(found: Mapping[Question, Answers]) -> Table:
    """The best tiles as a table: one is for every size up to the one that it was measured at, the last for any."""
    by_kernel: dict[str, list[tuple[int, Tile]]] = defaultdict(list)
    for question, answers in found.items():
        if (best := answers.best()) is not None:
            by_kernel[question.tiles.kernel].append((question.size, best))
    return {kernel: _by_size(sorted(entries, key=lambda entry: entry[0])) for kernel, entries in by_kernel.items()}


def _by_size(entries: Sequence[tuple[int, Tile]]) -> Sequence[Tile]:
    made: list[Tile] = []
    for i, (size, best) in enumerate(entries):
        last = i == len(entries) - 1
        choice = Tile(best.blocks, best.warps, best.stages, None if last else size)
        if made and Tile(made[-1].blocks, made[-1].warps, made[-1].stages, choice.up_to) == choice:
            made.pop()
        made.append(choice)
    return made


def lines_of(found: Mapping[Question, Answers]) -> list[str]:
    """What came out, for people."""
    lines = []
    for question, answers in found.items():
        best = answers.best()
        if best is None:
            lines.append(f"{question}: no tile works, the tables' stay")
        else:
            known = best != answers.before and answers.before in answers.times and answers.before not in answers.skipped
            gain = f", {answers.score(answers.before) / answers.score(best):.2f} times as fast as {_words(answers.before)}"
            lines.append(f"{question}: {_words(best)}{gain if known else ''}")
        lines += [f"    skipped {_words(choice)}: {reason}" for choice, reason in answers.skipped.items()]
    return lines


def _words(choice: Tile) -> str:
    return " ".join((*(f"{name}={value}" for name, value in choice.blocks.items()), f"{choice.warps} warps {choice.stages} stages"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m q_triton.tune", description=(__doc__ or "").partition(": ")[2].partition("\n")[0]
    )
    made.add_argument("--op", action="append", help="tiles of this op's kernels only; may be given more than once; others stay")
    made.add_argument("--device", help="torch device (default: the current accelerator)")
    return made


def main(arguments: Sequence[str] | None = None, timer: Timer = median_ms) -> int:
    options = parser().parse_args(arguments)
    if options.device is None and not interpreted() and not torch.accelerator.is_available():
        print("torch sees no accelerator: tiles are measured on the device that they are for.", file=sys.stderr)
        return 2
    register_tables()
    implemented = implementations()
    if unknown := sorted(set(options.op or ()) - set(implemented)):
        print(f"q_triton has no {', '.join(unknown)}, expected some of {', '.join(implemented)}.", file=sys.stderr)
        return 2
    # A device with its index, as tensors have it.
    device = torch.empty(0, device=options.device or ("cpu" if interpreted() else torch.accelerator.current_accelerator())).device
    print(f"measuring on {device_name(device)}")
    found = answer(Values(device), options.op or implemented, timer)
    print("\n".join(lines_of(found)))
    others = {kernel: choices for kernel, choices in tuned_tiles(device).items() if options.op and kernel in KERNELS}
    print(f"wrote {write(device, {**others, **table_of(found)})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
