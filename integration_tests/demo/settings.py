"""How large the demo is."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig


@dataclass(frozen=True, slots=True)
class Phase:
    """A training run: batches of ``batch`` windows of ``length`` tokens, ``steps`` of them, at a peak learning rate."""

    batch: int
    length: int
    steps: int
    learning_rate: float

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.batch * self.length * self.steps


@dataclass(frozen=True, slots=True)
class Settings:
    """One size of the demo.

    Attributes:
        vocab_size: tokens of the tokenizer.
        hidden_size: width of the model; the other sizes follow from it.
        layers: decoder layers.
        pretraining: training from scratch, once with each optimizer.
        pretraining_seconds: what one of them may take; a slow machine takes fewer steps.
        tuning: fine-tuning of the 4-bit model's adapters.
        evaluation_windows: windows of held-out text that a perplexity is measured on.
        answer_tokens: tokens of an answer of the server.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    pretraining: Phase
    pretraining_seconds: float
    tuning: Phase
    evaluation_windows: int
    answer_tokens: int

    def model_config(self) -> LlamaConfig:
        """A Llama with grouped queries and tied embeddings."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden_size // 32,
            num_key_value_heads=self.hidden_size // 64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )


FULL = Settings(
    vocab_size=4096,
    hidden_size=256,
    layers=4,
    pretraining=Phase(batch=8, length=128, steps=1200, learning_rate=1.2e-3),
    pretraining_seconds=140,
    tuning=Phase(batch=8, length=128, steps=150, learning_rate=2e-3),
    evaluation_windows=256,
    answer_tokens=48,
)
SMOKE = Settings(
    vocab_size=512,
    hidden_size=64,
    layers=2,
    pretraining=Phase(batch=4, length=32, steps=60, learning_rate=3e-3),
    pretraining_seconds=60,
    tuning=Phase(batch=4, length=32, steps=20, learning_rate=3e-3),
    evaluation_windows=16,
    answer_tokens=8,
)
"""Every step in seconds, for the tests."""
