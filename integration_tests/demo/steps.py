"""The five steps, each from what the one before it made."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import q_nn
import q_optim
from demo import data, serving
from demo.evaluation import perplexity
from demo.oracle import Oracle, differing_answers
from demo.report import Formats, Lora
from demo.settings import Settings
from demo.training import measure_pace, new_model, train

SEED = 0
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
PROMPT_TOKENS = 24
SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 240


@dataclass(frozen=True, slots=True)
class Text:
    """The standard library in tokens: int64 [T] to train on, int64 [windows, length] held out."""

    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    held_out: Tensor
    tuning_train: Tensor
    tuning_held_out: Tensor

    @classmethod
    def read(cls, settings: Settings) -> Text:
        """Read the sources, and train a tokenizer on those to train on."""
        main, tuning = data.read_library()
        tokenizer = data.train_tokenizer(main.train, vocab_size=settings.vocab_size)
        streams = [data.token_stream(tokenizer, texts) for texts in (main.train, main.held_out, tuning.train, tuning.held_out)]
        held_out, tuning_held_out = (
            data.consecutive_windows(stream, length=settings.pretraining.length, limit=settings.evaluation_windows)
            for stream in (streams[1], streams[3])
        )
        return cls(tokenizer, streams[0], held_out, streams[2], tuning_held_out)

    def prompts(self, count: int) -> list[str]:
        """Pieces of held-out text, without special tokens: in a user's text, those are text."""
        return self.tokenizer.batch_decode(self.held_out[:count, :PROMPT_TOKENS], skip_special_tokens=True)


@dataclass(frozen=True, slots=True)
class Trained:
    """The model that AdamW8bit trained, and what both optimizers came to, by name."""

    model: LlamaForCausalLM
    tokens: int
    dtype: str
    losses: dict[str, float]
    state_bytes: dict[str, int]


def pretrain(settings: Settings, text: Text, device: torch.device) -> Trained:
    """Train twice from the same weights on the same data in the same order."""
    config = settings.model_config()
    pace = measure_pace(
        new_model(config, seed=SEED).to(device), next(data.random_windows(text.train, settings.pretraining, seed=SEED))
    )
    phase = pace.fit(settings.pretraining, settings.pretraining_seconds)
    losses, states = {}, {}
    for kind in (torch.optim.AdamW, q_optim.AdamW8bit):
        name = kind.__name__
        model = new_model(config, seed=SEED).to(device)
        optimizer = kind(model.parameters(), lr=phase.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
        losses[name] = train(
            model, optimizer, data.random_windows(text.train, phase, seed=SEED), phase, autocast=pace.autocast, title=name
        )
        states[name] = q_optim.state_bytes(optimizer)
        print(f"{name}: final loss {losses[name]:.4f}, optimizer state {states[name]:,} bytes")
    return Trained(model, phase.tokens, "bfloat16 autocast" if pace.autocast else "float32", losses, states)


@dataclass(frozen=True, slots=True)
class Quantized:
    """The 4-bit model, and figures of all three formats."""

    nf4: LlamaForCausalLM
    perplexity: Formats
    weight_bytes: Formats


def quantize(model: LlamaForCausalLM, text: Text) -> Quantized:
    """Round a model to bfloat16, and that to NF4 with double quantization and to int8."""
    bf16 = copy.deepcopy(model).bfloat16()
    nf4, int8 = copy.deepcopy(bf16), copy.deepcopy(bf16)
    print(q_nn.quantize(nf4, q_nn.QConfig("nf4", double_quant=True), progress=True))
    print(q_nn.quantize(int8, q_nn.QConfig("int8"), progress=True))
    models = {"bf16": bf16, "nf4": nf4, "int8": int8}
    perplexities = {name: perplexity(each, text.held_out, title=name) for name, each in models.items()}
    sizes = {name: q_nn.weight_bytes(each) for name, each in models.items()}
    for name in models:
        print(f"{name}: held-out perplexity {perplexities[name]:.3f}, weights {sizes[name]:,} bytes")
    return Quantized(nf4, Formats(**perplexities), Formats(**sizes))


def finetune(model: LlamaForCausalLM, text: Text, settings: Settings) -> Lora:
    """Train adapters on the tuning slice, the 4-bit base frozen, with gradient checkpointing; then merge them.

    Args:
        model: quantized; mutated.
        text: with the tuning slice.
        settings: with the tuning phase.

    Returns:
        Perplexity of the slice's held-out text before, after, and after merging.
    """
    phase = settings.tuning
    before = perplexity(model, text.tuning_held_out, title="before")
    torch.manual_seed(SEED)
    adapters = q_nn.add_lora(model, q_nn.LoRAConfig(rank=8, alpha=16, target="all-linear"))
    model.activation_checkpointing_enable()
    optimizer = q_optim.AdamW8bit(adapters, lr=phase.learning_rate, betas=BETAS, weight_decay=0.0)
    train(model, optimizer, data.random_windows(text.tuning_train, phase, seed=SEED), phase, autocast=False, title="LoRA on NF4")
    model.activation_checkpointing_disable()
    after = perplexity(model, text.tuning_held_out, title="after")
    q_nn.merge_lora(model)
    merged = perplexity(model, text.tuning_held_out, title="merged")
    print(
        f"perplexity of {data.TUNING_PACKAGE}'s held-out files: {before:.3f} before, {after:.3f} after, {merged:.3f} merged into NF4"
    )
    return Lora(before=before, after=after, merged=merged)


def serve(model: LlamaForCausalLM, text: Text, settings: Settings, output: Path) -> tuple[serving.Answers, list[str]]:
    """Save a model, serve it from a process of its own, ask it, and compare its answers with transformers'.

    Returns:
        The answers, and those that differ, in words.
    """
    directory = output / "model"
    q_nn.save_pretrained(model, directory)
    text.tokenizer.save_pretrained(directory)
    prompts = text.prompts(serving.CONCURRENT)
    with serving.serve(directory, model.device, output / "server.log") as address:
        answers = serving.ask(
            address, prompts, max_tokens=settings.answer_tokens, sample_prompt=SAMPLE_PROMPT, sample_tokens=SAMPLE_TOKENS
        )
    oracle = Oracle(directory, model.device, max_tokens=settings.answer_tokens)
    return answers, differing_answers(answers, oracle, prompts)
