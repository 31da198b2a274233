"""The command line. It imports the engine only once it knows that it is needed, so that --help answers at once."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from q_serve import __version__, environment
from q_serve.errors import ModelError
from q_serve.options import EngineOptions, ServerOptions

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``q-serve``; the exit code: 0 after a clean end, 2 if what was asked for can't be done, 1 if the engine failed."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        engine_options = EngineOptions(
            model=options.model,
            dtype=options.dtype,
            device=options.device,
            block_size=options.block_size,
            num_blocks=options.num_blocks,
            kv_cache_memory=options.kv_cache_memory,
            max_model_len=options.max_model_len,
            max_batch_tokens=options.max_batch_tokens,
            max_requests=options.max_requests,
        )
        server_options = ServerOptions(
            host=options.host,
            port=options.port,
            served_model_name=options.served_model_name,
            api_key=options.api_key if options.api_key is not None else environment.api_key(),
            strict=options.strict,
            max_queue=options.max_queue,
            max_body_bytes=options.max_body_bytes,
            grace_period=options.grace_period,
        )
    except ValueError as error:
        return _refuse(f"--{str(error).replace('_', '-', 1)}")
    from q_serve.server import serve

    try:
        return serve(engine_options, server_options)
    except ModelError as error:
        return _refuse(str(error))


def _refuse(message: str) -> int:
    print(f"q-serve: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="q-serve", description="Serve a language model over an OpenAI-compatible API.")
    parser.add_argument("--version", action="version", version=f"q-serve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model directory", description="Serve a model directory.")
    serve.add_argument(
        "model", type=Path, metavar="DIR", help="a model in Hugging Face's format: config.json, *.safetensors, tokenizer.json"
    )

    engine = serve.add_argument_group("engine")
    engine.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto, the default: the checkpoint's"
    )
    engine.add_argument("--device", default="cpu", help="a torch device (default: %(default)s)")
    engine.add_argument(
        "--block-size", type=int, default=16, metavar="TOKENS", help="tokens a KV-cache block (default: %(default)s)"
    )
    cache = engine.add_mutually_exclusive_group()
    cache.add_argument("--num-blocks", type=int, metavar="N", help="KV-cache blocks (default: as --kv-cache-memory says)")
    cache.add_argument(
        "--kv-cache-memory", type=_bytes, default=1 << 30, metavar="BYTES", help="such as 512MiB or 4GiB (default: 1GiB)"
    )
    engine.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest sequence (default: the model's)")
    engine.add_argument(
        "--max-batch-tokens", type=int, default=2048, metavar="TOKENS", help="tokens computed in one step (default: %(default)s)"
    )
    engine.add_argument(
        "--max-requests", type=int, default=64, metavar="N", help="requests that run at the same time (default: %(default)s)"
    )

    server = serve.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument("--port", type=int, default=8000, help="0: a free one, printed (default: %(default)s)")
    server.add_argument("--served-model-name", metavar="NAME", help="what requests call the model (default: the directory's name)")
    server.add_argument(
        "--api-key", metavar="KEY", help="asked for by all routes but /health and /ready (default: Q_SERVE_API_KEY)"
    )
    server.add_argument("--strict", action="store_true", help="refuse unknown fields in requests")
    server.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="requests that may wait; more are answered 429 (default: %(default)s)",
    )
    server.add_argument(
        "--max-body-bytes", type=_bytes, default=8 << 20, metavar="BYTES", help="largest request body (default: 8MiB)"
    )
    server.add_argument(
        "--grace-period",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds running requests have at shutdown (default: %(default)s)",
    )
    server.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: %(default)s)")
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]I?)?B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 1048576, 512MiB or 4GB")
    return int(match[1]) * _UNITS[match[2] or ""]
