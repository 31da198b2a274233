"""What is under test is what a user gets: our nine distributions, installed from wheels."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sysconfig
import tomllib
from importlib.metadata import Distribution, distribution, entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in ROOT.glob("*/q-*/pyproject.toml"))
every_distribution = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def installed(folder: Path) -> Distribution:
    return distribution(folder.name)


def test_there_are_nine() -> None:
    names = {"q-core", "q-nn", "q-optim", "q-serve", "q-cpu", "q-triton", "q-cuda", "q-rocm", "q-xpu"}
    assert {folder.name for folder in FOLDERS} == names


@every_distribution
def test_the_installed_package_is_a_wheels(folder: Path) -> None:
    direct_url = json.loads(installed(folder).read_text("direct_url.json") or "{}")
    assert not direct_url.get("dir_info", {}).get("editable", False), "an editable install; run the tests with: nox -s tests"
    spec = importlib.util.find_spec(folder.name.replace("-", "_"))
    assert spec is not None
    assert spec.origin is not None
    assert not Path(spec.origin).is_relative_to(folder)
    assert Path(spec.origin).is_relative_to(sysconfig.get_path("platlib"))


@every_distribution
def test_metadata_is_the_repositorys(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    metadata = installed(folder).metadata
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert f"## {project['version']}" in (folder / "CHANGELOG.md").read_text()


@every_distribution
def test_its_license_is_the_repositorys(folder: Path) -> None:
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@every_distribution
def test_it_is_typed(folder: Path) -> None:
    assert any(path.name == "py.typed" for path in installed(folder).files or [])


def test_the_doctor_names_every_backend() -> None:
    doctor = Path(sysconfig.get_path("scripts")) / "q-core"
    result = subprocess.run([doctor, "doctor"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    backends = {entry_point.name for entry_point in entry_points(group="q.backends")}
    assert backends == {"q_cpu", "q_cuda", "q_rocm", "q_xpu"}
    for name in (*backends, "reference"):
        assert name in result.stdout
