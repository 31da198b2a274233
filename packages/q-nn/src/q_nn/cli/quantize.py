"""``q-nn quantize``: a directory into another, one module at a time."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from q_nn.cli.options import add_config, config_of
from q_nn.disk import quantize_checkpoint
from q_nn.rules import FORMATS
from q_nn.shards import MAX_SHARD_SIZE

HELP = "Quantize a Hugging Face directory into a new one, without holding the model in memory."


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a directory with config.json and weights in safetensors")
    parser.add_argument("target", type=Path, metavar="OUT", help="a new or empty directory")
    parser.add_argument("--format", choices=FORMATS, default="nf4", help="of linear layers and experts (nf4)")
    add_config(parser)
    parser.add_argument("--max-shard-size", default=MAX_SHARD_SIZE, metavar="SIZE", help=f"weights a file ({MAX_SHARD_SIZE})")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    report = quantize_checkpoint(
        arguments.source,
        arguments.target,
        config_of(arguments),
        max_shard_size=arguments.max_shard_size,
        progress=sys.stderr.isatty(),
    )
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0
