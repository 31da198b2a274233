"""What ``q-serve serve`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded and run.

    Attributes:
        model: directory in Hugging Face's format.
        dtype: of dense weights, activations and KV cache; "auto" is the checkpoint's.
        device: a torch device string.
        block_size: tokens a cache block.
        num_blocks: cache blocks; ``None`` takes as many as ``kv_cache_memory`` holds.
        kv_cache_memory: bytes of the KV cache.
        max_model_len: tokens of one sequence; ``None`` takes the model's, or what the cache holds if that is less.
        max_batch_tokens: tokens computed in one step.
        max_requests: requests that run at the same time.
    """

    model: Path
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory: int = 1 << 30
    max_model_len: int | None = None
    max_batch_tokens: int = 2048
    max_requests: int = 64

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "kv_cache_memory", "max_model_len", "max_batch_tokens", "max_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the API is served.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        served_model_name: what requests call the model; ``None`` takes the directory's name.
        api_key: if set, what every route but /health and /ready asks for.
        strict: refuse unknown fields in requests, instead of warning in the log.
        max_queue: requests that may wait beyond those that run; more are answered 429.
        max_body_bytes: largest request body.
        grace_period: seconds that running requests have to finish after a signal to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: str | None = None
    strict: bool = False
    max_queue: int = 256
    max_body_bytes: int = 8 << 20
    grace_period: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 0…65535")
        if self.api_key is not None and not self.api_key:
            raise ValueError("api_key is empty; leave it out to serve without one")
        if self.served_model_name is not None and not self.served_model_name:
            raise ValueError("served_model_name is empty; leave it out for the directory's name")
        if self.max_queue < 0:
            raise ValueError(f"max_queue is {self.max_queue}, expected 0 or more")
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes is {self.max_body_bytes}, expected 1 or more")
        if not 0 <= self.grace_period < 3600:
            raise ValueError(f"grace_period is {self.grace_period}, expected seconds in 0…3600")
