"""The Python examples of every README run as they stand."""

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
    """The Python blocks of each README, in order: later ones may use what earlier ones define."""
    readmes = [ROOT / "README.md", *sorted(ROOT.glob("*/q-*/README.md"))]
    found = {readme: BLOCK.findall(readme.read_text()) for readme in readmes if readme.exists()}
    return [pytest.param("\n".join(blocks), id=str(readme.parent.name)) for readme, blocks in found.items() if blocks]


@pytest.mark.parametrize("code", examples())
def test_examples_run(code: str, tmp_path: Path) -> None:
    program = tmp_path / "readme.py"
    program.write_text(code)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
