"""Integers in groups: what they decode to, and their products, against float64."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from q_core.backend import NoBackendError
from q_core.formats.grouped_int import AffineGroups, GroupedInt, SuperGroups, pack_codes
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.specs import bounds

FORMATS: list[GroupedInt] = [
    AffineGroups(),
    AffineGroups(bits=8, group_size=32, zeros=False),
    AffineGroups(bits=8, group_size=96, scale_dtype=torch.bfloat16, ordered=True),
    AffineGroups(group_size=384, zeros=False, scale_dtype=torch.float32),
    AffineGroups(group_size=32, ordered=True),
    SuperGroups(),
    SuperGroups(group_size=64, per_block=2, ordered=True),
]

formats = pytest.mark.parametrize("format", FORMATS, ids=str)


def make(format: GroupedInt, N: int = 6, K: int = 768, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantizedTensor:
    """Random codes and scales, as a file may hold them; extremes of both are among them."""
    generator = torch.Generator().manual_seed(seed)
    components = format.empty((N, K), "cpu")
    for name, part in components.items():
        if name == "order":
            part.copy_(torch.randperm(K, generator=generator))
        elif part.is_floating_point():
            part.copy_(torch.rand(part.shape, generator=generator) / 16 + 0.001)
        else:
            top = 2**format.bits if name == "zero" else 64 if name in ("scale", "min") else 256
            part.copy_(torch.randint(top, part.shape, generator=generator))
    return QuantizedTensor.from_components(components, format, shape=(N, K), dtype=dtype)


def by_hand(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Decoded in float64 by the definition, and the same with the terms of the product's two parts added up by magnitude."""
    format, parts = weight.format, weight.components
    assert isinstance(format, GroupedInt)
    N, K = weight.shape
    dense, magnitude = torch.zeros(N, K, dtype=torch.float64), torch.zeros(N, K, dtype=torch.float64)
    for j in range(K):
        group, column = j // format.group_size, int(parts["order"][j]) if format.ordered else j
        code = parts["codes"][:, j // 2].double().floor().long()
        code = code % 16 if j % 2 else code // 16
        if format.bits == 8:
            low = parts["low_codes"][:, j // 2].long()
            code = 16 * code + (low % 16 if j % 2 else low // 16)
        if isinstance(format, AffineGroups):
            scale = parts["scale"][:, group].double()
            zero = parts["zero"][:, group].double() if format.zeros else torch.full((N,), 2.0 ** (format.bits - 1)).double()
            offset = scale * zero
        else:
            assert isinstance(format, SuperGroups)
            block = group // format.per_block
            scale = parts["super_scale"][:, block].double() * parts["scale"][:, group].double()
            offset = parts["super_min"][:, block].double() * parts["min"][:, group].double()
        dense[:, column] = scale * code - offset
        magnitude[:, column] = scale * (code + 17 * 8) + offset
    return dense, magnitude


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decodes_by_the_definition(format: GroupedInt, dtype: torch.dtype) -> None:
    weight = make(format, dtype=dtype)
    expected, _ = by_hand(weight)
    assert torch.equal(weight.dequantize(), expected.float().to(dtype))


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(), (0,), (2, 3)])
def test_products(format: GroupedInt, dtype: torch.dtype, tokens: tuple[int, ...]) -> None:
    weight = make(format, dtype=dtype)
    dense, magnitude = by_hand(weight)
    x = torch.randn(*tokens, 768, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    bias = torch.randn(6).to(dtype)
    y = F.linear(x, weight, bias)
    assert y.dtype == dtype and y.shape == (*tokens, 6)
    expected = F.linear(x.double(), dense, bias.double())
    # The two parts of the product are summed in float32, and rounded once.
    bound = product_error(x, magnitude, bias) + expected.abs() * torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= bound).all()

    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad is not None and x.grad.dtype == dtype
    expected = dy.double() @ dense
    bound = product_error(dy, magnitude.T.contiguous(), None) + expected.abs() * torch.finfo(dtype).eps
    assert ((x.grad.double() - expected).abs() <= bound).all()


def product_error(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return bounds.gemm({"x_TK": x.detach().float(), "w_NK": w, "bias": bias}, x)


@formats
def test_rows_copies_and_lookups(format: GroupedInt) -> None:
    weight = make(format, dtype=torch.bfloat16)
    dense = weight.dequantize()
    ids = torch.tensor([[5, 0], [3, 3]])
    assert torch.equal(F.embedding(ids, weight), F.embedding(ids, dense))
    if format.ordered:
        with pytest.raises(ValueError, match="order of its columns can't be cut before row 2"):
            weight[2:5]
    else:
        assert torch.equal(weight[2:5].dequantize(), dense[2:5])
    saved = io.BytesIO()
    torch.save(weight, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(saved), weight.clone(), weight[:]):
        assert isinstance(copied, QuantizedTensor) and copied.format == format
        assert torch.equal(copied.dequantize(), dense)
    assert torch.equal(weight.to(torch.float16).dequantize(), by_hand(weight)[0].float().half())


@formats
def test_compiles_whole(format: GroupedInt) -> None:
    layer = torch.nn.Linear(768, 6)
    layer.weight = torch.nn.Parameter(make(format), requires_grad=False)
    x = torch.randn(3, 768)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@formats
def test_autocast_takes_activations_only(format: GroupedInt) -> None:
    weight, x = make(format), torch.randn(3, 768)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, weight)
    assert torch.equal(y, F.linear(x.bfloat16(), weight))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 96, 352]),
    groups=st.integers(0, 3),
    N=st.integers(0, 5),
    zeros=st.booleans(),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    seed=st.integers(0, 9),
)
def test_rounds_to_the_nearest(bits: int, group_size: int, groups: int, N: int, zeros: bool, spread: float, seed: int) -> None:
    format = AffineGroups(bits, group_size, zeros=zeros, scale_dtype=torch.float32)  # type: ignore[arg-type]
    dense = spread * (torch.randn(N, groups * group_size, generator=torch.Generator().manual_seed(seed)) + 1)
    weight = QuantizedTensor.quantize(dense, format)
    format.check(weight.components, dense.shape)
    half_step = weight.components["scale"].double().repeat_interleave(group_size, 1) / 2
    # A zero point is rounded too, so that the ends of a range may be clamped by as much again.
    assert ((weight.dequantize().double() - dense.double()).abs() <= half_step * (2.001 if zeros else 1.001)).all()
    assert (weight.dequantize()[dense == 0] == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.integers(0, 2),
    N=st.integers(0, 5),
    spread=st.sampled_from([0.0, 1e-2, 1.0, 100.0]),
    shift=st.sampled_from([-9.0, 0.0, 0.5]),
    seed=st.integers(0, 9),
)
def test_rounds_in_super_groups(blocks: int, N: int, spread: float, shift: float, seed: int) -> None:
    format = SuperGroups()
    dense = spread * (torch.randn(N, blocks * 256, generator=torch.Generator().manual_seed(seed)) + shift)
    weight = QuantizedTensor.quantize(dense, format)
    format.check(weight.components, dense.shape)
    parts = {name: part.double() for name, part in weight.components.items()}
    super_scale, super_min = (parts[name].repeat_interleave(256, 1) for name in ("super_scale", "super_min"))
    scale = parts["scale"].repeat_interleave(32, 1) * super_scale
    # Half a step; and where the ends of a range were rounded inwards, what is missing there. Float16 rounds the largest by 2^-11 of it.
    bound = scale / 2 + 0.5 * super_min + 15 * 0.5 * super_scale + 2**-10 * 63 * (super_min + 15 * super_scale) + 1e-6
    assert ((weight.dequantize().double() - dense.double()).abs() <= bound).all()


def test_settings_and_shapes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="AffineGroups: bits is 3, expected 4 or 8"):
        AffineGroups(bits=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size is 48, expected a multiple of 32"):
        AffineGroups(group_size=48)
    with pytest.raises(ValueError, match=r"scale_dtype is torch\.float64"):
        AffineGroups(scale_dtype=torch.float64)
    with pytest.raises(ValueError, match="per_block is 0"):
        SuperGroups(per_block=0)
    with pytest.raises(ValueError, match=r"shape \[4, 100\], expected \[N, K\] with K a multiple of 128"):
        QuantizedTensor.empty((4, 100), AffineGroups(), dtype=torch.float32)
    with pytest.raises(ValueError, match="K is 128, expected a multiple of 256"):
        QuantizedTensor.empty((4, 128), SuperGroups(), dtype=torch.float32)
    parts = {**AffineGroups().empty((4, 128), "cpu"), "zero": torch.zeros(4, 1, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"component 'zero' of a weight \[4, 128\] is torch.int8"):
        QuantizedTensor.from_components(parts, AffineGroups(), shape=(4, 128), dtype=torch.float32)
    with pytest.raises(NoBackendError, match=r"nobody makes the layout 'q_cpu.x' of AffineGroups"):
        make(AffineGroups()).prepack("q_cpu.x")


def test_packing() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    halves = pack_codes(codes, 8)
    assert halves["codes"][0, 8] == 0x11 and halves["low_codes"][0, 8] == 0x01
    assert pack_codes(codes % 16, 4)["codes"][1, :3].tolist() == [0x01, 0x23, 0x45]
