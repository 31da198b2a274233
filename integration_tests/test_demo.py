"""The demo, from end to end and in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

KEYS = {
    "loss_adamw", "loss_adamw8bit", "state_bytes_adamw", "state_bytes_adamw8bit", "perplexity", "weight_bytes", "lora", "serve", "sample",
}  # fmt: skip


def test_the_whole_way(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demo", "--smoke", "--output", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() >= KEYS
    assert report["perplexity"].keys() == report["weight_bytes"].keys() == {"bf16", "nf4", "int8"}
    assert report["lora"]["after"] < report["lora"]["before"]
    assert report["weight_bytes"]["nf4"] < report["weight_bytes"]["int8"] < report["weight_bytes"]["bf16"]
    assert report["state_bytes_adamw8bit"] < report["state_bytes_adamw"]
    assert report["serve"]["requests"] == 36
    assert report["sample"].startswith("def ")
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
