"""The environments, and what must be seen in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]
"""What ``end_to_end.py`` writes, with ``doctor``: what ``q-core doctor --json`` prints."""

STACK = ("q-core", "q-nn", "q-serve")
CAUSE_OF_BROKEN = "libacme_npu.so.7: cannot open shared object file"


@dataclass(frozen=True, slots=True)
class Case:
    """An environment.

    Attributes:
        name: in words.
        backends: distributions that are installed with :data:`STACK`.
        doctor_exit: what ``q-core doctor`` exits with.
        problems: yields what is not as it should be.
    """

    name: str
    backends: tuple[str, ...]
    doctor_exit: int
    problems: Callable[[Report], Iterator[str]]


def every_problem(case: Case, report: Report) -> list[str]:
    """What is wrong in a case: its own checks, and that the model learnt and was served right."""
    found = list(case.problems(report))
    if not report["losses"][-1] < report["losses"][0]:
        found.append(f"the loss doesn't fall: {report['losses']}")
    if report["tokens"] != report["tokens_of_transformers"]:
        found.append(f"q-serve gives {report['tokens']}, transformers {report['tokens_of_transformers']}")
    for op, times in Counter(fallbacks(report)).items():
        if times != 1:
            found.append(f"the reference says {times} times, and not once, that it serves {op}")
    return found


def fallbacks(report: Report) -> list[str]:
    """The ops of which the reference said that it serves them, one entry a message."""
    return [message.split(" on ")[0] for message in report["messages"] if "the reference serves it" in message]


def _states(report: Report, **expected: str) -> Iterator[str]:
    expected = {"reference": "available"} | expected
    if report["backends"] != expected:
        yield f"the backends are {report['backends']}, expected {expected}"


def _entry(report: Report, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = next((b for b in report["doctor"]["backends"] if b["name"] == name), {})
    return entry


def no_backend(report: Report) -> Iterator[str]:
    """The reference serves everything and says so."""
    yield from _states(report)
    others = {op: name for op, name in report["served_by"].items() if name != "reference"}
    if others:
        yield f"not served by the reference: {others}"
    missing = {"quantize_4bit", "gemm_4bit", "paged_attention", "write_kv", "rms_norm"} - set(fallbacks(report))
    if missing:
        yield f"the reference serves {sorted(missing)} and doesn't say so"


def two_backends(report: Report) -> Iterator[str]:
    """Each serves what it is first for, and the reference only what neither has."""
    yield from _states(report, q_cpu="available", acme="available")
    for op in ("quantize_blockwise", "gemm_4bit", "paged_attention"):
        if report["served_by"][op] != "acme":
            yield f"{op} is served by {report['served_by'][op]}, expected acme, which has the higher priority"
        if not report["acme_calls"].get(op):
            yield f"acme counts no call of {op}"
    if report["served_by"]["quantize_4bit"] != "q_cpu":
        yield f"quantize_4bit is served by {report['served_by']['quantize_4bit']}, expected q_cpu, as acme has none"
    silent = [op for op in fallbacks(report) if report["served_by"][op] != "reference"]
    if silent:
        yield f"the reference stands in for a backend at {silent}"


def a_broken_one(report: Report) -> Iterator[str]:
    """It is shown with its traceback, and the rest works."""
    yield from _states(report, q_cpu="available", acme_broken="failed")
    if report["served_by"]["gemm_4bit"] != "q_cpu":
        yield f"gemm_4bit is served by {report['served_by']['gemm_4bit']}, expected q_cpu"
    traceback = _entry(report, "acme_broken").get("traceback") or ""
    if CAUSE_OF_BROKEN not in traceback or "acme_broken/plugin.py" not in traceback.replace("\\", "/"):
        yield f"the doctor shows no traceback that leads to the cause: {traceback!r}"
    if not any("acme_broken failed" in message for message in report["messages"]):
        yield f"nobody was told that a backend failed: {report['messages']}"


def a_newer_one(report: Report) -> Iterator[str]:
    """It is refused with the reason, before anything of it is imported."""
    yield from _states(report, acme_newer="refused")
    reason = _entry(report, "acme_newer").get("reason") or ""
    version = report["doctor"]["surface_version"]
    if f"written for surface version {version + 1}, this q-core has {version}" not in reason:
        yield f"the doctor's reason is {reason!r}"


CASES = (
    Case("no backend", (), 0, no_backend),
    Case("two backends", ("q-cpu", "acme-q"), 0, two_backends),
    Case("a broken one", ("q-cpu", "acme-broken"), 1, a_broken_one),
    Case("one for a newer surface", ("acme-newer",), 1, a_newer_one),
)
