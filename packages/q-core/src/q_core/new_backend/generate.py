"""Writes a vendor's package from the templates beside this module.

The templates are the files themselves, with the few names that differ in place of ``$name`` (:class:`string.Template`). They end in
``.template``, so that no tool takes them for modules or tests of ours.
"""

from __future__ import annotations

import keyword
import re
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from string import Template

from q_core import __version__
from q_core.backend import SURFACE_VERSION

FILES = {
    "pyproject.toml": "pyproject.toml.template",
    "README.md": "README.md.template",
    "src/$module/__init__.py": "init.py.template",
    "src/$module/plugin.py": "plugin.py.template",
    "src/$module/norm.py": "norm.py.template",
    "src/$module/py.typed": "py.typed.template",
    "tests/test_conformance.py": "conformance.py.template",
}
"""Where each template goes."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_DEVICE = re.compile(r"[a-z]+")


def generate(name: str, directory: Path, *, device: str = "cpu") -> list[Path]:
    """Write a package that serves one op, ``rms_norm``, in plain PyTorch; it installs and passes the conformance suite as it is.

    Args:
        name: of the distribution, such as "acme-npu"; the package and the backend are called ``acme_npu``.
        directory: where its files go; it is made, or is there and empty.
        device: torch device type that the backend serves.

    Returns:
        The files, in the order in which to read them.

    Raises:
        ValueError: a name that no distribution, package or device can have, or that is taken here.
        FileExistsError: the directory holds something.
    """
    module = name.replace("-", "_")
    if not _NAME.fullmatch(name) or keyword.iskeyword(module):
        raise ValueError(
            f"new-backend: name is {name!r}, expected lower-case letters, digits and single hyphens, such as 'acme-npu'."
        )
    if module == "reference" or find_spec(module) is not None:
        raise ValueError(f"new-backend: name is {name!r}, expected another one: a module or a backend {module} is there already.")
    if not _DEVICE.fullmatch(device):
        raise ValueError(
            f"new-backend: device is {device!r}, expected a torch device type without an index, such as 'cpu' or 'npu'."
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"new-backend: {directory} is there already and not empty; choose another directory.")

    major, minor = __version__.split(".")[:2]
    names = {
        "name": name,
        "module": module,
        "device": device,
        "surface_version": str(SURFACE_VERSION),
        "q_core": f"q-core>={major}.{minor},<{int(major) + 1}",
        "q_core_testing": f"q-core[testing]>={major}.{minor},<{int(major) + 1}",
    }
    folder = resources.files("q_core.new_backend") / "template"
    written = []
    for target, template in FILES.items():
        path = directory / Template(target).substitute(names)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template((folder / template).read_text(encoding="utf-8")).substitute(names), encoding="utf-8")
        written.append(path)
    return written
