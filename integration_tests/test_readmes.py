"""The Python examples of every README and of every page of the documentation run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[pytest.ParameterSet]:
    """The Python blocks of each page, in order: later ones may use what earlier ones define."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("*/q-*/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]
    found = {page.relative_to(ROOT): BLOCK.findall(page.read_text()) for page in pages}
    return [pytest.param("\n".join(blocks), id=str(page)) for page, blocks in found.items() if blocks]


@pytest.mark.parametrize("code", examples())
def test_examples_run(code: str, tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text(code)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
