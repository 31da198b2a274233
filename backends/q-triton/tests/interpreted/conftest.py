"""These tests run kernels in Triton's interpreter, which is chosen for a whole process: elsewhere none of them is collected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from q_core.registry import registry
from q_triton.environment import interpreted_target

HERE = Path(__file__).parent
MISSING = interpreted_target() is None
collect_ignore_glob = ["test_*.py"] if MISSING else []

if not MISSING:
    registry()  # host functions that are called directly have the target's tiles, too

torch.set_num_threads(1)  # programs are interpreted one after another; more threads only stall


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):  # the interpreter computes with numpy, which warns of what a GPU does in silence
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.write_line(
            "q-triton/tests/interpreted: not collected, TRITON_INTERPRET isn't 1 or Q_TRITON_TARGET names no target: nox -s kernels"
        )
