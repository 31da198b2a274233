"""What the backends of GPUs have in common, on machines that are played by patching torch, in the interpreter, and on this one."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch

from q_core.backend import SURFACE_VERSION, Availability, Backend
from q_triton import plugins
from q_triton.targets import target_named


@dataclass(frozen=True, slots=True)
class Vendor:
    """A backend, what a torch for it says, its devices by name and architecture, and what its probe says of those."""

    backend: str
    attribute: str
    version: str
    devices: tuple[tuple[str, str], ...]
    described: str
    variable: str
    target: str

    @property
    def plugin(self) -> Backend:
        backend: Backend = importlib.import_module(f"{self.backend}.plugin").backend
        return backend

    @property
    def platform(self) -> str:
        return self.backend.removeprefix("q_")


VENDORS = (
    Vendor(
        "q_cuda", "cuda", "13.0", (("NVIDIA H200", "90"), ("NVIDIA A100-SXM4-80GB", "80")),
        "NVIDIA H200, compute capability 9.0; NVIDIA A100-SXM4-80GB, compute capability 8.0", "CUDA_VISIBLE_DEVICES", "sm_90",
    ),
    Vendor(
        "q_rocm", "hip", "6.4.43482", (("AMD Instinct MI300X", "gfx942"), ("AMD Radeon RX 7900 XTX", "gfx1100")),
        "AMD Instinct MI300X, gfx942; AMD Radeon RX 7900 XTX, gfx1100", "HIP_VISIBLE_DEVICES", "gfx942",
    ),
    Vendor(
        "q_xpu", "xpu", "20250100", (("Intel(R) Data Center GPU Max 1550", ""), ("Intel(R) Arc(TM) A770 Graphics", "")),
        "Intel(R) Data Center GPU Max 1550; Intel(R) Arc(TM) A770 Graphics", "ZE_AFFINITY_MASK", "xe",
    ),
)  # fmt: skip
PAIRS = [(vendor, other) for vendor in VENDORS for other in VENDORS if vendor is not other]


@pytest.fixture(params=VENDORS, ids=lambda vendor: vendor.backend)
def vendor(request: pytest.FixtureRequest) -> Vendor:
    found: Vendor = request.param
    return found


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("Q_TRITON_TARGET", raising=False)


def play(monkeypatch: pytest.MonkeyPatch, build: Vendor | None, devices: Sequence[tuple[str, str]] = ()) -> None:
    """Make torch look built for a vendor's GPUs, with devices in the machine that CUDA and XPU would both name."""
    for attribute in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, attribute, build.version if build and build.attribute == attribute else None)
    properties = [SimpleNamespace(name=name, gcnArchName=architecture) for name, architecture in devices]
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: bool(devices))
        monkeypatch.setattr(module, "device_count", lambda: len(devices))
        monkeypatch.setattr(module, "get_device_name", lambda index: devices[index][0])
        monkeypatch.setattr(module, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: tuple(map(int, devices[index][1])))
    monkeypatch.setattr(plugins, "availability", lambda: Availability(True, "Triton 3.7.1"))


def test_torch_without_any_platform(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    title = {"q_cuda": "CUDA", "q_rocm": "ROCm", "q_xpu": "XPU"}[vendor.backend]
    assert vendor.plugin.probe() == Availability(False, f"this torch (2.13.0+cpu) is built without {title}")


@pytest.mark.parametrize(("vendor", "other"), PAIRS, ids=lambda vendor: vendor.backend)
def test_torch_for_another_platform_names_its_backend(vendor: Vendor, other: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, other, other.devices)
    assert not vendor.plugin.probe()
    assert vendor.plugin.probe().reason.endswith(f": q-{other.platform} is the backend for it")


def test_no_device(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, vendor)
    assert not vendor.plugin.probe()
    assert "device is visible to this torch" in vendor.plugin.probe().reason
    assert vendor.variable in vendor.plugin.probe().reason


def test_every_device_is_named(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, vendor, vendor.devices)
    assert vendor.plugin.probe() == Availability(True, f"{vendor.described}; Triton 3.7.1")


def test_devices_without_triton(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, vendor, vendor.devices)
    monkeypatch.setattr(plugins, "availability", lambda: Availability(False, "Triton is not installed"))
    assert vendor.plugin.probe() == Availability(False, f"{vendor.described}; Triton is not installed")


def test_this_machine(vendor: Vendor) -> None:
    built = getattr(torch.version, vendor.attribute) is not None
    there = torch.xpu.is_available() if vendor.backend == "q_xpu" else torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    assert vendor.plugin.probe().available == (built and there and triton)
    assert vendor.plugin.probe().reason


def test_entry_point_gives_the_backend(vendor: Vendor) -> None:
    (entry_point,) = entry_points(group="q.backends", name=vendor.backend)
    assert entry_point.load() is vendor.plugin
    assert (vendor.plugin.name, vendor.plugin.surface_version) == (vendor.backend, SURFACE_VERSION)


def test_the_families_are_this_packages_with_the_vendors_tiles_before(vendor: Vendor) -> None:
    assert vendor.plugin.families[: 1 + len(plugins.FAMILIES)] == (f"{vendor.backend}.tiles", *plugins.FAMILIES)


def test_the_tables_are_of_the_platforms_targets(vendor: Vendor) -> None:
    tables = importlib.import_module(f"{vendor.backend}.tiles").TILES
    assert {target_named(name).platform for name in tables} == {vendor.platform}


REFUSE = """
import sys, torch
def refuse(*arguments): raise AssertionError("asked for devices at import")
torch.cuda.is_available = torch.cuda.device_count = torch.xpu.is_available = torch.xpu.device_count = refuse
import q_cuda.plugin, q_rocm.plugin, q_xpu.plugin
sys.exit("triton" in sys.modules or torch.cuda.is_initialized())
"""


def test_importing_the_plugins_imports_no_triton_and_touches_no_driver() -> None:
    assert subprocess.run([sys.executable, "-c", REFUSE], check=False).returncode == 0


def interpreting(monkeypatch: pytest.MonkeyPatch, vendor: Vendor, target: str) -> Backend:
    """The backend as it is described in a process that interprets kernels for a target."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("Q_TRITON_TARGET", target)
    monkeypatch.setattr(plugins, "availability", lambda: Availability(True, "Triton 3.7.1"))
    return plugins.gpu_backend(
        vendor.backend, platform=vendor.platform, device_type="cuda", devices=list, advice="", tiles="", summary=""
    )  # type: ignore[arg-type]


def test_in_the_interpreter_it_serves_the_cpu_with_a_targets_tiles(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = interpreting(monkeypatch, vendor, vendor.target)
    assert backend.device_types == ("cpu",)
    assert backend.probe() == Availability(True, f"interpreted on the CPU, with the tiles of {vendor.target}; Triton 3.7.1")


@pytest.mark.parametrize(("vendor", "other"), PAIRS, ids=lambda vendor: vendor.backend)
def test_another_backends_target_is_not_its_own(vendor: Vendor, other: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = f"Q_TRITON_TARGET is {other.target}: q-{other.platform} is the backend for it"
    assert interpreting(monkeypatch, vendor, other.target).probe() == Availability(False, reason)


def test_an_unknown_target_is_a_reason(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = interpreting(monkeypatch, vendor, "sm90").probe()
    assert not found
    assert found.reason.startswith("Q_TRITON_TARGET: target 'sm90' is unknown, expected one such as 'sm_90'")


def test_without_a_target_devices_are_asked_for(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = interpreting(monkeypatch, vendor, "")
    assert backend.device_types == ("cuda",)
