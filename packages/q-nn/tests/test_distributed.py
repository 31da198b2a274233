"""Quantized models on two real processes: fully_shard, torch.distributed.checkpoint, DTensor.

The processes live for the whole module, which is why it is one long file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from q_core.formats.four_bit import FourBit
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.sharding import local_shard
from q_core.layouts import CANONICAL
from q_core.testing.private_layout import LAYOUT, private_layout
from q_nn import (
    Linear8bitLt,
    LinearNF4,
    LoRAConfig,
    LoRALinear,
    QConfig,
    add_lora,
    load_into,
    load_lora,
    merge_lora,
    prepare,
    prepare_ddp,
    quantize,
    remove_lora,
    replace_linears,
    save_lora,
    save_pretrained,
    weight_bytes,
)
from two_ranks import on_two_ranks, two_ranks  # noqa: F401

# --- the model ------------------------------------------------------------------------------------------------------------

FORMATS = ["nf4", "nf4 double", "int8"]
formats = pytest.mark.parametrize("format", FORMATS)


def make_linear(format: str, linear: nn.Linear) -> nn.Linear:
    if format == "int8":
        return Linear8bitLt.from_linear(linear)
    return LinearNF4.from_linear(linear, double_quant=format == "nf4 double")


def make_model(format: str, *, seed: int = 0, lora: bool = True, device: str = "cpu", **settings: Any) -> nn.Sequential:
    """Two quantized linear layers with adapters that aren't zero."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = nn.Sequential(
            make_linear(format, nn.Linear(64, 128)), nn.ReLU(), make_linear(format, nn.Linear(128, 64, bias=False))
        )
    if lora:
        for parameter in add_lora(model, LoRAConfig(rank=4, **settings)):
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)
    return model


def shard(model: nn.Sequential, mesh: DeviceMesh | None = None, **options: Any) -> nn.Sequential:
    mesh = mesh or init_device_mesh("cpu", (2,))
    for module in model:
        if isinstance(module, (LoRALinear, nn.Linear)):
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def weights(model: nn.Module) -> list[QuantizedTensor]:
    """The quantized weights, whole."""
    found = []
    for parameter in model.parameters():
        if local_shard(parameter) is not None:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            assert isinstance(whole, QuantizedTensor)
            found.append(whole)
    return found


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    """They decode to the same, bit for bit, and every other parameter is the same."""
    assert len(weights(a)) == len(weights(b)) > 0
    for ours, theirs in zip(weights(a), weights(b), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.dequantize(), theirs.dequantize())
    for (name, ours), (_, theirs) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert not (ours.requires_grad and local_shard(ours) is not None), name
        assert ours.requires_grad == theirs.requires_grad, name
        if local_shard(ours) is None:
            ours, theirs = (t.full_tensor() if isinstance(t, DTensor) else t for t in (ours, theirs))
            assert torch.equal(ours, theirs), name


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int = 3) -> list[Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def own_half(x: Tensor) -> Tensor:
    return x.chunk(2)[dist.get_rank()]


# --- training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh_shape", [(2,), (1, 2), (2, 1)], ids=["FSDP", "HSDP", "HSDP in shards of one rank"])
@formats
@on_two_ranks
def test_training_equals_the_single_process(format: str, mesh_shape: tuple[int, ...]) -> None:
    x, target = torch.randn(8, 64), torch.randn(8, 64)
    single = make_model(format)
    before = copy.deepcopy(single)
    expected = train(single, x, target)

    names = ("replicate", "shard")[-len(mesh_shape) :]
    model = shard(make_model(format), init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    losses = torch.stack(train(model, own_half(x), own_half(target)))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, torch.stack(expected))
    assert losses[0] > losses[-1]
    for (name, ours), theirs, start in zip(model.named_parameters(), single.parameters(), before.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.full_tensor(), theirs, msg=name)
            assert not torch.equal(theirs, start)
    assert all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(weights(model), weights(before), strict=True))


@pytest.mark.parametrize("reshard", [True, False])
@formats
@on_two_ranks
def test_dora_and_rslora_train_as_in_the_single_process(format: str, reshard: bool) -> None:
    """DoRA reads the whole base weight, which is gathered while the layer runs."""
    x, target = torch.randn(8, 64), torch.randn(8, 64)
    settings = {"dora": True, "rslora": True}
    single = make_model(format, **settings)
    before = copy.deepcopy(single)
    expected = train(single, x, target)
    model = shard(make_model(format, **settings), reshard_after_forward=reshard)
    losses = torch.stack(train(model, own_half(x), own_half(target)))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, torch.stack(expected))
    for (name, ours), theirs, start in zip(model.named_parameters(), single.parameters(), before.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.full_tensor(), theirs, msg=name)
            assert not torch.equal(theirs, start)


@on_two_ranks
def test_dora_over_a_base_sharded_apart_is_refused() -> None:
    model = make_model("nf4", dora=True)
    fully_shard(model[0].base_layer, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    with pytest.raises(ValueError, match="sharded apart from the adapter; call fully_shard on the LoRALinear"):
        model[0](torch.randn(3, 64))


@on_two_ranks
def test_adapters_of_a_sharded_model_are_saved_whole(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dora": True, "target": ("0",), "modules_to_save": ("2",)}
    single, model = (nn.Sequential(LinearNF4(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2))
    for each in (single, model):
        torch.manual_seed(0)
        for parameter in add_lora(each, LoRAConfig(rank=4, **settings)):
            nn.init.normal_(parameter)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    folders = [tmp_path / f"{rank}" for rank in (0, 1)]
    save_lora(model, folders[dist.get_rank()])
    dist.barrier()
    assert [folder.exists() for folder in folders] == [True, False]
    save_lora(single, tmp_path / f"single {dist.get_rank()}")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folders[0] / name).read_bytes() == (tmp_path / f"single {dist.get_rank()}" / name).read_bytes()


@formats
@on_two_ranks
def test_each_rank_holds_half(format: str) -> None:
    model = shard(make_model(format, lora=False))
    for parameter in model.parameters():
        if (held := local_shard(parameter)) is not None:
            assert held.shape == (parameter.shape[0] // 2, parameter.shape[1])
            assert sum(part.untyped_storage().nbytes() for part in held.components.values()) == held.stored_bytes
            if isinstance(held.format, FourBit):
                assert held.stored_bytes * 8 == 4.5 * held.numel()
    assert "format=" in repr(model)


@formats
@on_two_ranks
def test_what_was_gathered_is_given_back(format: str) -> None:
    model = make_model(format)
    seen: list[QuantizedTensor] = []
    for module in model:
        if isinstance(module, LoRALinear):
            module.base_layer.register_forward_hook(lambda layer, inputs, out: seen.append(layer.weight))
    shard(model, reshard_after_forward=True)
    model(torch.randn(3, 64)).sum().backward()
    assert len(seen) == 2
    assert all(part.untyped_storage().nbytes() == 0 for weight in seen for part in weight.components.values())
    own = weight_bytes(model)
    assert own < 0.6 * weight_bytes(make_model(format))


@on_two_ranks
def test_a_cast_after_the_first_forward_is_refused() -> None:
    table = nn.Embedding(64, 128)
    table.weight = nn.Parameter(QuantizedTensor.quantize(table.weight, FourBit()), requires_grad=False)
    fully_shard(table, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    ids = torch.tensor([0, 63])
    table.to(torch.bfloat16)
    assert table(ids).dtype == torch.bfloat16
    table.to(torch.float16)
    with pytest.raises(ValueError, match=r"bfloat16 at the first forward.*float16 now"):
        table(ids)


@formats
@on_two_ranks
def test_mixed_precision(format: str) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x = torch.randn(8, 64)
    single = make_model(format).bfloat16()
    model = shard(make_model(format), mp_policy=policy)
    out = model(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, single(x.bfloat16()))
    out.float().pow(2).mean().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32


@on_two_ranks
def test_embedding_decodes_to_the_policys_dtype() -> None:
    table = nn.Embedding(64, 128)
    weight = QuantizedTensor.quantize(table.weight, FourBit())
    table.weight = nn.Parameter(weight, requires_grad=False)
    ids = torch.tensor([0, 63, 40])
    fully_shard(table, mesh=init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert torch.equal(table(ids), weight.to(torch.bfloat16).dequantize()[ids])


@formats
@on_two_ranks
def test_offload_and_gather_again(format: str) -> None:
    x = torch.randn(3, 64)
    expected = make_model(format)(x)
    model = shard(make_model(format), offload_policy=CPUOffloadPolicy(pin_memory=False), reshard_after_forward=True)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)  # the second time into the same buffers


@on_two_ranks
def test_compiled() -> None:
    x = torch.randn(3, 64)
    expected = make_model("nf4")(x)
    model = torch.compile(shard(make_model("nf4")), backend="aot_eager")
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()


@pytest.mark.parametrize("ranks", [1, 2])
@formats
@on_two_ranks
def test_reshard_to_a_number_of_ranks(format: str, ranks: int) -> None:
    x, target = torch.randn(8, 64), torch.randn(8, 64)
    single, model = make_model(format), shard(make_model(format), reshard_after_forward=ranks)
    expected = train(single, x, target)
    losses = torch.stack(train(model, own_half(x), own_half(target)))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, torch.stack(expected))


@formats
@on_two_ranks
def test_a_private_layout_is_given_up_to_shard(format: str) -> None:
    x = torch.randn(4, 64)
    with private_layout():
        layer = make_linear(format, nn.Linear(64, 64))
        expected, dense = layer(x), weights(layer)[0].dequantize()
        layer.weight = layer.weight.prepack(LAYOUT)
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        own = local_shard(layer.weight)
        assert own is not None
        assert own.component_layout == CANONICAL
        assert torch.equal(layer(x), expected)
    layer.reshard()  # type: ignore[attr-defined]
    assert torch.equal(weights(layer)[0].dequantize(), dense)


@pytest.mark.parametrize("gathered", [False, True])
@on_two_ranks
def test_what_needs_a_whole_model_is_refused(tmp_path: Path, gathered: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    adapted, bare = make_model("nf4"), make_model("nf4", lora=False)
    before = copy.deepcopy(adapted.state_dict())
    for model in (adapted, bare):
        fully_shard(model, mesh=mesh, reshard_after_forward=not gathered)
        model(torch.randn(3, 64))
    for call, words in (
        (lambda: merge_lora(adapted), r"merge_lora: the model is sharded.*full_state_dict=True into one, and merge there"),
        (lambda: adapted[0].merged(), r"LoRALinear.merged: .*is sharded.*full_state_dict"),
        (lambda: add_lora(bare, LoRAConfig()), r"add_lora: the model is sharded.*before fully_shard"),
        (lambda: quantize(bare, QConfig()), r"quantize: the model is sharded.*before fully_shard"),
        (lambda: load_lora(bare, tmp_path), r"load_lora: the model is sharded.*before fully_shard"),
        (lambda: remove_lora(adapted), r"remove_lora: the model is sharded"),
        (lambda: load_into(bare, tmp_path), r"load_into: the model is sharded.*before fully_shard"),
        (lambda: replace_linears(bare, {"load_in_4bit": True}), r"replace_linears: the model is sharded.*before fully_shard"),
        (lambda: prepare_ddp(adapted), r"prepare_ddp: the model is sharded"),
    ):
        if gathered and "merged" in words:
            continue  # a child of what is sharded, whose own parameters a forward left whole
        with pytest.raises(ValueError, match=words):
            call()

    options = StateDictOptions(full_state_dict=True)
    whole = make_model("nf4", seed=1)
    whole.load_state_dict(get_model_state_dict(adapted, options=options))  # the way out that the message names
    assert list(whole.state_dict()) == list(before)
    merge_lora(whole)
    single = make_model("nf4")
    merge_lora(single)
    assert_same_weights(whole, single)


# --- DistributedDataParallel ----------------------------------------------------------------------------------------------


@formats
@on_two_ranks
def test_ddp_training_equals_the_single_process(format: str) -> None:
    x, target = torch.randn(8, 64), torch.randn(8, 64)
    single = make_model(format)
    expected = train(single, x, target)
    model = make_model(format, seed=dist.get_rank())  # the second rank's is another model, until it gets the first one's
    ddp = DistributedDataParallel(prepare_ddp(model))
    losses = torch.stack(train(ddp, own_half(x), own_half(target)))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, torch.stack(expected))
    for ours, theirs in zip(weights(model), weights(single), strict=True):
        assert torch.equal(ours.dequantize(), theirs.dequantize())
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours, theirs)


@formats
@on_two_ranks
def test_ddp_sends_weights_whatever_their_layout(format: str) -> None:
    rank, x = dist.get_rank(), torch.randn(3, 64)
    with private_layout():
        first = make_model(format, lora=False)
        model = make_model(format, seed=rank, lora=False)
        for layer in (model[0], model[2]):
            layer.weight = layer.weight.prepack(LAYOUT)
            if rank == 0:  # in the same format then: double-quantized scales are decoded
                layer.weight = layer.weight.unpack()
        prepare_ddp(model)
        assert torch.equal(model[2].weight.dequantize(), first[2].weight.dequantize())
        assert model[0].weight.component_layout == (CANONICAL if rank == 0 else LAYOUT)
        assert model._ddp_params_and_buffers_to_ignore == ["0.weight", "2.weight"]
        model[0].bias = first[0].bias  # which DDP itself sends
        assert torch.equal(model(x), first(x))


@formats
@on_two_ranks
def test_ddp_without_preparation_says_what_to_do(format: str) -> None:
    with pytest.raises(ValueError, match=r"DistributedDataParallel's first broadcast is one: call q_nn\.prepare_ddp"):
        DistributedDataParallel(make_model(format))
    synced = DistributedDataParallel(make_model(format), init_sync=False)
    synced(torch.randn(3, 64)).sum().backward()


@on_two_ranks
def test_ddp_of_different_models_is_refused_by_both() -> None:
    model = make_model("nf4" if dist.get_rank() == 0 else "int8")
    with pytest.raises(ValueError, match=r"0.base_layer.weight is Int8Rows\(\) \[128, 64\] on rank 1 and FourBit.* on rank 0"):
        prepare_ddp(model)


# --- what can't be divided ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "rows", "columns", "message"),
    [
        ("nf4", 129, 64, "doesn't divide into shards of 65 rows.*ignored_params"),
        ("nf4 double", 129, 64, "doesn't divide into shards of 65 rows.*ignored_params"),
        ("int8", 129, 64, "doesn't divide into shards of 65 rows.*ignored_params"),
        ("nf4", 1, 64, "leaves none for some ranks.*ignored_params"),
        ("int8", 1, 64, "leaves none for some ranks.*ignored_params"),
        ("nf4", 6, 32, "blocks of 64 can't be cut before row 3.*ignored_params"),
        ("nf4 double", 2, 100, "blocks of 64 can't be cut before row 1.*ignored_params"),
    ],
)
@on_two_ranks
def test_what_does_not_divide_is_refused_by_fully_shard(format: str, rows: int, columns: int, message: str) -> None:
    linear = nn.Linear(columns, rows)
    layer = LoRALinear(make_linear(format, linear), LoRAConfig())
    with pytest.raises(ValueError, match=message):
        fully_shard(copy.deepcopy(layer), mesh=init_device_mesh("cpu", (2,)))

    x = torch.randn(4, columns)
    expected = layer(x)
    ignored: set[nn.Parameter] = {layer.base_layer.weight}
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), ignored_params=ignored)  # the way out that the message names
    out = layer(x)
    assert torch.equal(out, expected)
    out.sum().backward()


@pytest.mark.parametrize(("format", "columns"), [("nf4", 48), ("nf4 double", 32), ("int8", 37)])
@on_two_ranks
def test_rows_that_are_no_blocks_divide_where_blocks_end(format: str, columns: int) -> None:
    x = torch.randn(4, columns)
    layer = make_linear(format, nn.Linear(columns, 8))
    expected, dense = layer(x), weights(layer)[0].dequantize()
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    assert torch.equal(layer(x), expected)
    layer.reshard()  # type: ignore[attr-defined]
    assert torch.equal(weights(layer)[0].dequantize(), dense)


@formats
@on_two_ranks
def test_columns_are_not_sharded(format: str) -> None:
    layer = make_linear(format, nn.Linear(64, 64))
    with pytest.raises(ValueError, match="whole rows"):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))


# --- state dicts ----------------------------------------------------------------------------------------------------------


@formats
@on_two_ranks
def test_state_dict_is_the_whole_models_in_dtensors(format: str) -> None:
    single = make_model(format.removesuffix(" double")).state_dict() if format != "nf4 double" else None
    model = shard(make_model(format))
    state = model.state_dict()
    if single is not None:
        assert list(state) == list(single)
        for key, value in single.items():
            whole = state[key].full_tensor() if isinstance(state[key], DTensor) else state[key]
            assert (whole.dtype, whole.shape) == (value.dtype, value.shape), key
            assert torch.equal(whole, value), key
    assert not any("nested" in key for key in state)
    assert not any(isinstance(getattr(value, "_local_tensor", value), QuantizedTensor) for value in state.values())
    parts = [key for key in state if key.endswith(("weight", ".absmax", ".SCB"))]
    assert all(isinstance(state[key], DTensor) for key in parts)
    assert torch.equal(model(torch.ones(1, 64)), make_model(format)(torch.ones(1, 64)))


@formats
@on_two_ranks
def test_full_tensor_is_the_weight(format: str) -> None:
    assert_same_weights(shard(make_model(format)), make_model(format))


@formats
@on_two_ranks
def test_state_dict_loads_into_another_sharded_model(format: str) -> None:
    x = torch.randn(3, 64)
    source = shard(make_model(format))
    for assign in (False, True):
        target = shard(make_model(format, seed=1))
        target(x)  # leaves the root's parameters gathered
        target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(target(x), source(x))
        assert_same_weights(target, make_model(format))


@formats
@on_two_ranks
def test_root_that_a_forward_left_gathered(format: str) -> None:
    x = torch.randn(3, 64)
    mesh = init_device_mesh("cpu", (2,))
    source, target = (make_model(format, seed=seed, lora=False)[0] for seed in (0, 1))
    for layer in (source, target):
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
        layer(x)
        assert isinstance(layer.weight, QuantizedTensor)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


@formats
@on_two_ranks
def test_meta_device(format: str) -> None:
    x = torch.randn(3, 64)
    expected = make_model(format, lora=False)
    state = shard(make_model(format, lora=False)).state_dict()
    target = shard(make_model(format, lora=False, device="meta"))
    target.load_state_dict(state, assign=True)
    assert torch.equal(target(x), expected(x))
    target = shard(make_model(format, lora=False, device="meta")).to_empty(device="cpu")
    target.load_state_dict(state)
    assert torch.equal(target(x), expected(x))
    assert_same_weights(target, expected)


@formats
@on_two_ranks
def test_get_and_set_sharded(format: str) -> None:
    source, target = shard(make_model(format)), shard(make_model(format, seed=1))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in (source, target)]
    source(torch.randn(3, 64)).sum().backward()
    optimizers[0].step()
    model_state, optimizer_state = get_state_dict(source, optimizers[0])
    assert list(model_state) == list(source.state_dict())
    set_state_dict(target, optimizers[1], model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert_same_weights(target, source)


@formats
@on_two_ranks
def test_get_and_set_full(format: str) -> None:
    single = make_model(format)
    plain = make_model(format.removesuffix(" double"), seed=2)
    state = get_model_state_dict(shard(make_model(format)), options=StateDictOptions(full_state_dict=True))
    assert not any(isinstance(value, DTensor) for value in state.values())
    plain.load_state_dict(state)
    assert_same_weights(plain, single)

    offloaded = get_model_state_dict(shard(make_model(format)), options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert list(offloaded) == (list(state) if dist.get_rank() == 0 else [])

    for full in (state, get_model_state_dict(single), single.state_dict()):
        target = shard(make_model(format, seed=1))
        set_model_state_dict(target, dict(full), options=StateDictOptions(full_state_dict=True))
        assert_same_weights(target, single)
        target = shard(make_model(format, seed=1))
        target(torch.randn(3, 64))
        assert not torch.equal(weights(target)[0].dequantize(), weights(single)[0].dequantize())


@formats
@on_two_ranks
def test_broadcast_from_rank_0_is_refused_by_both(format: str) -> None:
    single = make_model(format, lora=False)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    target = shard(make_model(format, seed=1, lora=False))
    with pytest.raises((TypeError, ValueError), match=r"copy_|quantize"):
        set_model_state_dict(target, single.state_dict() if dist.get_rank() == 0 else {}, options=options)


@on_two_ranks
def test_dense_weights_are_quantized_as_they_load() -> None:
    dense = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64, bias=False))
    expected = make_model("nf4", lora=False)
    expected.load_state_dict(dense.state_dict())
    target = shard(make_model("nf4", lora=False))
    target.load_state_dict(shard(copy.deepcopy(dense)).state_dict())
    assert_same_weights(target, expected)


@on_two_ranks
def test_what_can_not_be_loaded_is_named_and_leaves_the_weight() -> None:
    target = shard(make_model("nf4", lora=False))
    other_blocks = shard(nn.Sequential(LinearNF4(64, 128, blocksize=128), nn.ReLU(), LinearNF4(128, 64, False, blocksize=128)))
    other_shape = shard(nn.Sequential(LinearNF4(64, 64), nn.ReLU(), LinearNF4(64, 64, False)))
    for state, message in (
        (other_blocks.state_dict(), "0.weight is held as .*128.*sharded as .*64"),
        (other_shape.state_dict(), r"0.weight has shape \[64, 64\], expected \[128, 64\]"),
        (shard(make_model("int8", lora=False)).state_dict(), "0.weight is held as Int8Rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(state, strict=False)
        for after, before in zip(weights(target), weights(make_model("nf4", lora=False)), strict=True):
            assert torch.equal(after.dequantize(), before.dequantize())
    with pytest.raises(RuntimeError, match="sharded as a dense weight"):
        shard(prepare(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64, bias=False)))).load_state_dict(
            target.state_dict()
        )
    with pytest.raises(RuntimeError, match="distributed"):
        make_model("nf4", lora=False).load_state_dict(target.state_dict())


@on_two_ranks
def test_a_sharded_model_is_no_hugging_face_directory(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config)
    quantize(model, QConfig())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match=r"is sharded.*full_state_dict"):
        save_pretrained(model, tmp_path / str(dist.get_rank()))


# --- torch.distributed.checkpoint -----------------------------------------------------------------------------------------


def shared_folder(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoint")


@formats
@on_two_ranks
def test_checkpoint_of_two_loads_into_two_and_into_one(format: str, tmp_path: Path) -> None:
    folder = shared_folder(tmp_path)
    single = make_model(format)
    dcp.save(get_model_state_dict(shard(make_model(format))), checkpoint_id=folder)

    two = shard(make_model(format, seed=1))
    state = two.state_dict()
    dcp.load(state, checkpoint_id=folder)
    two.load_state_dict(state)
    assert_same_weights(two, single)

    one = make_model(format.removesuffix(" double"), seed=1)
    state = one.state_dict()
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    one.load_state_dict(state)
    assert_same_weights(one, single)


@formats
@on_two_ranks
def test_checkpoint_of_one_loads_into_two(format: str, tmp_path: Path) -> None:
    folder = shared_folder(tmp_path)
    single = make_model(format)
    if dist.get_rank() == 0:
        dcp.save(single.state_dict(), checkpoint_id=folder, no_dist=True)
    dist.barrier()
    model = shard(make_model(format, seed=1))
    state = model.state_dict()
    if format == "nf4 double":  # its scales have other keys and sizes than those of the shards
        with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
            dcp.load(state, checkpoint_id=folder)
        return
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state)
    assert_same_weights(model, single)


# --- and on one process ---------------------------------------------------------------------------------------------------


@formats
def test_get_and_set_model_state_dict_without_processes(format: str) -> None:
    source, target = make_model(format), make_model(format, seed=1)
    state = get_model_state_dict(copy.deepcopy(source))
    assert list(state) == list(source.state_dict())
    set_model_state_dict(target, state)
    assert_same_weights(target, source)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard", [False, True])
@formats
def test_on_one_rank(format: str, reshard: bool, one_rank: None) -> None:
    """As where a program for many is tried out: torch gathers the first piece of a parameter alone there."""
    x, target, mesh = torch.randn(8, 64), torch.randn(8, 64), init_device_mesh("cpu", (1,))
    single, model = make_model(format), shard(make_model(format), mesh, reshard_after_forward=reshard)
    assert torch.equal(torch.stack(train(model, x, target)), torch.stack(train(single, x, target)))
    assert_same_weights(model, single)
    for assign in (False, True):  # what was gathered before isn't what is gathered after
        other = make_model(format.removesuffix(" double"), seed=1)
        model.load_state_dict(shard(copy.deepcopy(other), mesh).state_dict(), assign=assign)
        assert torch.equal(model(x), other(x))
        model.load_state_dict(shard(copy.deepcopy(single), mesh).state_dict(), assign=assign)
        assert torch.equal(model(x), single(x))


def test_reshard_to_fewer_ranks_is_refused_by_torch() -> None:
    """Between one rank and all of them, it takes parameters of one piece only. No four processes are needed to see it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        for format in FORMATS:
            model = shard(make_model(format), init_device_mesh("cpu", (4,)), reshard_after_forward=2)
            with pytest.raises((AssertionError, NotImplementedError)):
                model(torch.randn(3, 64))
    finally:
        dist.destroy_process_group()
