"""``q-core new-backend``: a package to begin a backend with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from q_core.cli.options import add_json

HELP = "write a complete package that serves one op, to begin a backend with"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the distribution, such as acme-npu")
    parser.add_argument("--directory", type=Path, help="where it goes; made, or there and empty (default: NAME, here)")
    parser.add_argument("--device", default="cpu", help="torch device type that it serves (default: %(default)s)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from q_core.new_backend import generate

    directory = arguments.directory or Path(arguments.name)
    files = generate(arguments.name, directory, device=arguments.device)
    if arguments.json:
        print(json.dumps({"directory": str(directory), "files": [str(path) for path in files]}, indent=2))
        return 0
    print("\n".join(str(path) for path in files))
    print(f'\nNext: pip install -e "{directory}[test]" && python -m pytest {directory}/tests')
    return 0
