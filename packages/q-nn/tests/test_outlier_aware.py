"""Layers whose outlier columns are known: against the dense layer, LLM.int8(), and what is asked of every module."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_core.specs.bounds import FACTOR
from q_nn import (
    FourBit,
    Int8Rows,
    Linear8bitLt,
    LoRAConfig,
    OutlierAwareLinear,
    add_lora,
    merge_lora,
    observe_outliers,
    save_pretrained,
)

FORMATS = [Int8Rows(), FourBit("nf4", 64, 256), FourBit("fp4", 32)]
formats = pytest.mark.parametrize("format", FORMATS, ids=["int8", "nf4", "fp4"])
COLUMNS = [3, 77, 120]


def planted(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*leading, 130)
    x[..., COLUMNS] *= 60
    return x.to(dtype)


def miss(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(), (0,), (4,), (2, 3)], ids=str)
def test_it_is_the_dense_layer_with_the_rest_rounded(format: WeightFormat, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    dense = nn.Linear(130, 17, dtype=dtype)
    layer = OutlierAwareLinear.from_linear(dense, COLUMNS, format=format)
    assert torch.equal(layer.outlier_weight, dense.weight[:, COLUMNS])
    assert isinstance(layer.base.weight, QuantizedTensor)
    assert layer.base.bias is dense.bias
    assert not layer.base.weight.dequantize()[:, COLUMNS].any()
    x = planted(*leading, dtype=dtype)
    rest = x.index_fill(-1, torch.tensor(COLUMNS), 0)
    base, outliers = layer.base(rest).double(), x[..., COLUMNS].double()
    expected = base + outliers @ layer.outlier_weight.double().T
    out = layer(x)
    assert out.dtype == dtype
    # Three roundings: the base's, the outliers', their sum's.
    magnitude = base.abs() + outliers.abs() @ layer.outlier_weight.double().abs().T
    assert bool(((out - expected).abs() <= 3 * FACTOR[dtype] * torch.finfo(dtype).eps * magnitude).all())


@formats
def test_it_beats_rounding_everything(format: WeightFormat) -> None:
    """Weights' columns that outliers meet aren't rounded, so that it is nearer than LLM.int8() as well."""
    dense, x = nn.Linear(130, 64), planted(32)
    expected = F.linear(x.double(), dense.weight.double(), dense.bias.double())
    with observe_outliers(nn.Sequential(dense)) as found:
        dense(x)
    assert found["0"].nonzero().view(-1).tolist() == COLUMNS
    aware = miss(OutlierAwareLinear.from_linear(dense, found["0"], format=format)(x), expected)
    plain = nn.Linear(130, 64)
    plain.weight, plain.bias = nn.Parameter(QuantizedTensor.quantize(dense.weight, format), requires_grad=False), dense.bias
    assert aware <= miss(plain(x), expected) / 2
    if format == Int8Rows():
        assert aware <= miss(Linear8bitLt.from_linear(dense)(x), expected) / 10
        assert aware <= miss(Linear8bitLt.from_linear(dense, threshold=6.0)(x), expected) / 2


@formats
def test_gradients_go_to_all_columns(format: WeightFormat) -> None:
    layer, x = OutlierAwareLinear.from_linear(nn.Linear(130, 17), COLUMNS, format=format), planted(5).requires_grad_()
    dy = torch.randn(5, 17)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    weight = layer.base.weight.dequantize().index_copy(1, layer.outlier_columns, layer.outlier_weight)
    torch.testing.assert_close(dx, dy @ weight)
    assert not layer.outlier_weight.requires_grad
    layer.outlier_weight.requires_grad_()
    (dweight,) = torch.autograd.grad(layer(x), layer.outlier_weight, dy)
    torch.testing.assert_close(dweight, dy.T @ x[:, COLUMNS])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@formats
def test_copies_state_dicts_graphs(format: WeightFormat) -> None:
    torch.compiler.reset()
    dense, x = nn.Linear(130, 17), planted(5)
    layer = OutlierAwareLinear.from_linear(dense, COLUMNS, format=format)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    target = OutlierAwareLinear.from_linear(nn.Linear(130, 17), [0, 1, 2], format=format)
    target.load_state_dict(layer.state_dict())
    assert torch.equal(target(x), expected)
    assert "outlier_columns=3" in repr(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)


def test_adapters_merge_without_changing_what_it_computes() -> None:
    model = nn.Sequential(OutlierAwareLinear.from_linear(nn.Linear(130, 17), COLUMNS))
    add_lora(model, LoRAConfig(rank=2))
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    nn.init.normal_(adapters[0], std=0.01)
    x = planted(5)
    expected = model(x)
    merge_lora(model)
    assert miss(model(x), expected.double()) < 0.01


def test_observing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.ModuleDict({"idle": nn.Linear(2, 2)})["idle"])
    with observe_outliers(model[:3], threshold=3.0) as found:
        for column in (1, 2):
            x = torch.zeros(2, 3, 4)
            x[1, 0, column] = -3.0
            model[:3](x)
    assert found["0"].tolist() == [False, True, True, False]
    assert found.keys() == {"0", "2"}
    model[0](torch.full((4,), 9.0))
    assert found["0"].tolist() == [False, True, True, False]
    for threshold in (0, -1.0, "6"):
        with pytest.raises(ValueError, match="observe_outliers: threshold is"), observe_outliers(model, threshold=threshold):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ([130], ValueError, "130 to 130, expected 0 to 129"),
        ([-1], ValueError, "-1 to -1"),
        ([1, 1], ValueError, "twice"),
        ([0.5], TypeError, "expected bool"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "expected bool"),
        (torch.zeros(129, dtype=torch.bool), ValueError, r"\[129\], expected \[130\]"),
    ],
)
def test_columns_are_checked(columns: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OutlierAwareLinear.from_linear(nn.Linear(130, 17), columns)


def test_what_it_is_not_made_of(make_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="quantized already"):
        OutlierAwareLinear.from_linear(Linear8bitLt(8, 8), [1])
    assert OutlierAwareLinear.from_linear(nn.Linear(8, 8), [])(torch.ones(2, 8)).shape == (2, 8)
    model: LlamaForCausalLM = make_llama()
    up = model.model.layers[0].mlp
    up.up_proj = OutlierAwareLinear.from_linear(up.up_proj, [5])  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"up_proj is an OutlierAwareLinear, which config.json can't say"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
