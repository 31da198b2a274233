"""What a model's memory is, and the peak of a piece of code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from q_nn import Linear4bit, LoRAConfig, QConfig, add_lora, measure_peak, memory_report, quantize, weight_bytes

MakeLlama = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize("config", [None, QConfig("nf4"), QConfig("int8")], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_the_rows_are_the_model(make_llama: MakeLlama, ids: torch.Tensor, config: QConfig | None, tied: bool) -> None:
    model = make_llama(tied=tied)
    if config:
        quantize(model, config)
        with torch.no_grad():
            model(ids)
        add_lora(model, LoRAConfig(rank=4))
    report = memory_report(model)
    assert report.weight_bytes == weight_bytes(model)
    assert report.bytes_of("trainable") == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert report.bytes_of("buffer") == sum(buffer.nbytes for buffer in model.buffers())
    assert sum(row.elements for row in report.rows if row.kind != "buffer") == sum(p.numel() for p in model.parameters())
    assert (report.bytes_of("quantized") > 0) == (config is not None)
    assert (report.cached_bytes > 0) == (config == QConfig("nf4"))
    assert report.gradient_bytes == 0
    model.train()(ids, labels=ids).loss.backward()
    report = memory_report(model)
    assert report.gradient_bytes == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["bytes"] == report.rows[0].bytes
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows) + 2
    assert f"{report.weight_bytes:,}" in lines[-1]


def test_a_model_on_meta_takes_what_it_would(make_llama: MakeLlama) -> None:
    model = make_llama()
    quantize(model, QConfig())
    assert memory_report(make_llama().to("meta")).weight_bytes == weight_bytes(make_llama())
    layer = Linear4bit(128, 64, device="meta")
    assert memory_report(layer).weight_bytes == weight_bytes(Linear4bit(128, 64))


needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of a process's peak")


@needs_linux
def test_the_peak_is_what_was_held_at_once() -> None:
    with measure_peak("cpu") as memory:
        with pytest.raises(RuntimeError, match="when the with statement has ended"):
            _ = memory.added_bytes
        assert "so far" in str(memory)
        for _ in range(3):
            torch.ones(2**23)  # 32 MiB, one after the other
    assert 30 * 2**20 < memory.added_bytes < 60 * 2**20
    assert memory.peak_bytes == memory.before_bytes + memory.added_bytes
    assert "resident" in str(memory)
    kept = torch.ones(2**23)
    with measure_peak("cpu") as memory:
        kept.add_(1)
    assert memory.added_bytes < 20 * 2**20
    with pytest.raises(ZeroDivisionError), measure_peak("cpu") as memory:
        _ = 1 // 0
    assert memory.peak_bytes is not None


@needs_linux
def test_a_training_step(make_llama: MakeLlama, ids: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024))  # 32 MiB
    x = torch.randn(4, 1024)
    with measure_peak("cpu") as memory:
        model(x).sum().backward()
    gradients = memory_report(model).gradient_bytes
    assert gradients <= memory.added_bytes < gradients + 40 * 2**20


def test_a_device_that_is_not_here() -> None:
    with pytest.raises(ValueError, match="device is meta, expected 'cpu' or the accelerator here"), measure_peak("meta"):
        pass


class FakeAccelerator:
    """Stands in for torch.accelerator where there is none: an allocator that counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def is_available(self) -> bool:
        return True

    def current_accelerator(self) -> torch.device:
        return torch.device("cuda")

    def synchronize(self, device: torch.device) -> None:
        self.calls.append("synchronize")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.calls.append("reset")

    def memory_allocated(self, device: torch.device) -> int:
        return 10

    def max_memory_allocated(self, device: torch.device) -> int:
        return 30


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_an_accelerator_counts_itself(monkeypatch: pytest.MonkeyPatch, device: str | None) -> None:
    fake = FakeAccelerator()
    monkeypatch.setattr(torch, "accelerator", fake)
    with measure_peak(device) as memory:
        pass
    assert (memory.before_bytes, memory.peak_bytes, memory.added_bytes) == (10, 30, 20)
    assert "allocator" in str(memory)
    assert fake.calls == ["synchronize", "reset", "synchronize"]
