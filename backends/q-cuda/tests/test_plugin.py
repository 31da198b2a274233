"""What q-cuda's probe says, on machines that are played by patching torch, and on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from q_cuda.plugin import backend
from q_cuda.tiles import TILES

NO_PLATFORM: dict[str, str | None] = {"cuda": None, "hip": None, "xpu": None}


def play(monkeypatch: pytest.MonkeyPatch, *, build: dict[str, str], devices: list[tuple[str, tuple[int, int]]]) -> None:
    """Make torch look built for ``build``, with ``devices`` in the machine."""
    for attribute, version in (NO_PLATFORM | build).items():
        monkeypatch.setattr(torch.version, attribute, version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: devices[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index][1])


def test_torch_without_any_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, build={}, devices=[])
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert not backend.probe()
    assert backend.probe().reason == "this torch (2.13.0+cpu) is built without CUDA"


@pytest.mark.parametrize(
    ("build", "other"),
    [({"hip": "6.4.43482"}, "q-rocm"), ({"xpu": "20250100"}, "q-xpu")],
)
def test_torch_for_another_platform_names_its_backend(monkeypatch: pytest.MonkeyPatch, build: dict[str, str], other: str) -> None:
    play(monkeypatch, build=build, devices=[("NVIDIA H200", (9, 0)), ("NVIDIA A100-SXM4-80GB", (8, 0))])
    assert not backend.probe()
    assert backend.probe().reason.endswith(f": {other} is the backend for it")


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, build={"cuda": "13.0"}, devices=[])
    assert not backend.probe()
    assert "no CUDA device is visible" in backend.probe().reason
    assert "CUDA_VISIBLE_DEVICES" in backend.probe().reason


def test_every_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, build={"cuda": "13.0"}, devices=[("NVIDIA H200", (9, 0)), ("NVIDIA A100-SXM4-80GB", (8, 0))])
    assert backend.probe()
    assert backend.probe().reason.startswith("NVIDIA H200, compute capability 9.0; NVIDIA A100-SXM4-80GB, compute capability 8.0")


def test_this_machine() -> None:
    found = backend.probe()
    assert found.available == (torch.version.cuda is not None and torch.cuda.is_available())
    assert found.reason


def test_entry_point_gives_the_backend() -> None:
    (entry_point,) = entry_points(group="q.backends", name="q_cuda")
    assert entry_point.load() is backend
    assert backend.name == "q_cuda"


def test_importing_the_plugin_touches_no_driver() -> None:
    code = """
import sys, torch
def refuse(*args): raise AssertionError("asked for devices at import")
torch.cuda.is_available = torch.cuda.device_count = torch.xpu.is_available = torch.xpu.device_count = refuse
import q_cuda.plugin
sys.exit("triton" in sys.modules or torch.cuda.is_initialized())
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def told_with(**environment: str) -> tuple[list[str], bool, str]:
    """What the backend says in a process of its own: the devices it serves, whether it can, and why."""
    code = """
import json
from q_cuda.plugin import backend
found = backend.probe()
print(json.dumps([backend.device_types, found.available, found.reason]))
"""
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "Q_TRITON_TARGET")}
    result = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True)
    devices, available, reason = json.loads(result.stdout)
    return devices, available, reason


def test_interpreted_it_serves_the_cpu() -> None:
    devices, available, reason = told_with(TRITON_INTERPRET="1", Q_TRITON_TARGET="sm_80")
    assert devices == ["cpu"]
    assert reason.startswith("interpreted on the CPU, with the tiles of sm_80; Triton ")
    assert available == ("not installed" not in reason)


def test_another_vendors_target_names_its_backend() -> None:
    _, available, reason = told_with(TRITON_INTERPRET="1", Q_TRITON_TARGET="gfx942")
    assert not available and reason == "Q_TRITON_TARGET is gfx942: q-rocm is the backend for it"


@pytest.mark.parametrize("environment", [{}, {"Q_TRITON_TARGET": "sm_90"}, {"TRITON_INTERPRET": "1"}])
def test_it_serves_gpus_unless_told_both(environment: dict[str, str]) -> None:
    assert told_with(**environment)[0] == ["cuda"]


def test_there_are_tiles_for_the_chips_that_the_readme_names() -> None:
    assert {"sm_80", "sm_90"} <= TILES.keys()
