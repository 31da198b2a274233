"""The isolation session's checks find what they are there to find: one thing at a time is put wrong in a report that has no problem."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from isolation.cases import CASES, Report, every_problem

BY_NAME = {case.name: case for case in CASES}
OPS = ("quantize_blockwise", "quantize_4bit", "gemm_4bit", "paged_attention", "write_kv", "rms_norm")


def said(op: str) -> str:
    return f"{op} on cpu: no backend serves this call (none is installed for it); the reference serves it, slowly."


def report(**changes: Any) -> Report:
    """Of a run without a backend."""
    return {
        "backends": {"reference": "available"},
        "served_by": dict.fromkeys(OPS, "reference"),
        "messages": [said(op) for op in OPS],
        "losses": [2.0, 1.5, 1.0],
        "tokens": [[1, 2], [3]],
        "tokens_of_transformers": [[1, 2], [3]],
        "doctor": {"surface_version": 1, "backends": []},
    } | changes


GOOD = {
    "no backend": report(),
    "two backends": report(
        backends={"reference": "available", "q_cpu": "available", "acme": "available"},
        served_by=dict.fromkeys(OPS, "acme") | {"quantize_4bit": "q_cpu", "rms_norm": "reference"},
        messages=[said("rms_norm")],
        acme_calls={"quantize_blockwise": 14, "gemm_4bit": 99, "paged_attention": 9},
    ),
    "a broken one": report(
        backends={"reference": "available", "q_cpu": "available", "acme_broken": "failed"},
        served_by=dict.fromkeys(OPS, "q_cpu"),
        messages=["backend acme_broken failed: OSError (see `q-core doctor`)"],
        doctor={
            "surface_version": 1,
            "backends": [
                {
                    "name": "acme_broken",
                    "traceback": '  File "site-packages/acme_broken/plugin.py", line 8\n'
                    "OSError: libacme_npu.so.7: cannot open shared object file: No such file or directory",
                }
            ],
        },
    ),
    "one for a newer surface": report(
        backends={"reference": "available", "acme_newer": "refused"},
        doctor={
            "surface_version": 1,
            "backends": [
                {"name": "acme_newer", "reason": "written for surface version 2, this q-core has 1: update q-core"},
            ],
        },
    ),
}

FAULTS: list[tuple[str, Callable[[Report], object], str]] = [
    ("no backend", lambda r: r["messages"].pop(), "the reference serves ['rms_norm'] and doesn't say so"),
    ("no backend", lambda r: r["messages"].append(said("rms_norm")), "says 2 times"),
    ("no backend", lambda r: r["served_by"].update(rms_norm=None), "not served by the reference"),
    ("no backend", lambda r: r["backends"].update(q_cpu="available"), "the backends are"),
    ("no backend", lambda r: r["tokens"][1].append(4), "transformers"),
    ("no backend", lambda r: r["losses"].append(3.0), "the loss doesn't fall"),
    ("no backend", lambda r: r["losses"].append(float("nan")), "the loss doesn't fall"),
    ("two backends", lambda r: r["acme_calls"].pop("gemm_4bit"), "acme counts no call of gemm_4bit"),
    ("two backends", lambda r: r["served_by"].update(gemm_4bit="q_cpu"), "gemm_4bit is served by q_cpu, expected acme"),
    ("two backends", lambda r: r["served_by"].update(quantize_4bit="reference"), "quantize_4bit is served by reference"),
    ("two backends", lambda r: r["messages"].append(said("gemm_4bit")), "stands in for a backend at ['gemm_4bit']"),
    ("a broken one", lambda r: r["served_by"].update(gemm_4bit="reference"), "expected q_cpu"),
    ("a broken one", lambda r: r["doctor"]["backends"][0].update(traceback=None), "no traceback"),
    ("a broken one", lambda r: r["messages"].clear(), "nobody was told"),
    ("one for a newer surface", lambda r: r["backends"].update(acme_newer="available"), "the backends are"),
    ("one for a newer surface", lambda r: r["doctor"]["backends"][0].update(reason="no"), "the doctor's reason is 'no'"),
]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_good_report_has_no_problem(name: str) -> None:
    assert not every_problem(BY_NAME[name], GOOD[name])


@pytest.mark.parametrize(("name", "fault", "problem"), FAULTS, ids=[f"{name}: {problem}" for name, _, problem in FAULTS])
def test_a_fault_is_found(name: str, fault: Callable[[Report], object], problem: str) -> None:
    changed = copy.deepcopy(GOOD[name])
    fault(changed)
    assert any(problem in found for found in every_problem(BY_NAME[name], changed))
