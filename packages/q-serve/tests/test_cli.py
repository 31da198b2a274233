"""The command line: fast help, one clear line for what can't be done, exit codes."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from q_serve.cli import main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "q_serve", *arguments], capture_output=True, text=True, timeout=60)


def test_help_needs_no_torch() -> None:
    code = "import sys; from q_serve.cli import main\ntry: main(['serve', '--help'])\nfinally: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--block-size", "0"], "--block-size is 0"),
        (["--kv-cache-memory", "much"], "'much' is no size"),
        (["--api-key", ""], "--api-key is empty"),
        (["--grace-period", "nan"], "--grace-period is nan"),
        (["--num-blocks", "4", "--kv-cache-memory", "1G"], "not allowed with"),
        (["--what"], "--what"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    done = run("serve", "somewhere", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command leaves on stderr."""
    assert main(["serve", "--log-level", "error", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    return line


def test_a_path_that_is_not_a_model(tmp_path: Path) -> None:
    done = run("serve", str(tmp_path / "nowhere"), "--port", "0")
    assert done.returncode == 2
    assert done.stderr == (
        f"q-serve: {tmp_path}/nowhere: not a directory; expected one in Hugging Face's format, with config.json and *.safetensors\n"
    )


def test_directories_that_lack_something(tmp_path: Path, tiny_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(tiny_directory, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json: missing" in refusal(capsys, str(model), "--port", "0")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    assert "architecture 'MambaForCausalLM' is not supported" in refusal(capsys, str(model), "--port", "0")


def test_a_taken_port(tiny_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"can't listen on 127.0.0.1 port {port}" in refusal(capsys, str(tiny_directory), "--port", port)
