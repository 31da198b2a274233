"""What q_triton says of Triton, over packages made for the test, and over what this machine really has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import q_triton


@pytest.fixture
def fake_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The ``__init__.py`` of a package named triton that comes before any real one."""
    package = tmp_path / "triton"
    package.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    yield package / "__init__.py"
    sys.modules.pop("triton", None)


def test_version_is_told(fake_triton: Path) -> None:
    fake_triton.write_text("__version__ = '9.8.7'\n")
    found = q_triton.availability()
    assert found.available
    assert found.reason == "Triton 9.8.7"


def test_broken_installation_is_told(fake_triton: Path) -> None:
    fake_triton.write_text("raise ImportError('libtriton.so: undefined symbol: rust')\n")
    found = q_triton.availability()
    assert not found.available
    assert "installed but can't be imported" in found.reason
    assert "undefined symbol: rust" in found.reason


def test_missing_dependency_of_triton_is_not_called_missing_triton(fake_triton: Path) -> None:
    fake_triton.write_text("import no_such_package_of_triton\n")
    found = q_triton.availability()
    assert not found.available
    assert "no_such_package_of_triton" in found.reason


def test_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else real(name, *a))
    assert q_triton.availability().reason.startswith("Triton is not installed")


def test_this_machine() -> None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        assert not q_triton.availability()
    else:
        assert q_triton.availability().reason == f"Triton {version}"


def test_importing_q_triton_does_not_import_triton() -> None:
    code = "import sys, q_triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
