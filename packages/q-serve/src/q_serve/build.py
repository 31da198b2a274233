"""Puts an engine together from options: model, cache, scheduler, tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from q_serve.core.kv_blocks import BlockPool
from q_serve.core.scheduler import Scheduler, SchedulerConfig
from q_serve.engine import Engine
from q_serve.errors import ModelError
from q_serve.models.config import ModelConfig
from q_serve.models.loader import load_model, resolve_dtype
from q_serve.models.registry import read_config
from q_serve.options import EngineOptions
from q_serve.text.tokenizer import Tokenizer, stop_token_ids
from q_serve.worker.model_runner import ModelRunner, kv_block_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what the API needs beside it."""

    engine: Engine
    tokenizer: Tokenizer
    stop_token_ids: frozenset[int]
    max_model_len: int


def build(options: EngineOptions) -> BuiltEngine:
    """Load a model and make an engine for it. What is wrong with the directory is found before weights are read.

    Raises:
        ModelError: the directory can't be served so; the message says what and why.
    """
    config = read_config(options.model)
    dtype = resolve_dtype(options.dtype, config)
    device = _device(options.device)
    tokenizer = Tokenizer.from_directory(options.model)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{options.model}: tokenizer.json has {tokenizer.vocab_size} tokens, but the model's vocab_size is {config.vocab_size}; "
            "they don't belong together"
        )
    ends = stop_token_ids(options.model, dict(config.raw))
    num_blocks, max_model_len = _cache_size(options, config, dtype)
    model = load_model(options.model, config, dtype=dtype, device=device)
    try:
        runner = ModelRunner(
            model, num_blocks=num_blocks, block_size=options.block_size, max_model_len=max_model_len, dtype=dtype, device=device
        )
    except RuntimeError as error:
        size = num_blocks * kv_block_bytes(config, options.block_size, dtype)
        raise ModelError(f"a KV cache of {size} bytes can't be had on {device}: {str(error).splitlines()[0]}") from error
    pool = BlockPool(num_blocks, options.block_size, model=f"{options.model.resolve()}:{dtype}")
    limits = SchedulerConfig(
        max_batch_tokens=options.max_batch_tokens, max_requests=options.max_requests, max_model_len=max_model_len
    )
    logger.info("%s in %s on %s, context %d, %d cache blocks", config.architecture, dtype, device, max_model_len, num_blocks)
    return BuiltEngine(Engine(Scheduler(limits, pool), runner, vocab_size=config.vocab_size), tokenizer, ends, max_model_len)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from error
    return device


def _cache_size(options: EngineOptions, config: ModelConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Number of cache blocks, and length of the longest sequence."""
    block_bytes = kv_block_bytes(config, options.block_size, dtype)
    wanted = options.max_model_len or config.max_position_embeddings
    if wanted > config.max_position_embeddings:
        raise ModelError(
            f"max_model_len is {wanted}, but the model was made for {config.max_position_embeddings} (max_position_embeddings)"
        )
    if config.sliding_window is not None and wanted > config.sliding_window:
        raise ModelError(
            f"{options.model}: sliding_window is {config.sliding_window}, which q-serve supports only where it doesn't matter: "
            f"serve with --max-model-len {config.sliding_window} or less"
        )
    needed = -(-wanted // options.block_size)
    # Memory beyond what all running requests could use would never be touched.
    num_blocks = options.num_blocks or min(options.kv_cache_memory // block_bytes, needed * options.max_requests)
    if num_blocks < 1:
        raise ModelError(
            f"kv_cache_memory is {options.kv_cache_memory} bytes, but one block of {options.block_size} tokens needs {block_bytes}"
        )
    if num_blocks >= needed:
        return num_blocks, wanted
    length = num_blocks * options.block_size
    if options.max_model_len is not None:
        raise ModelError(
            f"max_model_len is {wanted}, but the KV cache holds {length} tokens ({num_blocks} blocks of {options.block_size}, "
            f"{block_bytes} bytes each): give it {needed} blocks, or lower max_model_len"
        )
    logger.warning("the context is cut from the model's %d to the %d tokens that the KV cache holds", wanted, length)
    return num_blocks, length
