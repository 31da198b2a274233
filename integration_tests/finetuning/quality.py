"""What quantizing costs in quality: perplexity of a model that has learned, and the output's error of three that haven't."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import q_nn
import q_optim
from demo import data
from demo.evaluation import perplexity
from demo.settings import FULL, Settings
from demo.steps import BETAS, WEIGHT_DECAY, Text
from demo.training import measure_pace, new_model, train

SEED = 0
DENSE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Format:
    """A format of linear layers' weights.

    Attributes:
        title: for people.
        config: how to quantize to it.
        perplexity_bound: most that the dense model's perplexity may be multiplied with.
        rounds_inputs: to int8 as well, which counts as an error of the weights' size.
    """

    title: str
    config: q_nn.QConfig
    perplexity_bound: float
    rounds_inputs: bool = False


FORMATS = (
    Format("NF4, double-quantized", q_nn.QConfig("nf4"), 1.01),
    Format("FP4, double-quantized", q_nn.QConfig("fp4"), 1.02),
    Format("int8, weights alone", q_nn.QConfig("int8_weight_only"), 1.002),
    Format("LLM.int8(), threshold 6", q_nn.QConfig("int8", threshold=6.0), 1.003, rounds_inputs=True),
)


def perplexities(settings: Settings = FULL, *, seconds: float = 90.0) -> dict[str, float]:
    """Train the demo's Llama, and measure held-out perplexity dense, in bfloat16, and in each format.

    Args:
        settings: the demo's.
        seconds: what training may take; a slow machine makes fewer steps.
    """
    text = Text.read(settings)
    config = settings.model_config()
    windows = data.random_windows(text.train, settings.pretraining, seed=SEED)
    pace = measure_pace(new_model(config, seed=SEED), next(windows))
    phase = pace.fit(settings.pretraining, seconds)
    model = new_model(config, seed=SEED)
    optimizer = q_optim.AdamW8bit(model.parameters(), lr=phase.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    batches = data.random_windows(text.train, phase, seed=SEED)
    train(model, optimizer, batches, phase, autocast=pace.autocast, title="training")
    model = model.bfloat16()
    found = {DENSE: perplexity(model, text.held_out, title=DENSE)}
    for format in FORMATS:
        quantized = copy.deepcopy(model)
        q_nn.quantize(quantized, format.config)
        found[format.title] = perplexity(quantized, text.held_out, title=format.title)
    return found


@dataclass(frozen=True, slots=True)
class Error:
    """Errors of a quantized model, relative, of root mean squares.

    Attributes:
        architecture, format: which.
        layers: how many were quantized.
        weights: of all their weights.
        output: of the logits.
    """

    architecture: str
    format: str
    layers: int
    weights: float
    output: float

    @property
    def allowed(self) -> float:
        """Most that the output's may be.

        A layer whose weights err by ε, each by itself, has an output that errs by ε, and by ε√2 if its input is rounded as coarsely. What
        layers in series add to each other's errors adds as squares; so all n of them, in series, come to ε√n. Residual connections pass
        by most layers, and weaken what these add.
        """
        rounds_inputs = next(format.rounds_inputs for format in FORMATS if format.title == self.format)
        return self.weights * math.sqrt(self.layers * (2 if rounds_inputs else 1))


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    ),
    "GPT-NeoX": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8)
    ),
    "OPT": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=512, hidden_size=256, ffn_dim=1024, num_hidden_layers=4, num_attention_heads=8, word_embed_proj_dim=256
        )
    ),
}
"""Random weights, float32, so that nothing but the formats rounds."""


@torch.inference_mode()
def output_errors() -> list[Error]:
    """Each architecture in each format, beside itself in float32."""
    found = []
    for architecture, make in ARCHITECTURES.items():
        torch.manual_seed(SEED)
        model = make().eval()
        ids = torch.randint(512, (4, 64))
        exact = model(input_ids=ids).logits
        for format in FORMATS:
            quantized = copy.deepcopy(model)
            q_nn.quantize(quantized, format.config)
            output = _relative(quantized(input_ids=ids).logits, exact)
            found.append(Error(architecture, format.title, *_weight_error(model, quantized), output))
    return found


def _weight_error(model: nn.Module, quantized: nn.Module) -> tuple[int, float]:
    pairs = [
        (weight.dequantize().flatten(), model.get_parameter(name).flatten())
        for name, weight in quantized.named_parameters()
        if isinstance(weight, q_nn.QuantizedTensor)
    ]
    return len(pairs), _relative(torch.cat([got for got, _ in pairs]), torch.cat([exact for _, exact in pairs]))


def _relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got - exact).norm() / exact.norm())
