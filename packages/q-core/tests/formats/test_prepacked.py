"""Quantized weights held in a backend's private layout: its products read them, and all the rest sees the canonical layout."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from q_core import FourBit, Int8Rows, NoBackendError, QuantizedTensor, use_backends
from q_core.formats.checkpoint import from_flat, to_flat
from q_core.formats.quantized_tensor import held_components
from q_core.formats.weight_format import WeightFormat
from q_core.layouts import CANONICAL
from q_core.testing import installed_backends
from q_core.testing.private_layout import LAYOUT, private_layout, turn

NESTED = FourBit("nf4", 64, 256)
FORMATS = [FourBit(), FourBit("fp4", 32), FourBit("int4", 64), NESTED, Int8Rows()]
formats = pytest.mark.parametrize("format", FORMATS, ids=str)
N, K = 12, 128


@pytest.fixture(autouse=True)
def acme() -> Iterator[None]:
    with private_layout():
        yield


def canonical(format: WeightFormat, *, seed: int = 0) -> QuantizedTensor:
    """A weight with its scales decoded, as prepacking leaves them."""
    return QuantizedTensor.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(seed)), format)[:]


def assert_canonical(weight: QuantizedTensor, expected: QuantizedTensor) -> None:
    """In the canonical layout, and bit for bit what ``expected`` decodes to."""
    assert type(weight) is QuantizedTensor
    assert (weight.component_layout, weight.format) == (CANONICAL, expected.format.resolved_format)
    plain = expected.prepack(LAYOUT).unpack() if expected.format.derives else expected
    for name, component in held_components(weight).items():
        assert torch.equal(component, getattr(plain, name)), name
    assert torch.equal(weight.dequantize(), expected.dequantize())


@formats
def test_prepacked_components_take_the_place_of_the_canonical_ones(format: WeightFormat) -> None:
    weight = canonical(format)
    private = weight.prepack(LAYOUT)
    assert (private.component_layout, private.format) == (LAYOUT, format.resolved_format)
    assert (private.shape, private.dtype, private.device) == (weight.shape, weight.dtype, weight.device)
    assert repr(private).endswith(f"layout='{LAYOUT}')")
    assert private.prepack(LAYOUT) is private
    assert weight.unpack() is weight
    assert_canonical(private.unpack(), weight)
    for name, component in private.unpack().components.items():
        assert torch.equal(getattr(private, name), turn(component)), name
    assert private.stored_bytes == private.unpack().stored_bytes
    assert private.cached_bytes == 0
    held = held_components(private).values()
    assert sum(part.untyped_storage().nbytes() for part in held) == private.stored_bytes


@formats
def test_products_and_gradients(format: WeightFormat) -> None:
    weight, bias = canonical(format), torch.randn(N)
    x = torch.randn(2, 3, K, requires_grad=True)
    results = []
    for held in (weight, weight.prepack(LAYOUT)):
        out = F.linear(x, held, bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    private = weight.prepack(LAYOUT)
    with use_backends("acme"):  # nobody else could have served it
        assert torch.equal(F.linear(x.detach(), private, bias), results[0][0])


def through_torch_save(weight: QuantizedTensor) -> QuantizedTensor:
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert isinstance(loaded, QuantizedTensor)
    return loaded


LEAVES: dict[str, Callable[[QuantizedTensor], QuantizedTensor]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "torch.save": through_torch_save,
    "clone": torch.clone,
    "to copy": lambda weight: weight.to("cpu", copy=True),
    "to dtype and back": lambda weight: weight.to(torch.bfloat16).to(torch.float32),
    "components": lambda weight: QuantizedTensor.from_components(
        weight.components, weight.format, shape=weight.shape, dtype=weight.dtype
    ),
    "checkpoint": lambda weight: from_flat("weight", to_flat("weight", weight), dtype=weight.dtype),
}


@formats
@pytest.mark.parametrize("way", LEAVES)
def test_what_leaves_is_canonical(format: WeightFormat, way: str) -> None:
    weight = canonical(format)
    assert_canonical(LEAVES[way](weight.prepack(LAYOUT)), weight)


@formats
def test_what_shares_memory_keeps_the_layout(format: WeightFormat) -> None:
    private = nn.Parameter(canonical(format).prepack(LAYOUT), requires_grad=False)
    assert isinstance(private, QuantizedTensor)
    for other in (private.detach(), private.data, private[:], private.view(N, K), private.to(torch.float32)):
        assert isinstance(other, QuantizedTensor)
        assert other.component_layout == LAYOUT
        for name, component in held_components(other).items():
            assert component.data_ptr() == getattr(private, name).data_ptr()


@formats
def test_everything_but_the_product_decodes_first(format: WeightFormat) -> None:
    weight = canonical(format)
    private, dense = weight.prepack(LAYOUT), weight.dequantize()
    assert torch.equal(private.dequantize(), dense)
    ids = torch.tensor([[0, 11], [3, 3]])
    assert torch.equal(F.embedding(ids, private), dense[ids])
    assert torch.equal(private, weight)
    assert_canonical(private[4:8], weight[4:8])
    for ours, theirs in zip(private.chunk(3), weight.chunk(3), strict=True):
        assert_canonical(ours, theirs)
    flat = private.view(-1)
    assert flat.component_layout == CANONICAL
    assert torch.equal(flat.dequantize(), dense.view(-1))
    empty = torch.empty_like(private)
    assert (empty.component_layout, empty.shape) == (CANONICAL, weight.shape)
    assert private.to("meta").component_layout == CANONICAL


@formats
def test_copy_keeps_the_targets_layout(format: WeightFormat) -> None:
    target, new, x = canonical(format).prepack(LAYOUT), canonical(format, seed=1), torch.randn(3, K)
    for source in (new, new.prepack(LAYOUT), new.to("cpu", copy=True)):
        target.copy_(canonical(format).prepack(LAYOUT))
        assert not torch.equal(F.linear(x, target), F.linear(x, new))
        target.copy_(source)
        assert target.component_layout == LAYOUT
        assert torch.equal(F.linear(x, target), F.linear(x, new))
    dense = torch.randn(N, K)
    target.copy_(dense)
    assert torch.equal(target.dequantize(), QuantizedTensor.quantize(dense, format.resolved_format).dequantize())

    back = canonical(format.resolved_format, seed=2)
    back.copy_(target)
    assert torch.equal(back.dequantize(), target.dequantize())
    plain = torch.empty(N, K)
    assert torch.equal(plain.copy_(target), target.dequantize())
    with pytest.raises(ValueError, match="held as"):
        target.copy_(canonical(FourBit("nf4", 128)))


@formats
def test_module_moves_and_parameters(format: WeightFormat) -> None:
    linear, x = nn.Linear(K, N), torch.randn(3, K)
    linear.weight = nn.Parameter(canonical(format), requires_grad=False)
    expected = linear(x)
    linear.weight = linear.weight.prepack(LAYOUT)
    assert isinstance(linear.weight, nn.Parameter)
    assert not linear.weight.requires_grad
    assert torch.equal(linear(x), expected)
    linear.to(torch.float32)  # nothing to do, so nothing done
    assert linear.weight.component_layout == LAYOUT
    linear.to(torch.bfloat16).to(torch.float32)
    assert isinstance(linear.weight, nn.Parameter)
    assert_canonical(linear.weight.detach(), canonical(format))
    linear.weight = linear.weight.prepack(LAYOUT).unpack()
    assert isinstance(linear.weight, nn.Parameter)


class Plain(nn.Module):
    """A product and rows of one weight."""

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.embedding(ids, self.weight) + x, self.weight)


@pytest.mark.parametrize("format", [FourBit(), NESTED, Int8Rows()], ids=str)
def test_a_compiled_module_follows_the_layout(format: WeightFormat) -> None:
    torch.compiler.reset()
    model = Plain(canonical(format))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, x = torch.randint(N, (5,)), torch.randn(5, K, requires_grad=True)
    expected = model(ids, x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for change in (lambda w: w, lambda w: w.prepack(LAYOUT), lambda w: w.unpack()):
        model.weight = change(model.weight)
        out = compiled(ids, x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], gradient)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, x), expected)


@pytest.mark.parametrize("strict", [False, True])
@formats
def test_export_is_refused_until_the_weight_is_canonical(format: WeightFormat, strict: bool) -> None:
    model, arguments = Plain(canonical(format).prepack(LAYOUT)), (torch.randint(N, (5,)), torch.randn(5, K))
    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match=r"doesn't leave the process; call .unpack\(\)"):
        torch.export.export(model, arguments, strict=strict)
    expected = model(*arguments)
    model.weight = model.weight.unpack()
    program = copy.deepcopy(torch.export.export(model, arguments, strict=strict))
    torch.testing.assert_close(program.module()(*arguments), expected)


@formats
def test_a_part_that_is_a_copy_is_not_written_to(format: WeightFormat) -> None:
    private = canonical(format).prepack(LAYOUT)
    for part in (private[:4], private[4:8], private.view(-1)):
        with pytest.raises(ValueError, match=r"copy_: the target is a part of .*copy into the whole weight"):
            part.copy_(torch.zeros(part.shape))
    assert_canonical(private.unpack(), canonical(format))


def test_layouts_that_nobody_makes() -> None:
    weight = canonical(FourBit())
    with pytest.raises(
        NoBackendError, match=r"nobody here makes the layout 'acme.sideways' of FourBit.*: 'acme.backwards'. prepack_weight"
    ):
        weight.prepack("acme.sideways")
    with installed_backends(), pytest.raises(NoBackendError, match=r"the layouts of the backends here: none"):
        weight.prepack(LAYOUT)
    with pytest.raises(ValueError, match=r"layout is 'canonical'.*call .unpack\(\)"):
        weight.prepack(CANONICAL)
    with pytest.raises(ValueError, match=r"shape is \(2, 4, 64\), expected \(N, K\)"):
        QuantizedTensor.quantize(torch.randn(2, 4, 64), FourBit()).prepack(LAYOUT)


@formats
def test_a_weight_left_behind_by_its_backend(format: WeightFormat) -> None:
    private, x = canonical(format).prepack(LAYOUT), torch.randn(3, K)
    left = r"nobody here can read; select the backend 'acme' again .* call .unpack\(\)"
    with use_backends("reference"):
        with pytest.raises(NoBackendError, match=f"layout '{LAYOUT}' is private to another backend"):
            F.linear(x, private)
        for way in (torch.clone, copy.deepcopy, pickle.dumps, QuantizedTensor.dequantize, QuantizedTensor.unpack):
            with pytest.raises(NoBackendError, match=left):
                way(private)
    assert_canonical(private.unpack(), canonical(format))
