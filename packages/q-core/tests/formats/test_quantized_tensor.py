"""QuantizedTensor: everything torch does with a weight, in every format."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from q_core import ops
from q_core.formats.codebooks import DYNAMIC_SIGNED_BOUND, FOUR_BIT_BOOKS, INT8_BOUND
from q_core.formats.four_bit import FourBit
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor, resolve
from q_core.formats.weight_format import WeightFormat

FORMATS = [
    FourBit(),
    FourBit("fp4", 32),
    FourBit("nf4", 64, 256),
    FourBit("fp4", 128, 32),
    FourBit.of("int4"),
    FourBit.of("mxfp4"),
    FourBit.of("nvfp4"),
    Int8Rows(),
]
NESTED = FourBit("nf4", 64, 256)

formats = pytest.mark.parametrize("format", FORMATS, ids=str)


def make(format: WeightFormat, N: int = 48, K: int = 128, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantizedTensor:
    dense = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return QuantizedTensor.quantize(dense, format)


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert type(a) is type(b) is QuantizedTensor
    assert (a.format, a.shape, a.dtype, a.device) == (b.format, b.shape, b.dtype, b.device)
    for name, component in a.components.items():
        assert torch.equal(component, b.components[name]), name


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    N=st.integers(0, 9),
    K=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_error_is_within_the_formats_bound(format: WeightFormat, N: int, K: int, dtype: torch.dtype, seed: int) -> None:
    dense = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = QuantizedTensor.quantize(dense, format)
    error = (weight.dequantize().double() - dense.double()).abs()
    if isinstance(format, FourBit):
        blocks = F.pad(dense.double().abs().reshape(-1), (0, -dense.numel() % format.blocksize)).view(-1, format.blocksize)
        absmax = resolve(weight)["absmax"].double() if format.nested_blocksize is None else blocks.amax(1)
        # Double quantization misses a scale by its own bound, relative to the largest of its block of centered scales.
        missed = torch.zeros_like(absmax)
        if format.nested_blocksize is not None and absmax.numel():
            centered = (absmax - absmax.mean()).abs().max()
            missed = (centered * DYNAMIC_SIGNED_BOUND).expand_as(absmax)
        limit = (absmax * FOUR_BIT_BOOKS[format.quant_type].bound + missed).repeat_interleave(format.blocksize)
        limit = limit[: dense.numel()].view_as(dense)
    else:
        limit = dense.double().abs().amax(1, keepdim=True) * INT8_BOUND
    rounding = torch.finfo(dtype).eps * dense.double().abs().amax() if dense.numel() else 0
    assert weight.dtype == dtype
    assert bool((error <= limit + rounding).all())


@formats
def test_zero_stays_zero(format: WeightFormat) -> None:
    weight = QuantizedTensor.quantize(torch.zeros(4, 128), format)
    assert torch.equal(weight.dequantize(), torch.zeros(4, 128))


@formats
@pytest.mark.parametrize("K", [128, 100])
def test_linear_is_the_ops_product(format: WeightFormat, K: int) -> None:
    weight, bias = make(format, K=K), torch.randn(48)
    x = torch.randn(2, 3, K, requires_grad=True)
    out = F.linear(x, weight, bias)
    parts = resolve(weight)
    if isinstance(format, FourBit):
        expected = ops.gemm_4bit(
            x,
            parts["packed"],
            parts["absmax"],
            shape=(48, K),
            blocksize=format.blocksize,
            quant_type=format.quant_type,
            bias=bias,
        )
    else:
        expected = ops.gemm_int8_weight(x, parts["codes"], parts["absmax"], bias=bias)
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, (torch.ones(2, 3, 48) @ weight.dequantize()))


@formats
@pytest.mark.parametrize(("V", "K"), [(48, 128), (48, 100), (7, 33), (9, 30), (3, 2), (5, 1)])
def test_embedding_decodes_rows(format: WeightFormat, V: int, K: int) -> None:
    table = nn.Embedding(V, K, padding_idx=0)
    weight = make(format, V, K, dtype=torch.bfloat16)
    table.weight = nn.Parameter(weight, requires_grad=False)
    dense = weight.dequantize()
    every = torch.arange(V).flip(0)
    for ids in (
        every,
        every.int(),
        torch.tensor([[0, V - 1, 2], [2, 2, 1]]),
        torch.tensor(1),
        torch.zeros(0, 3, dtype=torch.int64),
    ):
        assert torch.equal(table(ids), dense[ids.long()])
    for wrong in (-1, V):
        with pytest.raises(IndexError):
            table(torch.tensor([0, wrong]))
    with pytest.raises(TypeError, match="input is float32, expected indices"):
        table(torch.zeros(3))


@formats
@pytest.mark.parametrize("K", [128, 36])
def test_embedding_decodes_no_other_rows(format: WeightFormat, K: int) -> None:
    """As shown by the largest tensor that it makes."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            # Views of the table itself are no work.
            fresh = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t._base is None and not func.is_view]
            Largest.numel = max([Largest.numel, *(t.numel() for t in fresh)])
            return result

    weight = make(format, 4096, K)
    with Largest():
        F.embedding(torch.tensor([5, 4095]), weight)
    assert Largest.numel <= 4 * 2 * K


@formats
def test_parameter_copies_and_pickles_keep_every_bit(format: WeightFormat) -> None:
    weight = nn.Parameter(make(format, dtype=torch.bfloat16), requires_grad=False)
    assert isinstance(weight, QuantizedTensor)
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    with torch.no_grad():
        resolve(weight)
    for other in (
        copy.copy(weight),
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        torch.load(buffer, weights_only=True),
        weight.clone(),
        weight.detach(),
        weight.data,
        weight.to("cpu", copy=True),
    ):
        assert_same(other, weight)
        assert other.cached_bytes == 0
    assert isinstance(copy.deepcopy(weight), nn.Parameter)
    assert isinstance(pickle.loads(pickle.dumps(weight)), nn.Parameter)
    copied = copy.deepcopy([weight, weight])
    assert copied[0] is copied[1]


@formats
def test_move_cast_and_copy(format: WeightFormat) -> None:
    weight = make(format)
    half = weight.to(torch.float16)
    assert half.dtype == half.dequantize().dtype == torch.float16
    assert_same(half.float(), weight)
    meta = weight.to("meta")
    assert meta.is_meta
    assert all(component.is_meta for component in meta.components.values())
    target = torch.empty_like(meta, device="cpu")
    assert_same(target.copy_(weight), weight)
    dense = torch.randn(48, 128)
    assert_same(target.copy_(dense), QuantizedTensor.quantize(dense, format))
    plain = torch.empty(48, 128)
    assert torch.equal(plain.copy_(weight), weight.dequantize())
    assert torch.equal(weight, weight.clone())
    assert not torch.equal(weight, make(format, seed=1))


@formats
def test_module_moves_in_place(format: WeightFormat) -> None:
    linear = nn.Linear(128, 48)
    linear.weight = nn.Parameter(make(format), requires_grad=False)
    before = linear.weight.detach().clone()
    linear.to(torch.bfloat16).to(torch.float32)
    assert_same(linear.weight.detach(), before)
    linear.to("meta").to_empty(device="cpu")
    assert isinstance(linear.weight, nn.Parameter)
    assert linear.weight.format == format


@formats
def test_rows(format: WeightFormat) -> None:
    weight = make(format)
    dense = weight.dequantize()
    assert torch.equal(weight[16:40].dequantize(), dense[16:40])
    assert torch.equal(weight[-8:].dequantize(), dense[-8:])
    assert torch.equal(weight[40:16].dequantize(), dense[40:16])
    assert_same(weight[:], weight)
    for ours, theirs in (
        (weight.chunk(3), dense.chunk(3)),
        (weight.split(20), dense.split(20)),
        (weight.split([8, 40]), dense.split([8, 40])),
    ):
        assert len(ours) == len(theirs)
        assert all(torch.equal(a.dequantize(), b) for a, b in zip(ours, theirs, strict=True))


@formats
def test_rows_share_memory_or_are_not_written_to(format: WeightFormat) -> None:
    """Rows of a double-quantized weight hold decoded scales of their own."""
    weight, new = make(format), torch.randn(16, 128)
    before, rows = weight.dequantize(), weight[16:32]
    if format.derives:
        with pytest.raises(ValueError, match=r"copy_: the target is a part of .*copy into the whole weight"):
            rows.copy_(new)
        assert torch.equal(weight.dequantize(), before)
        return
    rows.copy_(new)
    assert torch.equal(weight[16:32].dequantize(), QuantizedTensor.quantize(new, format).dequantize())
    assert torch.equal(weight[:16].dequantize(), before[:16])
    assert torch.equal(weight[32:].dequantize(), before[32:])


@formats
def test_flat_view(format: WeightFormat) -> None:
    weight = make(format)
    flat = weight.view(-1)
    assert flat.shape == (48 * 128,)
    assert torch.equal(flat.dequantize(), weight.dequantize().view(-1))
    assert_same(weight.view(48, 128), weight)
    with pytest.raises(ValueError, match=r"view of a QuantizedTensor \[48, 128\] as \[128, 48\].*dequantize"):
        weight.view(128, 48)
    with pytest.raises(ValueError, match=r"weight has shape \[6144\], expected two axes"):
        F.linear(torch.ones(2, 6144), flat)
    if isinstance(format, Int8Rows):
        with pytest.raises(ValueError, match="no rows"):
            flat[:3]
    else:
        assert torch.equal(flat[:256].dequantize(), weight[:2].dequantize().view(-1))


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    weight = make(FourBit(), N=8, K=48)  # 64-element blocks end at rows 4 and 8
    assert torch.equal(weight[4:].dequantize(), weight.dequantize()[4:])
    odd = make(FourBit(), N=7, K=33)
    assert odd[7:].shape == (0, 33)
    assert odd[7:].dequantize().shape == (0, 33)
    with pytest.raises(ValueError, match=r"blocks of 64 can't be cut before row 3.*dequantize"):
        weight[:3]


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda w: w + 1, "aten.add.Tensor"),
        (lambda w: torch.ones(3, 48) @ w, "aten.mm"),
        (lambda w: w.t(), "aten.t"),
        (lambda w: w[3], "aten.select.int"),
        (lambda w: w[:, 2:5], "slice"),
        (lambda w: w[::2], "slice"),
        (lambda w: w.chunk(2, dim=1), "split"),
        (lambda w: w.zero_(), "aten.zero_"),
        (lambda w: w.new_zeros(48, 3), "new_zeros"),
        (lambda w: w.as_strided((24, 128), (128, 1)), "as_strided"),
        (lambda w: w.normal_(), "aten.normal_"),
        (lambda w: F.linear(w, torch.ones(3, 128)), "linear"),
        (lambda w: F.embedding(torch.tensor([1]), w, max_norm=1.0), "max_norm"),
    ],
)
@pytest.mark.parametrize("format", [NESTED, Int8Rows()], ids=str)
def test_what_is_not_defined_says_so(operation: object, name: str, format: WeightFormat) -> None:
    assert callable(operation)
    with pytest.raises(ValueError, match=rf"{name}.*dequantize"):
        operation(make(format))


def test_it_does_not_train() -> None:
    weight = make(NESTED)
    with pytest.raises(TypeError, match="doesn't train"):
        nn.Parameter(weight)
    with pytest.raises(TypeError, match="doesn't train"):
        weight.requires_grad = True
    with pytest.raises(TypeError, match="doesn't train"):
        nn.ParameterList([nn.Parameter(weight, requires_grad=False)]).requires_grad_(True)
    assert not weight.requires_grad_(False).requires_grad


def test_bad_input_is_refused() -> None:
    dense = torch.randn(4, 64)
    dense[1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 256 elements are NaN or infinite"):
        QuantizedTensor.quantize(dense, FourBit())
    with pytest.raises(TypeError, match="float64"):
        QuantizedTensor.quantize(torch.zeros(4, 64, dtype=torch.float64), FourBit())
    with pytest.raises(TypeError, match="dequantize"):
        QuantizedTensor.quantize(make(FourBit()), FourBit())
    with pytest.raises(ValueError, match="two axes"):
        QuantizedTensor.quantize(torch.zeros(64), Int8Rows())
    with pytest.raises(TypeError, match="int8"):
        make(FourBit()).to(torch.int8)
    with pytest.raises(ValueError, match=r"different|held as"):
        make(FourBit()).copy_(make(NESTED))
    with pytest.raises(ValueError, match=r"shape \[48, 64\]"):
        make(FourBit()).copy_(torch.zeros(48, 64))
    for bad in ({"quant_type": "int3"}, {"blocksize": 48}, {"nested_blocksize": 7}, {"float32_scales": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FourBit(**bad)
    for quant_type, blocksize in (("mxfp4", 32), ("nvfp4", 16)):
        with pytest.raises(ValueError, match=f"expected None for '{quant_type}', whose scales are a byte each already"):
            FourBit(quant_type, blocksize, 256)
        with pytest.raises(ValueError, match=rf"blocksize is 64, expected one of \({blocksize},\) for '{quant_type}'"):
            FourBit(quant_type)
    with pytest.raises(ValueError, match="a byte each already"):
        FourBit.of("mxfp4", double_quant=True)
    with pytest.raises(ValueError, match="quant_type is 'int3'"):
        FourBit.of("int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocksize is 0"):
        FourBit.of("nf4", blocksize=0)


def test_components_are_checked() -> None:
    parts = make(NESTED).components
    shape, dtype = (48, 128), torch.float32
    assert_same(QuantizedTensor.from_components(parts, NESTED, shape=shape, dtype=dtype), make(NESTED))
    with pytest.raises(ValueError, match="nested_offset"):
        QuantizedTensor.from_components({k: v for k, v in parts.items() if k != "nested_offset"}, NESTED, shape=shape, dtype=dtype)
    with pytest.raises(ValueError, match=r"'packed'.*expected"):
        QuantizedTensor.from_components(parts, NESTED, shape=(48, 64), dtype=dtype)
    with pytest.raises(ValueError, match=r"'absmax'.*float16.*expected.*uint8"):
        QuantizedTensor.from_components(parts | {"absmax": parts["absmax"].half()}, NESTED, shape=shape, dtype=dtype)
    with pytest.raises(ValueError, match="one device"):
        QuantizedTensor.from_components(parts | {"absmax": parts["absmax"].to("meta")}, NESTED, shape=shape, dtype=dtype)


def test_decoded_scales_are_kept_in_inference_alone_and_are_never_stale() -> None:
    weight = make(NESTED)
    resolve(weight)
    assert weight.cached_bytes == 0
    with torch.inference_mode():
        first = resolve(weight)
        assert resolve(weight) is first
    assert weight.cached_bytes == weight.numel() // 64 * 4
    assert weight.stored_bytes == sum(part.nbytes for part in weight.components.values())

    x = torch.randn(3, 128, requires_grad=True)
    F.linear(x, weight).sum().backward()  # what inference mode kept may be saved for a backward

    def fresh() -> Tensor:
        return QuantizedTensor.from_components(weight.components, NESTED, shape=weight.shape, dtype=weight.dtype).dequantize()

    with torch.no_grad():
        weight.copy_(make(NESTED, seed=1))
        assert torch.equal(weight.dequantize(), fresh())
        weight.components["nested_absmax"].mul_(2)  # behind its back, as an in-place load into a state dict does
        assert torch.equal(weight.dequantize(), fresh())


class Plain(nn.Module):
    """A plain linear and an embedding that hold quantized weights."""

    def __init__(self, format: WeightFormat) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 128)
        self.linear = nn.Linear(128, 48)
        self.embedding.weight = nn.Parameter(make(format), requires_grad=False)
        self.linear.weight = nn.Parameter(make(format, seed=1), requires_grad=False)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.embedding(ids) + x)
        return out


@pytest.mark.parametrize("format", [FourBit(), NESTED, FourBit.of("mxfp4"), FourBit.of("nvfp4"), Int8Rows()], ids=str)
def test_compiles_whole_with_dynamic_length_and_backward(format: WeightFormat) -> None:
    torch.compiler.reset()
    model = Plain(format)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9):
        ids = torch.randint(48, (T,))
        x = torch.randn(T, 128, requires_grad=True)
        expected = model(ids, x)
        out = compiled(ids, x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, x), model(ids, x))


@pytest.mark.parametrize("format", [FourBit(), NESTED, FourBit.of("mxfp4"), FourBit.of("nvfp4"), Int8Rows()], ids=str)
def test_exports(format: WeightFormat) -> None:
    model, T = Plain(format), torch.export.Dim("T", min=2, max=64)
    arguments = (torch.randint(48, (5,)), torch.randn(5, 128))
    program = torch.export.export(model, arguments, dynamic_shapes=({0: T}, {0: T}))
    ids, x = torch.randint(48, (9,)), torch.randn(9, 128)
    torch.testing.assert_close(program.module()(ids, x), model(ids, x))


@formats
def test_nothing_refers_to_it_weakly(format: WeightFormat) -> None:
    """``nn.Module.to`` swaps tensors, and refuses those that a weak reference points to."""
    linear = nn.Linear(128, 48)
    linear.weight = nn.Parameter(make(format), requires_grad=False)
    x = torch.randn(3, 128, requires_grad=True)
    linear(x).sum().backward()
    with torch.inference_mode():
        linear(x)
    linear.state_dict()
    copy.deepcopy(linear)
    assert weakref.getweakrefcount(linear.weight) == 0
    linear.to(torch.bfloat16)
    assert linear(x.bfloat16()).dtype == torch.bfloat16


def test_repr_decodes_nothing() -> None:
    assert repr(make(Int8Rows()).to("meta")) == "QuantizedTensor(Int8Rows(), shape=(48, 128), dtype=torch.float32, device='meta')"


# --- writing into one ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [FourBit(), FourBit("fp4", 32, 256), Int8Rows()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_added_is_quantized_again(format: WeightFormat, dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(QuantizedTensor.quantize(torch.randn(8, 64, dtype=dtype), format), requires_grad=False)
    update = torch.randn(8, 64)
    before = weight.dequantize()
    with torch.no_grad():
        weight += update
    assert torch.equal(weight, QuantizedTensor.quantize((before.float() + update).to(dtype), format))
    before = weight.dequantize()
    weight.data -= update
    assert torch.equal(weight, QuantizedTensor.quantize((before.float() - update).to(dtype), format))
    assert weight.format == format and not weight.requires_grad
    unchanged = weight.clone()
    with pytest.raises(ValueError, match="NaN or infinite"):
        weight.data += torch.full((8, 64), torch.nan)
    assert torch.equal(weight, unchanged)
    with pytest.raises(ValueError, match=r"call \.dequantize"):
        torch.randn(8, 64).add_(weight)


def test_new_data_takes_the_place_of_the_old() -> None:
    weight = torch.nn.Parameter(QuantizedTensor.quantize(torch.randn(8, 64), FourBit(nested_blocksize=256)), requires_grad=False)
    assert torch.nn.functional.linear(torch.randn(2, 64), weight).shape == (2, 8)  # scales are decoded, and kept
    other = QuantizedTensor.quantize(torch.randn(8, 64, dtype=torch.bfloat16), FourBit("fp4", 32))
    weight.data = other
    assert (weight.format, weight.dtype, isinstance(weight, torch.nn.Parameter)) == (other.format, torch.bfloat16, True)
    assert torch.equal(weight, other) and weight.cached_bytes == 0 and not hasattr(weight, "nested_absmax")
    weight.data = weight.data.to(torch.float32)
    assert weight.dtype == torch.float32 and torch.equal(weight.dequantize(), other.float().dequantize())
    dense = torch.randn(8, 64)
    weight.data = dense  # as copy_ does
    assert torch.equal(weight, QuantizedTensor.quantize(dense, other.format))
    with pytest.raises(ValueError, match=r"data: the new value has shape \[4, 64\], expected \[8, 64\]"):
        weight.data = torch.randn(4, 64)


def test_isfinite_is_of_what_it_decodes_to() -> None:
    weight = QuantizedTensor.quantize(torch.randn(8, 64), FourBit())
    assert torch.isfinite(weight).shape == weight.shape and bool(torch.isfinite(weight).all())
