"""Targets by name, and the target of a device."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from q_triton import targets
from q_triton.targets import Target, compiling_for, target_named, target_of

CPU, CUDA, XPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("xpu", 0)


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("Q_TRITON_TARGET", raising=False)
    targets._target_of.cache_clear()
    yield
    targets._target_of.cache_clear()


@pytest.mark.parametrize(
    ("name", "platform", "capability"),
    [
        ("sm_80", "cuda", 80),
        ("sm_120", "cuda", 120),
        ("gfx90a", "rocm", 0),
        ("gfx942", "rocm", 0),
        ("gfx1100", "rocm", 0),
        ("xe", "xpu", 0),
    ],
)
def test_names(name: str, platform: str, capability: int) -> None:
    target = target_named(name)
    assert (target.name, target.platform, target.capability) == (name, platform, capability)


@pytest.mark.parametrize("name", ["", "sm_9", "sm90", "sm_90a", "gfx", "GFX942", "gfx942:sramecc+", "xe2", "cuda", "sm_90 "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown, expected one such as 'sm_90'"):
        target_named(name)


def test_nvidia_by_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert target_of(CUDA) == Target("sm_90", "cuda")


def test_amd_by_architecture_without_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert target_of(CUDA) == Target("gfx942", "rocm")


def test_every_intel_gpu_is_one() -> None:
    assert target_of(XPU) == Target("xe", "xpu")


def test_a_cpu_is_one_only_where_kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="q_triton runs no kernel on cpu: set TRITON_INTERPRET=1 and Q_TRITON_TARGET"):
        target_of(CPU)
    monkeypatch.setenv("Q_TRITON_TARGET", "gfx942")
    with pytest.raises(ValueError, match="runs no kernel on cpu"):
        target_of(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert target_of(CPU) == Target("gfx942", "rocm")


def test_compiling_for_a_target_is_for_all_devices_and_ends() -> None:
    with compiling_for(Target("gfx942", "rocm")):
        with compiling_for(Target("sm_80", "cuda")):
            assert target_of(CPU) == target_of(torch.device("meta")) == Target("sm_80", "cuda")
        assert target_of(CPU) == Target("gfx942", "rocm")
    with pytest.raises(ValueError, match="runs no kernel"):
        target_of(CPU)
