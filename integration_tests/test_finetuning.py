"""The evidence for fine-tuning is gathered as it says; here on small models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demo.settings import SMOKE
from finetuning import __main__ as program
from finetuning import memory, quality, report
from pages import write_between

SMALL = memory.Size(hidden=512, layers=4, vocabulary=2048, length=32, threads=1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are faster so, and the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def memories() -> list[memory.Memory]:
    return [memory.measure(way, SMALL) for way in memory.WAYS]


@pytest.fixture(scope="module")
def errors() -> list[quality.Error]:
    return quality.output_errors()


def test_memory_is_what_is_held(memories: list[memory.Memory]) -> None:
    full, full8bit, qlora, frugal = memories
    assert full.parameters == full.trained == qlora.parameters > 13e6 and frugal.trained < 0.05 * full.trained
    assert 0 <= full.weights - 4 * full.parameters < 1e4 and full.states >= 8 * full.parameters  # and a few buffers
    for found in memories:
        gradients = 4 * found.trained
        held = found.weights + gradients + found.states
        # Beyond what is held there are activations and, as this is a small model, code that training is the first to touch.
        assert held < found.peak < held + 200e6, found
        assert found.ready >= 0.9 * found.weights
    assert full.peak > full8bit.peak > qlora.peak
    assert frugal.states < 0.3 * qlora.states and full8bit.states < 0.26 * full.states


def test_the_small_quantized_llama_is_one(memories: list[memory.Memory]) -> None:
    model = memory.quantized_llama(SMALL.config())
    assert len(model.model.layers) == model.config.num_hidden_layers == SMALL.layers
    assert model(input_ids=torch.arange(8).view(1, 8)).logits.isfinite().all()
    assert sum(parameter.numel() for parameter in model.parameters()) == memories[0].parameters


@pytest.mark.parametrize("architecture", quality.ARCHITECTURES)
def test_outputs_err_as_weights_do(errors: list[quality.Error], architecture: str) -> None:
    found = [error for error in errors if error.architecture == architecture]
    assert [error.format for error in found] == [format.title for format in quality.FORMATS]
    for error in found:
        assert 0.2 * error.allowed < error.output < error.allowed
    nf4, fp4, int8, rounding = found
    assert fp4.output > nf4.output > 5 * rounding.output and rounding.output > int8.output


def test_perplexities_of_a_short_training() -> None:
    found = quality.perplexities(SMOKE, seconds=20)
    assert list(found) == [quality.DENSE, *(format.title for format in quality.FORMATS)]
    assert found[quality.DENSE] < 0.9 * SMOKE.vocab_size, "it has learned something"
    for format in quality.FORMATS:
        assert found[format.title] < 1.05 * found[quality.DENSE]


def test_the_page_has_every_figure(memories: list[memory.Memory], errors: list[quality.Error]) -> None:
    perplexities = {quality.DENSE: 80.0, **{format.title: 80.4 for format in quality.FORMATS}}
    page = report.markdown(memories, SMALL, perplexities, errors)
    assert all(way.title in page for way in memory.WAYS)
    assert f"{memories[-1].peak / 1e6:.0f} | {memories[-1].peak / memories[0].peak:.1%}" in page
    assert page.count("1.0050") == len(quality.FORMATS) and all(f"{error.output:.2%}" in page for error in errors)


def test_what_is_missed_is_said(memories: list[memory.Memory], errors: list[quality.Error]) -> None:
    first = memories[0]
    good = [*memories[:-1], replace(first, peak=first.peak // 20)]
    perplexities = {quality.DENSE: 80.0, **{format.title: 80.0 for format in quality.FORMATS}}
    assert program.missed(good, perplexities, errors) == []
    worse = {**perplexities, quality.FORMATS[0].title: 82.0}
    bad = replace(errors[0], output=1.0)
    said = program.missed([first, replace(first, peak=first.peak // 5)], worse, [bad])
    assert said == [
        "a step of QLoRA, `AdamW8bit`, gradient checkpointing takes 20.0% of the first's memory, over 10%",
        "perplexity in NF4, double-quantized is 1.0250 × the dense one, over 1.01",
        f"Llama in NF4, double-quantized: the output errs by 100.00%, over {bad.allowed:.2%}",
    ]


def test_a_table_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- memory -->\nold\n<!-- end of memory -->\nafter\n")
    write_between(page, "memory", ["| new |", "| --- |"])
    write_between(page, "memory", ["| new |", "| --- |"])
    assert page.read_text() == "before\n<!-- memory -->\n\n| new |\n| --- |\n\n<!-- end of memory -->\nafter\n"
    with pytest.raises(ValueError, match="0 places"):
        write_between(page, "speed", [])
