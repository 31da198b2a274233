"""What the tests share: a tiny model of the Llama family, in transformers' own class."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from q_nn import LoRALinear

torch.set_num_threads(1)  # the models are tiny

MakeLlama = Callable[..., LlamaForCausalLM]
Fill = Callable[[nn.Module], None]


@pytest.fixture
def make_llama() -> MakeLlama:
    """Builds a model whose sizes bitsandbytes gets right too: K a multiple of the blocksize, N of 32."""

    def make(*, dtype: torch.dtype = torch.float32, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        model: LlamaForCausalLM = LlamaForCausalLM(config).to(dtype).eval()
        return model

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fill() -> Fill:
    """Makes adapters do something: new ones give zero."""

    def fill(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(2)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                for adapter in module.adapters.values():
                    for name, parameter in adapter.named_parameters():
                        with torch.no_grad():
                            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                            if name == "lora_B.weight":
                                parameter.copy_(noise * 0.05)
                            elif name == "lora_magnitude_vector":
                                parameter.mul_(1 + 0.1 * noise)

    return fill
