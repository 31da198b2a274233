"""Virtual environments that take seconds: what others wrote is lent by this interpreter's environment, ours is installed from wheels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

OURS = ("Q_BACKENDS", "Q_FALLBACK", "Q_CPU_ISA")
"""Variables that would choose a backend; a fresh environment has none of them."""


class Environment:
    """A virtual environment on top of the packages of this one.

    Args:
        folder: where it is made; what was there is removed.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, clear=True, symlinks=True, with_pip=False)
        self._scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
        self.python = self._scripts / "python"
        scheme = {"base": str(folder), "platbase": str(folder)}
        own = Path(sysconfig.get_path("purelib", scheme="venv", vars=scheme))
        lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        # Its own packages come first on the path; addsitedir and not a bare line, so that the lender's .pth files count as well.
        (own / "lent.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(lent)))

    def install(self, *distributions: Path, check: bool = True) -> None:
        """Install wheels or source trees with pip, without an index; what they require must be there already.

        Args:
            *distributions: wheels, or folders that hold a pyproject.toml.
            check: that everything they require is there, in a version that they can work with.
        """
        files = [str(path) for path in distributions]
        # What is lent doesn't count: pip would take the same version there for the one to install.
        self._pip("install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", *files)
        if check:
            self._pip("check")

    def _pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"pip {' '.join(arguments)}\n{done.stdout}{done.stderr}")

    def run(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run its Python and return what it prints.

        Raises:
            RuntimeError: an exit code other than 0; the message holds all the output.
        """
        return self._run(str(self.python), *arguments, expect=0, cwd=cwd)

    def command(self, name: str, *arguments: str, expect: int = 0, cwd: Path | None = None) -> str:
        """Run a command that one of the installed distributions brings, and return what it prints.

        Raises:
            RuntimeError: an exit code other than ``expect``; the message holds all the output.
        """
        return self._run(str(self._scripts / name), *arguments, expect=expect, cwd=cwd)

    def _run(self, *command: str, expect: int, cwd: Path | None) -> str:
        variables = {name: value for name, value in os.environ.items() if name not in OURS} | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != expect:
            raise RuntimeError(f"{' '.join(command)} exits with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


def build_wheel(sources: Path, folder: Path) -> Path:
    """Build the wheel of a distribution with this environment's setuptools, from a copy: its folder stays as it is."""
    copy = folder / "sources" / sources.name
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    wheels = folder / "wheels" / sources.name
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels))
    command = [sys.executable, "-m", "pip", "wheel", *options, str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"building {sources.name}\n{done.stdout}{done.stderr}")
    (wheel,) = wheels.glob("*.whl")
    return wheel
