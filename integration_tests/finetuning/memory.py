"""The memory that training takes, as Linux counts it, each way of training in a process of its own.

Resident memory is read when everything is imported and nothing made; then the model and the optimizer are made, what that took at most is
forgotten (proc_pid_clear_refs(5)), and two steps are made: the first makes the optimizer's states, the second meets them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import q_nn
import q_optim

SHARE = 0.10
"""What the last of the ways may take, as a share of the first."""

STEPS = 2
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives what is as large as a tensor back to the system as soon as it is freed: what is resident is what is held."""

_FORGET_PEAK = "5"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train.

    Attributes:
        name: on the command line.
        title: for people.
        quantized: a bfloat16 model in NF4 with double quantization, frozen, and adapters; else a float32 one, all of it trained.
        optimizer: of ``torch.optim`` or of ``q_optim``.
        checkpointing: of each layer's activations.
    """

    name: str
    title: str
    quantized: bool
    optimizer: Literal["AdamW", "AdamW8bit"]
    checkpointing: bool


WAYS = (
    Way("full", "all weights, float32, torch's AdamW", False, "AdamW", False),
    Way("full8bit", "all weights, float32, `q_optim.AdamW8bit`", False, "AdamW8bit", False),
    Way("qlora", "QLoRA: NF4, double-quantized, torch's AdamW", True, "AdamW", False),
    Way("qlora8bit", "QLoRA, `AdamW8bit`, gradient checkpointing", True, "AdamW8bit", True),
)


@dataclass(frozen=True, slots=True)
class Size:
    """Of the model, of a batch, and how many threads compute."""

    hidden: int = 1024
    layers: int = 20
    vocabulary: int = 32_000
    rank: int = 16
    batch: int = 1
    length: int = 128
    threads: int = 2

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=max(1, self.hidden // 256),
            vocab_size=self.vocabulary,
            tie_word_embeddings=False,
            use_cache=False,
        )


@dataclass(frozen=True, slots=True)
class Memory:
    """What a way took, bytes.

    Attributes:
        way: its name.
        parameters: of the model, without adapters.
        trained: how many of them, or of the adapters, are trained.
        weights: of all parameters and buffers.
        states: of the optimizer.
        idle: resident before anything was made.
        ready: resident beyond ``idle`` before the first step.
        peak: most that was resident in a step, beyond ``idle``.
    """

    way: str
    parameters: int
    trained: int
    weights: int
    states: int
    idle: int
    ready: int
    peak: int


def measure(way: Way, size: Size | None = None) -> Memory:
    """Train in a fresh process, and say what that took."""
    size = size or Size()
    command = [sys.executable, "-m", "finetuning.memory", way.name, json.dumps(asdict(size))]
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(size.threads), "HF_HUB_OFFLINE": "1"}
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    return Memory(**json.loads(done.stdout))


def train(way: Way, size: Size) -> Memory:
    """Train in this process, which must be fresh."""
    torch.set_num_threads(size.threads)
    torch.manual_seed(0)
    idle = resident("VmRSS")
    if way.quantized:
        model = quantized_llama(size.config())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        trained: Iterable[nn.Parameter] = q_nn.add_lora(model, q_nn.LoRAConfig(rank=size.rank, alpha=2 * size.rank))
    else:
        model = LlamaForCausalLM(size.config())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        trained = model.parameters()
    trained = list(trained)
    if way.checkpointing:
        model.activation_checkpointing_enable()
    modules = q_optim if way.optimizer == "AdamW8bit" else torch.optim
    optimizer: torch.optim.Optimizer = getattr(modules, way.optimizer)(trained, lr=1e-4)
    model.train()
    ids = torch.randint(size.vocabulary, (size.batch, size.length))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    ready = resident("VmRSS") - idle
    Path("/proc/self/clear_refs").write_text(_FORGET_PEAK)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Memory(
        way=way.name,
        parameters=parameters,
        trained=sum(parameter.numel() for parameter in trained),
        weights=q_nn.weight_bytes(model),
        states=q_optim.state_bytes(optimizer),
        idle=idle,
        ready=ready,
        peak=resident("VmHWM") - idle,
    )


def quantized_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """A bfloat16 model of random weights whose layers are made and quantized one after the other."""
    layers, config.num_hidden_layers = config.num_hidden_layers, 0
    model = LlamaForCausalLM(config).bfloat16()
    for index in range(layers):
        layer = LlamaDecoderLayer(config, index).bfloat16()
        q_nn.quantize(layer, q_nn.QConfig("nf4"))
        model.model.layers.append(layer)
    config.num_hidden_layers = layers
    return model


def resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process that are in memory: now, or the most since that was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


if __name__ == "__main__":
    name, size_given = sys.argv[1:]
    print(json.dumps(asdict(train(next(way for way in WAYS if way.name == name), Size(**json.loads(size_given))))))
