"""Check what our wheels and sdists hold: ``python check_distributions.py FILE…``. Prints what is wrong, exits 1 if anything is."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

LICENSE = (Path(__file__).parents[1] / "LICENSE").read_bytes()
NATIVE = {"q_cpu": 1}
"""How many shared libraries a package holds; the others hold none."""
RUNTIMES = ("libstdc++.so", "libgcc_s.so", "libm.so", "libc.so", "libpthread.so", "ld-linux")
"""What they link. OpenMP is torch's: a second runtime would bring a second pool of threads."""


def main(files: list[Path]) -> int:
    found = [
        f"{file.name}: {problem}"
        for file in files
        for problem in (wheel_problems if file.suffix == ".whl" else sdist_problems)(file)
    ]
    found += pairing_problems(files)
    print("\n".join(found) or f"{len(files)} files hold what they should")
    return 1 if found else 0


def wheel_problems(file: Path) -> Iterator[str]:
    """What is wrong with a wheel."""
    package, version = file.name.split("-")[:2]
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(file) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        license_name = f"{info}/licenses/LICENSE"
        if license_name not in names or wheel.read(license_name) != LICENSE:
            yield "LICENSE is missing, or is not the repository's"
        if metadata["License-Expression"] != "Apache-2.0":
            yield f"License-Expression is {metadata['License-Expression']}, expected Apache-2.0"
        if metadata["Requires-Python"] != ">=3.11":
            yield f"Requires-Python is {metadata['Requires-Python']}, expected >=3.11"
        if f"{package}/py.typed" not in names:
            yield "py.typed is missing"
        for name in names:
            path = PurePosixPath(name)
            if path.parts[0] not in (package, info):
                yield f"{name} is outside {package}"
            if "tests" in path.parts or path.name.startswith(("test_", "conftest")):
                yield f"{name} is a test"
        libraries = [name for name in names if ".so" in PurePosixPath(name).suffixes]
        if len(libraries) != NATIVE.get(package, 0):
            yield f"shared libraries: {libraries or 'none'}, expected {NATIVE.get(package, 0)}"
        for library in libraries:
            for needed in needed_libraries(wheel.read(library)):
                if not needed.startswith(RUNTIMES):
                    yield f"{library} links {needed}, expected the C and C++ runtimes alone"


def sdist_problems(file: Path) -> Iterator[str]:
    """What is wrong with an sdist."""
    with tarfile.open(file) as sdist:
        names = {PurePosixPath(*PurePosixPath(name).parts[1:]).as_posix() for name in sdist.getnames()}
    for needed in ("LICENSE", "README.md", "pyproject.toml"):
        if needed not in names:
            yield f"{needed} is missing"


def pairing_problems(files: list[Path]) -> Iterator[str]:
    """Wheels without their sdist and the other way round."""
    wheels = {"-".join(file.name.split("-")[:2]) for file in files if file.suffix == ".whl"}
    sdists = {file.name.removesuffix(".tar.gz") for file in files if file.suffix == ".gz"}
    for alone in sorted(wheels ^ sdists):
        yield f"{alone}: {'no sdist' if alone in wheels else 'no wheel'}"


def needed_libraries(library: bytes) -> list[str]:
    """The names of the shared libraries that an ELF file links."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        lines = subprocess.run(["readelf", "--dynamic", "--wide", file.name], check=True, capture_output=True, text=True).stdout
    return [line.split("[")[1].rstrip("]") for line in lines.splitlines() if "(NEEDED)" in line]


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
