"""«QLoRA on a laptop» works as it stands: its files are written, and its commands run, in order. (Of the other pages, test_readmes.)"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorials" / "qlora-on-a-laptop.md"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<file>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
PROGRAMS = {"python": [sys.executable], "q-nn": [sys.executable, "-m", "q_nn.cli"]}
"""Those that are run, with this environment's Python; what is to be installed is."""


def test_qlora_on_a_laptop(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # small tensors are faster so
    said: dict[str, str] = {}
    for block in BLOCK.finditer(PAGE.read_text()):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["text"])
        elif block["language"] == "console":
            for line in block["text"].splitlines():
                assert line.startswith("$ "), f"no command: {line}"
                program, *arguments = shlex.split(line[2:])
                if program == "pip":
                    continue
                command = [*PROGRAMS[program], *arguments]
                done = subprocess.run(
                    command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
                said[line] = done.stdout
    assert len(said) == 5
    assert "nf4" in said["$ q-nn estimate dense --format nf4 --optimizer adamw8bit --lora-rank 8"]
    assert "lm_head" in said["$ q-nn quantize dense quantized --format nf4"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    dense, quantized = (sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("dense", "quantized"))
    assert quantized < 0.5 * dense
