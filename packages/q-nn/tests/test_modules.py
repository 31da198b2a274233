"""Every module with a quantized weight: in every format and any shape, against a decoder of its state dict that is written out here."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from q_core.formats.codebooks import DYNAMIC_SIGNED, DYNAMIC_SIGNED_BOUND, FOUR_BIT_BOOKS, INT8_BOUND
from q_core.formats.four_bit import FourBit
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.specs import bounds
from q_nn import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear4bit,
    LinearFP4,
    LinearInt8,
    LinearNF4,
    LoRAConfig,
    add_lora,
    prepare,
)
from q_nn.layers import layer_for


class Kind(NamedTuple):
    """A class with its settings; ``make`` builds it from (columns, rows), as a linear layer's sizes are given."""

    make: Callable[..., nn.Module]
    around: Callable[[Any], nn.Module]
    bits: float


LINEARS = {
    "nf4": Kind(LinearNF4, LinearNF4.from_linear, 4.127),
    "fp4 plain": Kind(partial(LinearFP4, double_quant=False), partial(LinearFP4.from_linear, double_quant=False), 4.5),
    "int4": Kind(partial(Linear4bit, quant_type="int4"), partial(Linear4bit.from_linear, quant_type="int4"), 4.127),
    "mxfp4": Kind(partial(Linear4bit, quant_type="mxfp4"), partial(Linear4bit.from_linear, quant_type="mxfp4"), 4.25),
    "nvfp4": Kind(partial(Linear4bit, quant_type="nvfp4"), partial(Linear4bit.from_linear, quant_type="nvfp4"), 4.5),
    "int8": Kind(LinearInt8, LinearInt8.from_linear, 8 + 32 / 256),
}
EMBEDDINGS = {
    "nf4": Kind(EmbeddingNF4, EmbeddingNF4.from_embedding, 4.127),
    "fp4 plain": Kind(partial(EmbeddingFP4, double_quant=False), partial(EmbeddingFP4.from_embedding, double_quant=False), 4.5),
    "int4 32": Kind(
        partial(Embedding4bit, quant_type="int4", blocksize=32),
        partial(Embedding4bit.from_embedding, quant_type="int4", blocksize=32),
        4.254,
    ),
    "mxfp4": Kind(partial(Embedding4bit, quant_type="mxfp4"), partial(Embedding4bit.from_embedding, quant_type="mxfp4"), 4.25),
    "nvfp4": Kind(partial(Embedding4bit, quant_type="nvfp4"), partial(Embedding4bit.from_embedding, quant_type="nvfp4"), 4.5),
    "int8": Kind(Embedding8bit, Embedding8bit.from_embedding, 8 + 32 / 256),
}
linears = pytest.mark.parametrize("kind", LINEARS.values(), ids=LINEARS)
embeddings = pytest.mark.parametrize("kind", EMBEDDINGS.values(), ids=EMBEDDINGS)
both = pytest.mark.parametrize(
    ("kind", "is_linear"),
    [(kind, True) for kind in LINEARS.values()] + [(kind, False) for kind in EMBEDDINGS.values()],
    ids=[f"Linear {name}" for name in LINEARS] + [f"Embedding {name}" for name in EMBEDDINGS],
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def make(kind: Kind, is_linear: bool, rows: int = 48, columns: int = 100, **options: Any) -> Any:
    return kind.make(columns, rows, **options) if is_linear else kind.make(rows, columns, **options)


def an_input(is_linear: bool, columns: int = 100, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, columns, dtype=dtype) if is_linear else torch.tensor([[0, 47], [9, 9]])


def decoded(module: nn.Module) -> np.ndarray:
    """The weight, float32, from the module's state dict and the formats' definitions alone."""
    state = module.state_dict()
    if "SCB" in state:
        return state["weight"].numpy().astype(np.float32) * (state["SCB"].numpy() / np.float32(127))[:, None]
    (key,) = (key for key in state if "quant_state" in key)
    description = json.loads(bytes(state[key].tolist()))
    shape, blocksize = description["shape"], description["blocksize"]
    bytes_ = state["weight"].view(torch.uint8).flatten().numpy()
    values = state["weight.quant_map"].numpy()[np.stack((bytes_ >> 4, bytes_ & 15), 1).ravel()][: np.prod(shape)]
    absmax = state["weight.absmax"].numpy()
    if "nested_blocksize" in description:
        nested = np.repeat(state["weight.nested_absmax"].numpy(), description["nested_blocksize"])[: len(absmax)]
        absmax = np.array(DYNAMIC_SIGNED, np.float32)[absmax] * nested + np.float32(description["nested_offset"])
    elif description.get("scale_dtype") == "e8m0":
        absmax = (6 * 2.0 ** (absmax.astype(np.float64) - 127)).astype(np.float32)
    elif description.get("scale_dtype") == "e4m3":
        exponent, mantissa = absmax >> 3, absmax & 7
        scale = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(np.float64) - 10))
        absmax = np.float32(6) * (state["weight.tensor_scale"].numpy() * scale.astype(np.float32))
    return (values * np.repeat(absmax, blocksize)[: values.size]).astype(np.float32).reshape(shape)


def weight_of(module: nn.Module) -> QuantizedTensor:
    weight = module.weight
    assert isinstance(weight, QuantizedTensor)
    return weight


# --- values ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(LINEARS.values())),
    N=st.integers(1, 40),
    K=st.integers(1, 150),
    leading=st.sampled_from([(), (0,), (1,), (3,), (2, 3)]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_linear_of_any_shape_is_the_decoded_weights(
    kind: Kind, N: int, K: int, leading: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    layer = kind.make(K, N, bias, dtype=dtype)
    x, weight = torch.randn(*leading, K, dtype=dtype), torch.from_numpy(decoded(layer))
    out = layer(x)
    expected = nn.functional.linear(x.double(), weight.double(), layer.bias.double() if bias else None)
    assert (out.dtype, out.shape) == (dtype, (*leading, N))
    assert bool(((out.double() - expected).abs() <= bounds.gemm({"x_TK": x, "w_NK": weight, "bias": layer.bias}, expected)).all())


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(EMBEDDINGS.values())),
    V=st.integers(1, 40),
    K=st.integers(1, 150),
    leading=st.sampled_from([(), (0,), (1,), (3,), (2, 3)]),
    dtype=st.sampled_from(DTYPES),
    ids_dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_embedding_of_any_shape_is_the_decoded_rows(
    kind: Kind, V: int, K: int, leading: tuple[int, ...], dtype: torch.dtype, ids_dtype: torch.dtype
) -> None:
    table = kind.make(V, K, dtype=dtype)
    ids = torch.randint(V, leading, dtype=ids_dtype)
    out = table(ids)
    assert out.dtype == dtype
    assert torch.equal(out, torch.from_numpy(decoded(table))[ids.long()].to(dtype))


@both
@pytest.mark.parametrize(("rows", "columns"), [(48, 128), (31, 33)])
def test_what_is_lost_is_within_the_formats_bound(kind: Kind, is_linear: bool, rows: int, columns: int) -> None:
    dense = nn.Linear(columns, rows, bias=False) if is_linear else nn.Embedding(rows, columns)
    with torch.no_grad():
        dense.weight.normal_()
    original = dense.weight.detach().double()
    module = kind.around(dense)
    format = weight_of(module).format
    error = (torch.from_numpy(decoded(module)).double() - original).abs()
    if isinstance(format, FourBit):
        book = FOUR_BIT_BOOKS[format.quant_type]
        flat = original.abs().flatten()
        blocks = nn.functional.pad(flat, (0, -flat.numel() % format.blocksize)).view(-1, format.blocksize)
        absmax = blocks.amax(1)
        # The bound is a share of the scale as stored: in E8M0 up to twice the absmax, in E4M3 off by its rounding.
        scale = {"absmax": 1, "e8m0": 2, "e4m3": 1 + 2**-4}[book.scale] * absmax
        double = (absmax - absmax.mean()).abs().max() * DYNAMIC_SIGNED_BOUND if format.nested_blocksize else 0
        limit = (scale * book.bound + double).repeat_interleave(format.blocksize)[: flat.numel()].view_as(original)
    else:
        limit = original.abs().amax(1, keepdim=True) * INT8_BOUND
    assert bool((error <= limit * (1 + 1e-6)).all())
    assert error.max() > limit.max() / 8, "a bound that says something"


@both
def test_bits_a_weight(kind: Kind, is_linear: bool) -> None:
    module = make(kind, is_linear, 1024, 256, device="meta")
    assert weight_of(module).is_meta
    assert weight_of(module).stored_bytes * 8 / weight_of(module).numel() == pytest.approx(kind.bits, abs=2e-3)


@embeddings
def test_ids_that_are_none(kind: Kind) -> None:
    table = kind.make(7, 33)
    for wrong in (-1, 7):
        with pytest.raises(IndexError):
            table(torch.tensor([[0, wrong]]))
    with pytest.raises(TypeError, match="input is float32, expected indices"):
        table(torch.zeros(2))


# --- what modules go through ----------------------------------------------------------------------------------------------


@linears
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_goes_to_the_input(kind: Kind, dtype: torch.dtype) -> None:
    layer = kind.make(100, 24, dtype=dtype)
    x = torch.randn(2, 5, 100, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 5, 24, dtype=dtype)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    weight = torch.from_numpy(decoded(layer))
    expected = dy.double() @ weight.double()
    assert bool(((dx.double() - expected).abs() <= bounds.gemm({"x_TK": dy, "w_NK": weight.T, "bias": None}, expected)).all())
    for reentrant in (True, False):
        again = checkpoint(layer, x, use_reentrant=reentrant)
        assert torch.equal(torch.autograd.grad(again, x, dy)[0], dx) if not reentrant else again.requires_grad
    assert not layer.weight.requires_grad


@linears
def test_autocast(kind: Kind) -> None:
    layer, x = kind.make(64, 32), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, layer(x.bfloat16()))
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@embeddings
def test_embedding_under_autocast_and_adapters(kind: Kind) -> None:
    """Its output is the table's dtype, as a dense one's; gradient checkpointing hooks make it require gradients."""
    table = kind.make(48, 64, dtype=torch.bfloat16)
    model = nn.Sequential(table, LinearNF4(64, 32, dtype=torch.bfloat16))
    add_lora(model, LoRAConfig(rank=2))
    with torch.autocast("cpu", torch.float16):
        assert table(torch.tensor([1])).dtype == torch.bfloat16
    model(torch.tensor([[1, 2]])).float().sum().backward()


@both
def test_copies_moves_and_casts(kind: Kind, is_linear: bool) -> None:
    module, x = make(kind, is_linear, dtype=torch.bfloat16), an_input(is_linear, dtype=torch.bfloat16)
    expected = module(x)
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with torch.inference_mode():
        module(x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module) and isinstance(copied.weight, nn.Parameter)
        assert torch.equal(copied(x), expected)
        assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), state.values(), strict=True))
    cast = copy.deepcopy(module).to(torch.float32)
    assert np.array_equal(decoded(cast), decoded(module))
    moved = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    moved.load_state_dict(state)
    assert torch.equal(moved(x), expected)
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())


@both
def test_state_dict_loads_strictly_everywhere(kind: Kind, is_linear: bool) -> None:
    source, x = make(kind, is_linear, dtype=torch.bfloat16), an_input(is_linear, dtype=torch.bfloat16)
    state, expected = source.state_dict(), source(x)
    assert all(type(tensor) is Tensor for tensor in state.values())
    target = make(kind, is_linear, dtype=torch.bfloat16)
    assert not torch.equal(target(x), expected)
    target.load_state_dict(state)
    assert torch.equal(target(x), expected)
    target = make(kind, is_linear, dtype=torch.bfloat16, device="meta")
    target.load_state_dict(state, assign=True)
    target.to(torch.bfloat16)  # of an int8 weight no checkpoint says the dtype
    assert torch.equal(target(x), expected)
    plain = nn.Linear(100, 48, dtype=torch.bfloat16) if is_linear else nn.Embedding(48, 100, dtype=torch.bfloat16)
    prepare(plain).load_state_dict(state)
    assert weight_of(plain).format == weight_of(source).format
    assert torch.equal(plain(x), expected)


@both
def test_dense_weights_are_quantized_as_they_load(kind: Kind, is_linear: bool) -> None:
    dense = nn.Linear(100, 48) if is_linear else nn.Embedding(48, 100)
    module = make(kind, is_linear)
    module.load_state_dict(dense.state_dict())
    assert np.array_equal(decoded(module), decoded(kind.around(dense)))
    with torch.no_grad():
        dense.weight[3, 4] = float("nan")
    with pytest.raises(RuntimeError, match="1 of 4800 elements are NaN or infinite"):
        module.load_state_dict(dense.state_dict())
    with pytest.raises(ValueError, match="1 of 4800 elements are NaN or infinite"):
        kind.around(dense)


@both
def test_it_says_what_it_is_and_starts_anew(kind: Kind, is_linear: bool) -> None:
    module = make(kind, is_linear)
    before = decoded(module)
    module.reset_parameters()
    assert not np.array_equal(decoded(module), before)
    assert isinstance(module.weight, nn.Parameter) and not module.weight.requires_grad
    assert f"format={weight_of(module).format}" in repr(module)
    assert module.accepts_format(weight_of(module).format)
    if is_linear and not isinstance(module, LinearInt8):  # a format alone doesn't say that activations aren't to be rounded
        assert layer_for(weight_of(module).format) in type(module).__mro__


@both
def test_compiles_whole_and_exports(kind: Kind, is_linear: bool) -> None:
    torch.compiler.reset()
    module = make(kind, is_linear)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 2):
        x = torch.randn(T, 100, requires_grad=True) if is_linear else torch.randint(48, (T,))
        out, expected = compiled(x), module(x)
        torch.testing.assert_close(out, expected)
        if is_linear:
            torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
    program = torch.export.export(module, (x.detach(),), dynamic_shapes=({0: torch.export.Dim("T", max=64)},))
    x = torch.randn(7, 100) if is_linear else torch.randint(48, (7,))
    torch.testing.assert_close(program.module()(x), module(x))


# --- tied ------------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A table that is the output layer's weight too."""

    def __init__(self, kind: Kind, head: Callable[..., nn.Module], device: str = "cpu") -> None:
        super().__init__()
        self.embedding = kind.make(48, 64, device=device)
        self.head = head(64, 48, bias=False, device="meta")
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(ids))
        return out


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (EMBEDDINGS["nf4"], LinearNF4),
        (EMBEDDINGS["nvfp4"], Linear4bit),
        (EMBEDDINGS["int8"], LinearInt8),
        (EMBEDDINGS["int8"], nn.Linear),
    ],
    ids=["nf4", "nvfp4", "int8", "plain head"],
)
def test_a_tied_head_stays_tied(kind: Kind, head: Callable[..., nn.Module]) -> None:
    model, other, ids = Tied(kind, head), Tied(kind, head), torch.tensor([1, 47])
    assert len(list(model.parameters())) == 1
    expected = nn.functional.linear(model.embedding(ids), weight_of(model.embedding).dequantize())
    torch.testing.assert_close(model(ids), expected)
    prepare(model), prepare(other)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to(torch.bfloat16).float()):
        assert same.head.weight is same.embedding.weight
        torch.testing.assert_close(same(ids), expected)
    other.load_state_dict(model.state_dict())
    assert other.head.weight is other.embedding.weight
    torch.testing.assert_close(other(ids), expected)


# --- the peer ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("ours", [EmbeddingNF4, EmbeddingFP4])
def test_bitsandbytes_4_bit_embedding(ours: type[Embedding4bit], columns: int, dtype: torch.dtype) -> None:
    """The same scales, and the same rows, where theirs decodes the whole table for each."""
    dense = nn.Embedding(96, columns, dtype=dtype)
    theirs = bnb.nn.Embedding4bit(96, columns, dtype=dtype, quant_type=ours.fixed_type)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    table = ours.from_embedding(dense, double_quant=False)
    ids = torch.randint(96, (4, 7))
    parts = weight_of(table).components
    assert torch.equal(parts["absmax"], theirs.weight.quant_state.absmax)
    if ours is EmbeddingNF4:  # FP4 has two codes of zero
        assert torch.equal(parts["packed"], theirs.weight.data.flatten())
    assert torch.equal(table(ids), theirs(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitsandbytes_8_bit_embedding(dtype: torch.dtype) -> None:
    dense = nn.Embedding(96, 100, dtype=dtype)
    theirs = bnb.nn.Embedding8bit(96, 100, dtype=dtype)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    table = Embedding8bit.from_embedding(dense)
    parts = weight_of(table).components
    ids = torch.randint(96, (4, 7))
    # Theirs rounds the table to float16 first.
    torch.testing.assert_close(parts["absmax"], theirs.weight.SCB, rtol=EPS[torch.float16], atol=0)
    assert int((parts["codes"].int() - theirs.weight.data.int()).abs().max()) <= 1
    table.load_state_dict({"weight": theirs.weight.data, "SCB": theirs.weight.SCB})
    assert torch.equal(table(ids), theirs(ids))


# --- what is refused --------------------------------------------------------------------------------------------------------


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="quant_type is 'fp4', expected 'nf4'; leave it out"):
        LinearNF4(8, 8, quant_type="fp4")
    with pytest.raises(ValueError, match="quant_type is 'nf4', expected 'fp4'"):
        EmbeddingFP4.from_embedding(nn.Embedding(8, 8), quant_type="nf4")
    for module in (Linear4bit, Embedding4bit):
        with pytest.raises(
            ValueError, match=r"expected None for 'mxfp4', whose scales are a byte each already; leave double quant"
        ):
            module(8, 8, quant_type="mxfp4", double_quant=True)
        with pytest.raises(ValueError, match=r"blocksize is 64, expected one of \(16,\) for 'nvfp4'"):
            module(8, 8, quant_type="nvfp4", blocksize=64)
        with pytest.raises(ValueError, match="quant_type is 'int3'"):
            module(8, 8, quant_type="int3")


@pytest.mark.parametrize("make", [Embedding8bit.from_embedding, EmbeddingNF4.from_embedding], ids=["8bit", "nf4"])
def test_embeddings_that_are_more_than_a_table(make: Callable[[nn.Embedding], nn.Embedding]) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 8

    with pytest.raises(TypeError, match="Scaled with a forward of its own"):
        make(Scaled(8, 32))
    for setting in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        (name,) = setting
        with pytest.raises(ValueError, match=f"from_embedding: embedding can't be quantized: its {name} is .*expected"):
            make(nn.Embedding(8, 32, **setting))
        with pytest.raises(TypeError, match=name):
            Embedding8bit(8, 32, **setting)
    table = make(nn.Embedding(8, 32, padding_idx=3).eval())
    assert table.padding_idx == 3 and not table.training
    assert not table(torch.tensor([3])).any()
    table.reset_parameters()
    assert not table(torch.tensor([3])).any() and table(torch.tensor([2])).any()


def test_another_format_is_refused() -> None:
    for module, wrong in ((EmbeddingNF4, EmbeddingFP4), (EmbeddingNF4, Embedding8bit), (Embedding8bit, EmbeddingNF4)):
        table = module(8, 32)
        before = decoded(table)
        with pytest.raises(RuntimeError, match=f"which {module.__name__} doesn't take"):
            table.load_state_dict(wrong(8, 32).state_dict())
        assert np.array_equal(decoded(table), before)
    source, target = Linear4bit(32, 8, quant_type="mxfp4"), Linear4bit(32, 8)
    target.load_state_dict(source.state_dict())
    assert weight_of(target).format == FourBit.of("mxfp4")
    with pytest.raises(RuntimeError, match="which LinearNF4 doesn't take"):
        LinearNF4(32, 8).load_state_dict(source.state_dict())
