"""Greedy tokens and log-probabilities equal transformers' on the same weights, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from q_serve.build import build
from q_serve.core.request import FinishReason, Request
from q_serve.core.sampling import SamplingParams
from q_serve.engine import Engine
from q_serve.options import EngineOptions
from q_serve.worker.model_runner import ModelRunner

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "multi-head": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=4)),
    "grouped": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2)),
    "multi-query, tied": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
    "head_dim": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=24)),
    "biases": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "llama3 rope": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3)),
    "theta and eps": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES, num_key_value_heads=2, rms_norm_eps=1e-2, rope_parameters={"rope_type": "default", "rope_theta": 77.0}
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None)),
    "mistral within its window": (MistralForCausalLM, MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=512)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=2)),
}
NUM_TOKENS = 24


def random_biases(model: PreTrainedModel) -> None:
    """Transformers starts biases at zero and norms at one, where a model that forgets them would still be right."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(len(kind))
    cls, config = MODELS[kind]
    model = cls(config).eval()
    random_biases(model)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 320, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def expected(model: PreTrainedModel, prompt: Sequence[int], count: int = NUM_TOKENS) -> list[int]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return list(ids[0, len(prompt) :].tolist())


def load(directory: Path, **options: Any) -> Engine:
    return build(EngineOptions(model=directory, **{"dtype": "float32", "num_blocks": 128, "block_size": 4} | options)).engine


def run(engine: Engine, *requests: Request) -> list[list[int]]:
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()
    return [list(request.output_tokens) for request in requests]


def greedy(name: str, prompt: Sequence[int], count: int = NUM_TOKENS) -> Request:
    return Request(name, list(prompt), SamplingParams(max_tokens=count, temperature=0))


@pytest.mark.parametrize("kind", MODELS)
def test_a_mixed_batch(kind: str, save: Callable[[PreTrainedModel], Path]) -> None:
    model = make(kind)
    batch = prompts(1, 7, 40, 90)
    engine = load(save(model), max_batch_tokens=32)  # so that the long prompts are chunked while others decode
    outputs = run(engine, *(greedy(f"r{i}", prompt) for i, prompt in enumerate(batch)))
    assert outputs == [expected(model, prompt) for prompt in batch]


@pytest.fixture(scope="module")
def grouped(save: Callable[[PreTrainedModel], Path]) -> tuple[PreTrainedModel, Path]:
    model = make("grouped")
    return model, save(model)


@pytest.mark.parametrize("max_batch_tokens", [1, 5, 1000])
def test_chunks_of_any_size(grouped: tuple[PreTrainedModel, Path], max_batch_tokens: int) -> None:
    model, directory = grouped
    (prompt,) = prompts(33)
    assert run(load(directory, max_batch_tokens=max_batch_tokens), greedy("r", prompt)) == [expected(model, prompt)]


def test_after_a_prefix_hit(grouped: tuple[PreTrainedModel, Path]) -> None:
    model, directory = grouped
    first, other = prompts(30, 9)
    engine = load(directory)
    run(engine, greedy("first", first))
    again, branch = greedy("again", first), greedy("branch", first[:18] + other)
    assert run(engine, again, branch) == [expected(model, first), expected(model, first[:18] + other)]
    assert again.num_cached_prompt_tokens == 28
    assert branch.num_cached_prompt_tokens == 16


def test_after_preemption(grouped: tuple[PreTrainedModel, Path]) -> None:
    model, directory = grouped
    batch = prompts(20, 21, 22, 23)
    engine = load(directory, num_blocks=24, max_model_len=60)
    outputs = run(engine, *(greedy(f"r{i}", prompt) for i, prompt in enumerate(batch)))
    assert engine.scheduler.num_preemptions > 0
    assert outputs == [expected(model, prompt) for prompt in batch]


def test_log_probabilities(grouped: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Argmax forgives much; the log-probabilities of a whole generation don't."""
    model, directory = grouped
    (prompt,) = prompts(50)
    engine = load(directory, max_batch_tokens=16)
    runner = engine._runner
    assert isinstance(runner, ModelRunner)
    rows: list[torch.Tensor] = []
    logits = runner.model.logits
    monkeypatch.setattr(runner.model, "logits", lambda hidden: rows.append(logits(hidden)) or rows[-1])
    (output,) = run(engine, greedy("r", prompt))
    with torch.no_grad():
        theirs = model.double()(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    model.float()
    ours = torch.cat(rows).double().log_softmax(-1)
    assert ours.shape == theirs.shape
    # float32's error of sums of a few hundred terms in three layers, against a float64 model
    assert (ours - theirs).abs().max() < 2**-23 * 320 * 3


def test_an_end_token_stops_and_counts(grouped: tuple[PreTrainedModel, Path]) -> None:
    model, directory = grouped
    (prompt,) = prompts(12)
    tokens = expected(model, prompt)
    end = next(i for i in range(3, NUM_TOKENS) if tokens[i] not in tokens[:i])
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, stop_token_ids=frozenset({tokens[end]}))
    request = Request("r", list(prompt), params)
    assert run(load(directory), request) == [tokens[: end + 1]]
    assert request.finish_reason is FinishReason.STOP


def test_bfloat16_stays_near(grouped: tuple[PreTrainedModel, Path]) -> None:
    _, directory = grouped
    (prompt,) = prompts(12)
    engine = load(directory, dtype="bfloat16")
    assert len(run(engine, greedy("r", prompt))[0]) == NUM_TOKENS
    assert next(engine._runner.model.parameters()).dtype is torch.bfloat16  # type: ignore[attr-defined]
