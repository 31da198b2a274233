"""Small random models in Hugging Face's format, made by transformers' own classes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEXT = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    x: int\n    y: int\n",
    "Größe, façade, naïve — 你好，世界 🌍 👩‍🚀",
]

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VOCAB = 320


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors are faster so, and the machine is shared."""
    torch.set_num_threads(1)


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE of few tokens: every text is encoded, most characters outside ASCII as several tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama of few parameters whose weights are spread enough for the largest logit to stand out."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[PreTrainedModel], Path]:
    """Saves a model and the tokenizer in a directory of its own."""

    def save(model: PreTrainedModel) -> Path:
        directory = tmp_path_factory.mktemp("model")
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return llama


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="session")
def tiny_directory(save: Callable[[PreTrainedModel], Path], tiny_llama: LlamaForCausalLM) -> Path:
    return save(tiny_llama)
