"""Which platform this torch is for, over builds that are played by patching ``torch.version``, and over the real one."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from q_triton import Platform, platform_mismatch

BUILDS: dict[str, dict[str, str | None]] = {
    "cpu": {"cuda": None, "hip": None, "xpu": None},
    "cuda": {"cuda": "13.0", "hip": None, "xpu": None},
    "rocm": {"cuda": None, "hip": "6.4.43482", "xpu": None},
    "xpu": {"cuda": None, "hip": None, "xpu": "20250100"},
}


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for attribute, version in BUILDS[request.param].items():
        monkeypatch.setattr(torch.version, attribute, version)
    return str(request.param)


@pytest.mark.parametrize("platform", get_args(Platform))
def test_only_its_own_platform_fits_a_build(build: str, platform: Platform) -> None:
    mismatch = platform_mismatch(platform)
    if platform == build:
        assert mismatch is None
        return
    assert mismatch is not None
    assert torch.__version__ in mismatch
    if build == "cpu":
        assert "built without" in mismatch
    else:
        assert f"q-{build} is the backend for it" in mismatch


def test_reasons_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+rocm6.4")
    for attribute, version in BUILDS["rocm"].items():
        monkeypatch.setattr(torch.version, attribute, version)
    assert platform_mismatch("cuda") == "this torch (2.13.0+rocm6.4) is built for ROCm 6.4.43482: q-rocm is the backend for it"

    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    for attribute, version in BUILDS["cpu"].items():
        monkeypatch.setattr(torch.version, attribute, version)
    assert platform_mismatch("xpu") == "this torch (2.13.0+cpu) is built without XPU"


def test_this_torch_is_for_one_platform_at_most() -> None:
    assert sum(platform_mismatch(platform) is None for platform in get_args(Platform)) <= 1
