"""Real text that every Python has: its standard library's source files, a tokenizer trained on them, and token streams."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from demo.settings import Phase

END_OF_TEXT = "<|endoftext|>"
TUNING_PACKAGE = "asyncio"
"""Fine-tuning's slice: a package with a manner of its own, which training never sees."""

LEFT_OUT = {"__pycache__", "config", "distutils", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
            "tkinter", "turtledemo"}  # fmt: skip
"""Tables, tests, and what some installations lack."""

HELD_OUT_ONE_IN = 12

CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:\n{% endif %}"
)
"""A conversation as comments, which a model of source files has seen."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Source files, split by file into those to train on and those held out."""

    train: list[str]
    held_out: list[str]


def read_library() -> tuple[Slice, Slice]:
    """Read the standard library's sources.

    Returns:
        The slice for training, and the one for fine-tuning; they share no file.
    """
    library = Path(sysconfig.get_path("stdlib"))
    main, tuning = Slice([], []), Slice([], [])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if LEFT_OUT.intersection(name.parts):
            continue
        into = tuning if name.parts[0] == TUNING_PACKAGE else main
        held_out = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0
        (into.held_out if held_out else into.train).append(path.read_text(encoding="utf-8"))
    return main, tuning


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (GPT-2's kind): every text has tokens, and they decode to exactly it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tqdm(list(texts), desc="tokenizer", unit="file"), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one stream of tokens, int64 [T], each text ended."""
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for text in encoded for token in (*text.ids, end)])


def random_windows(stream: Tensor, phase: Phase, *, seed: int) -> Iterator[Tensor]:
    """A phase's batches, int64 [batch, length], from random places of a stream; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(phase.steps):
        starts = torch.randint(0, len(stream) - phase.length + 1, (phase.batch,), generator=generator)
        yield torch.stack([stream[start : start + phase.length] for start in starts.tolist()])


def consecutive_windows(stream: Tensor, *, length: int, limit: int) -> Tensor:
    """The first windows of a stream side by side, int64 [windows, length]."""
    windows = min(len(stream) // length, limit)
    return stream[: windows * length].view(windows, length)
