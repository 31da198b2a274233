"""PEFT's adapters over quantized layers: they train, merge into the weights as ours do, and are saved; Trainer takes such models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import q_nn.hf
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn import LoRAConfig, LoRALinear, QConfig, QRule, add_lora, merge_lora, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
MakeLlama = Callable[..., LlamaForCausalLM]
FORMATS = [QConfig("nf4"), QConfig("int8"), QConfig("fp4", rules=(QRule(".*mlp", "int8", threshold=0.0),))]
formats = pytest.mark.parametrize("config", FORMATS, ids=str)
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def load(make_llama: MakeLlama, tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """Quantizes a model while it is loaded."""
    make_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")

    def loaded(config: QConfig, **arguments: Any) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, **arguments)
        return model

    return loaded


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids).logits
    return out


def adapted(model: PreTrainedModel, **arguments: Any) -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **arguments))


def factors(model: nn.Module, kind: type[nn.Module]) -> dict[tuple[str, str], nn.Parameter]:
    """The weights of adapters by the name of the layer that they are beside, and "A" or "B"."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, kind):
            for own, parameter in layer.named_parameters():
                if "lora_" in own:
                    found[name.removeprefix("base_model.model."), "A" if "lora_A" in own else "B"] = parameter
    return found


def ours_with(peft_model: PeftModel, model: nn.Module) -> nn.Module:
    """Our own adapters, with the same numbers, over a copy of the model."""
    add_lora(model, LoRAConfig(rank=4, alpha=8))
    theirs, ours = factors(peft_model, PeftLinear), factors(model, LoRALinear)
    assert ours.keys() == theirs.keys() and len(ours) == 28
    with torch.no_grad():
        for key, parameter in ours.items():
            parameter.copy_(theirs[key])
    return model


@formats
def test_all_linear_layers_get_adapters(load: Callable[..., PreTrainedModel], config: QConfig) -> None:
    model = adapted(load(config))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PeftLinear)}
    assert {name.rpartition(".")[2] for name in layers} == LINEARS and len(layers) == 14
    assert all(isinstance(layer.base_layer.weight, QuantizedTensor) for layer in layers.values())
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}


@formats
def test_a_step_is_that_of_our_own_adapters(load: Callable[..., PreTrainedModel], ids: Tensor, config: QConfig) -> None:
    base = load(config, dtype=torch.float32)
    own = copy.deepcopy(base)
    model = adapted(base, init_lora_weights=False)
    own = ours_with(model, own)
    for one in (model, own):
        one.train()
        one(input_ids=ids, labels=ids).loss.backward()
    theirs = factors(model, PeftLinear)
    for key, parameter in factors(own, LoRALinear).items():
        gradient = theirs[key].grad
        assert gradient is not None and parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("config", "dtype", "safe"),
    [
        *((config, torch.float32, False) for config in FORMATS),
        (FORMATS[0], torch.bfloat16, False),
        (FORMATS[0], torch.bfloat16, True),
        (FORMATS[1], torch.float32, True),
    ],
    ids=str,
)
def test_merging_is_that_of_our_own_adapters(
    load: Callable[..., PreTrainedModel], ids: Tensor, config: QConfig, dtype: torch.dtype, safe: bool
) -> None:
    base = load(config, dtype=dtype)
    own = copy.deepcopy(base)
    model = adapted(base, init_lora_weights=False)
    merge_lora(own := ours_with(model, own))
    before = logits(model, ids)
    merged = model.merge_and_unload(safe_merge=safe)
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in own.named_modules()}
    if dtype == torch.float32 or not safe:  # a safe merge casts the update to the weight's dtype before it adds it
        for ours, theirs in zip(own.parameters(), merged.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    after, without = logits(merged, ids), logits(load(config, dtype=dtype), ids)
    assert (after - before).norm() < (without - before).norm()


@formats
def test_unmerging_goes_back_within_the_format(load: Callable[..., PreTrainedModel], config: QConfig) -> None:
    model = adapted(load(config, dtype=torch.float32), init_lora_weights=False)
    layers = [layer for layer in model.modules() if isinstance(layer, PeftLinear)]
    before = [layer.base_layer.weight.dequantize() for layer in layers]
    model.merge_adapter()
    merged = [layer.base_layer.weight.dequantize() for layer in layers]
    model.unmerge_adapter()
    for layer, old, new in zip(layers, before, merged, strict=True):
        assert isinstance(layer.base_layer.weight, QuantizedTensor)
        update = layer.get_delta_weight("default")
        assert (new - old - update).norm() < update.norm()
        assert (layer.base_layer.weight.dequantize() - old).norm() < update.norm()


def test_an_adapter_that_is_not_finite_is_not_merged(load: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    model = adapted(load(QConfig()), init_lora_weights=False)
    layer = next(layer for layer in model.modules() if isinstance(layer, PeftLinear))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    before = layer.base_layer.weight.clone()
    for safe in (False, True):
        with pytest.raises(ValueError, match="NaN or infinite"):
            layer.merge(safe_merge=safe)
        assert torch.equal(layer.base_layer.weight, before)


@formats
def test_adapters_are_saved_and_loaded(load: Callable[..., PreTrainedModel], ids: Tensor, tmp_path: Path, config: QConfig) -> None:
    model = adapted(load(config), init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    again = PeftModel.from_pretrained(load(config), tmp_path / "adapter")
    assert torch.equal(logits(again, ids), logits(model, ids))

    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = q_nn.hf.from_pretrained(tmp_path / "merged")
    for a, b in zip(merged.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("reentrant", "in_place"), [(False, False), (True, True)])
def test_prepared_for_training_with_checkpointing(
    make_llama: MakeLlama, load: Callable[..., PreTrainedModel], ids: Tensor, reentrant: bool, in_place: bool
) -> None:
    if in_place:
        quantize(model := make_llama(dtype=torch.bfloat16), QConfig())
        q_nn.hf.adopt(model)
    else:
        model = load(QConfig())
    held = {name: p.packed.clone() for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, p in model.named_parameters():
        assert not p.requires_grad
        assert isinstance(p, QuantizedTensor) == (name in held)
        assert name not in held or torch.equal(p.packed, held[name])

    model = adapted(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


class Lines(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A few rows of tokens."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.arange(8) + index
        return {"input_ids": row, "labels": row}


def test_trainer_takes_adapters_and_refuses_a_bare_quantized_model(load: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, logging_steps=1,
        learning_rate=1e-2, save_steps=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load(QConfig()), arguments, train_dataset=Lines())
    trainer = Trainer(adapted(load(QConfig())), arguments, train_dataset=Lines())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = PeftModel.from_pretrained(load(QConfig()), tmp_path / "out" / "checkpoint-3")
    ids = torch.arange(8)[None]
    assert torch.equal(logits(again.eval(), ids), logits(trainer.model.eval(), ids))
