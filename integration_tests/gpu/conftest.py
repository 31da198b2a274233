"""The device that the tests marked ``gpu`` run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpu.graph import can_capture
from q_core.registry import registry
from q_triton.environment import interpreted_target


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The accelerator, or the CPU where Triton's interpreter plays one; with a backend of its own, which the tests are about."""
    found = torch.device("cpu") if interpreted_target() else torch.accelerator.current_accelerator()
    assert found is not None, "there is no accelerator here: set TRITON_INTERPRET=1 and Q_TRITON_TARGET to interpret kernels"
    serving = [
        loaded.name
        for loaded in registry().backends
        if loaded.state == "available" and loaded.backend is not None and found.type in (loaded.backend.device_types or ())
    ]
    assert {"q_cuda", "q_rocm", "q_xpu"} & set(serving), f"no backend of a GPU serves {found}: `q-core doctor` says why"
    return found if found.type == "cpu" else torch.device(found.type, torch.accelerator.current_device_index())


@pytest.fixture(scope="session")
def interpreted() -> bool:
    """Whether sizes must be small: a kernel's programs take milliseconds each in the interpreter."""
    return interpreted_target() is not None


@pytest.fixture
def accelerator(device: torch.device) -> torch.device:
    """A device with streams."""
    if device.type == "cpu":
        pytest.skip("an interpreted kernel runs in no stream")
    return device


@pytest.fixture
def capturing(device: torch.device) -> torch.device:
    """A device whose calls can be captured."""
    if not can_capture(device):
        pytest.skip(f"torch captures no graphs on {device}")
    return device


@pytest.fixture(autouse=True)
def _memory(device: torch.device) -> Iterator[None]:
    """Large tests begin with all of the device's memory."""
    yield
    if device.type != "cpu":
        torch.accelerator.empty_cache()
