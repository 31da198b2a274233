"""Models, optimizers and the serving engine on the device give what they give on a CPU, with nothing changed above the backends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import q_nn
import q_optim
from q_core import use_backends
from q_core.specs import bounds
from q_core.testing.agreement import compare
from q_serve.build import build
from q_serve.core.request import Request
from q_serve.core.sampling import SamplingParams
from q_serve.options import EngineOptions

pytestmark = pytest.mark.gpu

VOCAB = 300
STEPS = 3
PROMPTS = (3, 17, 40)


@pytest.fixture(scope="module")
def llama(interpreted: bool) -> LlamaForCausalLM:
    """A Llama of random weights in float32, on the CPU."""
    torch.manual_seed(0)
    width, layers = (64, 1) if interpreted else (1024, 4)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, max_position_embeddings=256, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def reference_of(function: Any) -> Any:
    """What the reference gives on the CPU."""
    with use_backends("reference"):
        return function()


def on_cpu(values: Any) -> Any:
    return [value.detach().cpu() for value in values]


FORMATS = {
    "nf4": q_nn.QConfig("nf4"),
    "nf4, double": q_nn.QConfig("nf4", double_quant=True),
    "mxfp4": q_nn.QConfig("mxfp4"),
    "int8": q_nn.QConfig("int8"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_model_and_its_adapters(name: str, llama: LlamaForCausalLM, device: torch.device) -> None:
    """Its loss and the gradients of its adapters, quantized on the device."""
    ids = torch.randint(VOCAB, (2, 24))

    def loss_and_gradients(where: torch.device) -> list[Tensor]:
        torch.manual_seed(1)
        model = copy.deepcopy(llama).to(where)
        q_nn.quantize(model, FORMATS[name])
        adapters = list(q_nn.add_lora(model, q_nn.LoRAConfig(rank=4, alpha=8, target="all-linear")))
        with torch.no_grad():  # as after some training: B begins at zero, and A's gradient with it
            for number, adapter in enumerate(adapters):
                torch.manual_seed(number)
                adapter.copy_(torch.randn(adapter.shape) * 0.02)
        loss = model(input_ids=ids.to(where), labels=ids.to(where), use_cache=False).loss
        return on_cpu([loss, *torch.autograd.grad(loss, adapters)])

    expected = reference_of(lambda: loss_and_gradients(torch.device("cpu")))
    for got, one in zip(loss_and_gradients(device), expected, strict=True):
        assert not (message := compare(got, one.double(), bounds.gradient(one.double()))), message


@pytest.mark.parametrize("kind", [q_optim.AdamW8bit, q_optim.Lion8bit, q_optim.PagedAdamW8bit, q_optim.LAMB8bit])
def test_optimizer_steps(kind: type[torch.optim.Optimizer], device: torch.device) -> None:
    """Each step from the same states, so that what a rounding changes isn't carried along."""
    values = [torch.randn(300, 64), torch.randn(5000), torch.randn(7, 5)]
    paged = {"paged_budget": 4096} if "Paged" in kind.__name__ else {}
    here, there = (
        kind([torch.nn.Parameter(v.to(where, copy=True)) for v in values], lr=1e-2, **paged)  # type: ignore[call-arg]
        for where in (torch.device("cpu"), device)
    )
    for _ in range(STEPS):
        states = copy.deepcopy(here.state_dict())
        for param, other in zip(parameters(here), parameters(there), strict=True):
            param.grad = torch.randn(param.shape)
            other.grad = param.grad.to(device)
            other.data.copy_(param.data)
        there.load_state_dict(states)
        reference_of(here.step)
        there.step()
        for param, other in zip(parameters(here), parameters(there), strict=True):
            assert not (message := compare(other.cpu(), param.double(), bounds.gradient(param.double()))), message
            for key, held in here.state[param].items():
                assert_near(there.state[other][key], held, key)


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def assert_near(got: Any, expected: Any, key: str) -> None:
    """Codes within one step of the code book, numbers within their rounding, a count as it is."""
    if not isinstance(expected, Tensor):
        assert got == expected, key
    elif expected.dtype is torch.uint8:
        assert ((got.cpu().int() - expected.int()).abs() <= 1).all(), key
    else:
        assert not (message := compare(got.cpu(), expected.double(), bounds.gradient(expected.double()))), f"{key} {message}"


@pytest.fixture(scope="module")
def directory(llama: LlamaForCausalLM, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as it is and in NF4, quantized on the device, as Hugging Face's directories."""
    words = {f"w{token}": token for token in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    quantized = copy.deepcopy(llama).to(device)
    q_nn.quantize(quantized, q_nn.QConfig("nf4", double_quant=True))
    saved = {}
    for name, model in {"dense": llama, "nf4": quantized}.items():
        saved[name] = tmp_path_factory.mktemp(name)
        q_nn.save_pretrained(model, saved[name])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(saved[name])
    return saved


@pytest.mark.parametrize("name", ["dense", "nf4"])
def test_the_engine_and_transformers(name: str, directory: dict[str, Path], device: torch.device, interpreted: bool) -> None:
    """Greedy answers of requests that are served together are those of ``generate`` on the device, token by token."""
    new = 3 if interpreted else 48
    options = EngineOptions(
        model=directory[name],
        dtype="float32",
        device=str(device),
        num_blocks=64,
        block_size=16,
        max_model_len=128,
        max_batch_tokens=24,
    )
    engine = build(options).engine
    requests = [
        Request(f"of {size}", torch.randint(1, VOCAB, (size,)).tolist(), SamplingParams(max_tokens=new, temperature=0))
        for size in PROMPTS
    ]
    prompts = [list(request.tokens) for request in requests]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(directory[name])).float().eval()
    q_nn.load_into(model, directory[name])
    model.to(device)
    for request, prompt in zip(requests, prompts, strict=True):
        ids = torch.tensor([prompt], device=device)
        generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        assert list(request.output_tokens) == generated[0, len(prompt) :].tolist(), f"{request.id} tokens: {request.error}"
