"""``q-nn estimate``: what a model takes, before it is loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from q_nn.cli.options import add_config, config_of
from q_nn.estimate import estimate
from q_nn.kv_cache import KV_DTYPES
from q_nn.optimizer_states import OPTIMIZERS
from q_nn.rules import FORMATS

HELP = "Say what memory weights, gradients, optimizer states and keys and values take, from config.json alone."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="DIR_OR_CONFIG", help="a directory with a config.json, or that file")
    parser.add_argument("--format", choices=FORMATS, help="what is trained is quantized so (dense)")
    add_config(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="of dense weights (what config.json says)")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", metavar="NAME", help=f"one of {', '.join(OPTIMIZERS)} (adamw)"
    )
    parser.add_argument(
        "--lora-rank", type=int, metavar="R", help="train adapters of this rank on all linear layers, and nothing else"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences whose keys and values are kept (1)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of each (the most that the model is made for)")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, help="of keys and values (all)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    if arguments.format is None and any(
        (arguments.blocksize, arguments.double_quant is not None, arguments.threshold is not None, arguments.skip, arguments.rule)
    ):
        raise ValueError("--blocksize, --double-quant, --threshold, --skip and --rule say how to quantize; give --format with them")
    found = estimate(
        arguments.source,
        None if arguments.format is None else config_of(arguments),
        dtype=None if arguments.dtype is None else DTYPES[arguments.dtype],
        optimizer=arguments.optimizer,
        lora_rank=arguments.lora_rank,
        batch=arguments.batch,
        length=arguments.length,
        kv_dtypes=KV_DTYPES if arguments.kv_dtype is None else (arguments.kv_dtype,),
    )
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return 0
