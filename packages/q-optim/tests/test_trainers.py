"""Small trainings with accelerate and with transformers' Trainer: they run as they are, and a resumed one ends as if it had gone on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import q_optim
from q_optim import AdamW8bit
from q_optim.optimizer import BlockwiseOptimizer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW8bit": {"lr": 1e-2},
    "AdamW4bit": {"lr": 1e-2},
    "PagedLion8bit": {"lr": 1e-3, "paged_budget": 1 << 14},
}
optimizers = pytest.mark.parametrize("name", list(OPTIMIZERS))


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    """Accelerate keeps what it is in for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).to(dtype)
    return model


def sentences(count: int) -> list[dict[str, Tensor]]:
    """Each token is the one before and a step that the first two give: there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    first, step = torch.randint(96, (count, 1), generator=generator), torch.randint(1, 4, (count, 1), generator=generator)
    ids = (first + step * torch.arange(12)) % 96
    return [{"input_ids": row, "labels": row} for row in ids]


def assert_same_training(a: nn.Module, b: nn.Module, ours: BlockwiseOptimizer, theirs: BlockwiseOptimizer) -> None:
    for (name, mine), other in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(mine, other), name
    mine, other = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert mine.keys() == other.keys() and mine
    for index, state in mine.items():
        assert state.keys() == other[index].keys()
        for key, value in state.items():
            assert torch.equal(value, other[index][key]) if isinstance(value, Tensor) else value == other[index][key]


# --- transformers ---------------------------------------------------------------------------------------------------------


def trainer(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(
        model=make_llama(dtype),
        args=arguments,
        train_dataset=sentences(48),  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=(getattr(q_optim, name), OPTIMIZERS[name] | settings),
    )


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def own_optimizer(trained: Trainer) -> BlockwiseOptimizer:
    optimizer = trained.optimizer
    while not isinstance(optimizer, BlockwiseOptimizer):
        optimizer = optimizer.optimizer  # type: ignore[union-attr]
    return optimizer


@optimizers
def test_trainer(name: str, tmp_path: Path) -> None:
    check_trainer(name, tmp_path)


def test_trainer_of_a_model_in_bfloat16(tmp_path: Path) -> None:
    check_trainer("AdamW8bit", tmp_path, dtype=torch.bfloat16, stochastic_rounding=True)


def check_trainer(name: str, folder: Path, **settings: Any) -> None:
    whole = trainer(name, folder, **settings)
    whole.train()
    assert len(losses(whole)) == 8
    assert sum(losses(whole)[-3:]) < sum(losses(whole)[:3])
    optimizer = own_optimizer(whole)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]  # biases and norms have none, it decides
    held = [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    assert any(tensor.dtype == torch.uint8 for tensor in held)

    resumed = trainer(name, folder, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert losses(resumed) == losses(whole)  # the first four are those of the checkpoint
    assert resumed.state.global_step == 8
    assert_same_training(resumed.model, whole.model, own_optimizer(resumed), optimizer)


def test_trainer_takes_an_optimizer_that_was_made_before(tmp_path: Path) -> None:
    model = make_llama()
    optimizer = AdamW8bit(model.named_parameters(), lr=1e-2)
    optimizer.override(model.model.embed_tokens, optim_bits=32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    trained = Trainer(model=model, args=arguments, train_dataset=sentences(24), optimizers=(optimizer, None))  # type: ignore[arg-type]
    trained.train()
    assert own_optimizer(trained) is optimizer
    assert optimizer.state[model.model.embed_tokens.weight]["state1"].dtype == torch.float32
    assert optimizer.state[model.model.layers[0].self_attn.q_proj.weight]["state1"].dtype == torch.uint8
    assert {state["step"] for state in optimizer.state.values()} == {3}
    assert optimizer.skipped() == {}


# --- accelerate -----------------------------------------------------------------------------------------------------------


Batches = list[dict[str, Tensor]]


def batches() -> Batches:
    rows = sentences(48)
    return [{key: torch.stack([row[key] for row in rows[i : i + 4]]) for key in rows[0]} for i in range(0, 48, 4)]


def prepared(name: str) -> tuple[Accelerator, Any, Any, Any]:
    model = make_llama()
    optimizer = getattr(q_optim, name)(model.parameters(), **OPTIMIZERS[name])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    return (accelerator, *accelerator.prepare(model, optimizer, scheduler))


def run(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, data: Batches) -> list[float]:
    found = []
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found


@optimizers
def test_accelerate(name: str, tmp_path: Path) -> None:
    data = batches()
    accelerator, *parts = prepared(name)
    run(accelerator, *parts, data[:6])
    accelerator.save_state(str(tmp_path))
    expected = run(accelerator, *parts, data[6:])

    accelerator, *resumed = prepared(name)
    accelerator.load_state(str(tmp_path))
    assert run(accelerator, *resumed, data[6:]) == expected
    assert_same_training(resumed[0], parts[0], resumed[1].optimizer, parts[1].optimizer)
    assert {state["step"] for state in resumed[1].optimizer.state.values()} == {6}

    # And it is what the optimizer does without accelerate.
    model = make_llama()
    optimizer = getattr(q_optim, name)(model.parameters(), **OPTIMIZERS[name])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for i in range(0, 12, 2):
        for batch in data[i : i + 2]:
            (model(**batch).loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_same_training(model, parts[0], optimizer, parts[1].optimizer)
