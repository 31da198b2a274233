"""The vendor's tutorial works as it stands: its files are written, and its commands run, in order, in a fresh environment."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from isolation.environment import Environment, build_wheel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorials" / "a-backend-in-an-afternoon.md"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<file>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)

# What pip would fetch is lent; sources are built with what is here.
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # pip reads this 0 as «no build isolation»


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    made = Environment(tmp_path / "environment")
    made.install(build_wheel(ROOT / "packages" / "q-core", tmp_path / "build"))  # for its command
    return made


def run(command: str, environment: Environment, folder: Path) -> str:
    scripts = environment.python.parent
    variables = (
        os.environ | OFFLINE | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    )
    if command.startswith("pip "):
        command = f"python -m {command}"  # pip is lent too, and its script isn't here
    done = subprocess.run(command, shell=True, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_tutorial(environment: Environment, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    said: dict[str, list[str]] = {}
    for block in BLOCK.finditer(PAGE.read_text()):
        if block["file"]:
            (folder / block["file"]).write_text(block["text"])
        elif block["language"] == "console":
            for line in block["text"].splitlines():
                assert line.startswith("$ "), f"no command: {line}"
                said.setdefault(line[2:], []).append(run(line[2:], environment, folder))
    assert "served by acme_npu" in said["q-core explain rms_norm"][0]
    first, second = (int(re.findall(r"(\d+) passed", text)[0]) for text in said["python -m pytest acme-npu/tests"])
    assert second > first, "the second op brings its own tests"
    assert "acme_npu: declines: blocksize 4096" in said["python check.py"][0]
