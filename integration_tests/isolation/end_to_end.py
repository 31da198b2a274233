"""Quantize a small model, train it a few steps, serve it, and write down who served: ``python end_to_end.py REPORT``.

It runs in environments of which it knows nothing: no line of it names a backend or a device. It needs q-nn, q-serve and, to make the
model and to compare with, transformers.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

import q_core
import q_nn
from q_core.registry import registry
from q_core.specs import RECORDS
from q_serve.build import build
from q_serve.core.request import Request
from q_serve.core.sampling import SamplingParams
from q_serve.options import EngineOptions

VOCAB = 256
NEW_TOKENS = 12
STEPS = 3
PROMPT_LENGTHS = (3, 20, 37)


class Messages(logging.Handler):
    """Keeps what a logger says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def make_model() -> LlamaForCausalLM:
    """A random Llama whose weights are spread enough for the largest logit to stand out."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM) -> list[float]:
    """Adapters learn one batch; the loss before each step."""
    trainable = q_nn.add_lora(model, q_nn.LoRAConfig(rank=4))
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    batch = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    q_nn.merge_lora(model)
    return losses


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@torch.no_grad()
def generated_by_transformers(model: Any) -> list[list[int]]:
    """Greedy continuations."""
    outputs = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        for prompt in prompts()
    ]
    return [output.tolist() for output in outputs]


def generated_by_q_serve(directory: Path) -> list[list[int]]:
    """Greedy continuations; prompts are cut into chunks and run side by side."""
    engine = build(EngineOptions(model=directory, num_blocks=64, block_size=8, max_batch_tokens=24)).engine
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts())]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return [list(request.output_tokens) for request in requests]


def save(model: LlamaForCausalLM, directory: Path) -> None:
    """The quantized model, with a tokenizer that has a word a token."""
    q_nn.save_pretrained(model, directory)
    Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")).save(str(directory / "tokenizer.json"))


def main(report: Path) -> None:
    """Run, and write the report as JSON."""
    torch.set_num_threads(1)  # tiny tensors are faster so
    messages = Messages()
    logging.getLogger("q").addHandler(messages)

    model = make_model()
    q_nn.quantize(model, q_nn.QConfig(format="nf4"))
    losses = train(model)
    model.train(False)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        served = generated_by_q_serve(Path(folder))

    found = {
        "backends": {loaded.name: loaded.state for loaded in registry().backends},
        "served_by": {op: q_core.explain(op).served_by for op in RECORDS},
        "messages": messages.said,
        "losses": losses,
        "tokens": served,
        "tokens_of_transformers": generated_by_transformers(model),
    }
    # A vendor's own statistics, where that vendor is installed.
    if (statistics := sys.modules.get("acme_q.served")) is not None:
        found["acme_calls"] = dict(statistics.calls)
    report.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
