"""The package that ``q-core new-backend`` writes: it installs, is found, and passes its own tests as it is."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from q_core.cli import main
from q_core.new_backend import generate
from q_core.new_backend.generate import FILES


def run(*command: str, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("Q_BACKENDS", "Q_FALLBACK")}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_installs_is_found_and_passes_its_tests(tmp_path: Path) -> None:
    package, site = tmp_path / "acme-npu", tmp_path / "site"
    assert main(["new-backend", "acme-npu", "--directory", str(package)]) == 0
    install = ("install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site), str(package))
    run("-m", "pip", *install, cwd=tmp_path)
    path = os.pathsep.join((str(site), os.environ.get("PYTHONPATH", "")))
    asked = "import q_core; print(q_core.explain('rms_norm').served_by, q_core.explain('gemm').served_by)"
    assert run("-c", asked, cwd=tmp_path, PYTHONPATH=path).split()[0] == "acme_npu"

    said = run("-m", "pytest", "-q", "-rsx", "-p", "no:cacheprovider", "tests", cwd=package, PYTHONPATH=path)
    assert " passed" in said and "xfailed" not in said
    # Tests of what the op isn't (one that mutates, one that quantizes) have nothing to run on.
    assert all("empty parameter set" in line for line in said.splitlines() if line.startswith("SKIPPED"))


def test_names_and_device_are_where_they_belong(tmp_path: Path) -> None:
    files = generate("acme-npu2", tmp_path, device="xpu")
    assert [path.relative_to(tmp_path).as_posix() for path in files] == [name.replace("$module", "acme_npu2") for name in FILES]
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert project["name"] == "acme-npu2"
    assert project["entry-points"]["q.backends"] == {"acme_npu2": "acme_npu2.plugin:backend"}
    for path in files:
        assert "$" not in path.read_text().replace("\n$ ", ""), "a name that is not filled in"
        if path.suffix == ".py":
            ast.parse(path.read_text())
    assert 'DEVICE = "xpu"' in (tmp_path / "src/acme_npu2/plugin.py").read_text()
    assert 'device="xpu"' in (tmp_path / "tests/test_conformance.py").read_text()


@pytest.mark.parametrize("name", ["Acme", "acme_npu", "acme--npu", "-acme", "7up", "a/b", "", "lambda"])
def test_a_name_that_nothing_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"new-backend: name is .*, expected lower-case letters"):
        generate(name, tmp_path / "package")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("name", ["torch", "q-core", "reference"])
def test_a_name_that_is_taken_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"new-backend: name is .*, expected another one: a module or a backend .* is there already"
    ):
        generate(name, tmp_path / "package")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("device", ["cuda:0", "", "CPU", '"'])
def test_a_device_that_is_no_type_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"new-backend: device is .*, expected a torch device type without an index"):
        generate("acme-npu", tmp_path / "package", device=device)


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["new-backend", "acme-npu", "--directory", str(tmp_path)]) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError):
        generate("acme-npu", tmp_path / "notes.txt")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-backend", "acme-npu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["directory"] == "acme-npu"
    assert all((tmp_path / file).is_file() for file in said["files"])
