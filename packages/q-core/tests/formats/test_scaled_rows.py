"""Weights of scaled rows: one matrix or a stack of them, in int8 and fp8."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_core import Fp8Rows, Int8Rows, QuantizedTensor, ops
from q_core.formats.checkpoint import flat_keys, from_flat, row_keys, to_flat
from q_core.formats.codebooks import INT8_BOUND
from q_core.formats.scaled_rows import ScaledRows

FORMATS = [Int8Rows(), Fp8Rows()]
formats = pytest.mark.parametrize("format", FORMATS, ids=str)
KEY = "mlp.experts.gate_up_proj"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bound(format: ScaledRows, dense: Tensor) -> Tensor:
    """The largest error that rounding to the nearest code makes, in float64."""
    absmax = dense.double().abs().amax(-1, keepdim=True)
    if isinstance(format, Int8Rows):
        return absmax * INT8_BOUND
    # E4M3: three bits of mantissa down to 2^-6, of a row scaled to 448; below that steps of 2^-9.
    scaled = dense.double().abs() / absmax.clamp(min=1e-300) * 448
    step = torch.exp2(scaled.clamp(min=2.0**-6).log2().floor() - 3)
    return step / 2 * absmax / 448


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    K=st.integers(1, 90),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_each_element_is_within_the_bound(
    format: ScaledRows, shape: list[int], K: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    dense = (random(*shape, K, seed=seed) * scale).to(dtype)
    weight = QuantizedTensor.quantize(dense, format)
    components = weight.components
    assert components["codes"].shape == dense.shape
    assert torch.equal(components["absmax"], dense.float().abs().amax(-1))
    error = (weight.dequantize().double() - dense.double()).abs()
    rounding = dense.double().abs() * torch.finfo(dtype).eps
    assert bool((error <= bound(format, dense) * (1 + 1e-5) + rounding).all())
    assert weight.stored_bytes == dense.numel() + 4 * math.prod(shape)


@formats
def test_rows_of_zeros_and_of_tiny_numbers(format: ScaledRows) -> None:
    dense = torch.zeros(2, 3, 8)
    dense[0, 1, 3] = 1e-37  # the factor that would scale it is beyond float32
    dense[1, 0] = 1e38
    decoded = QuantizedTensor.quantize(dense, format).dequantize()
    assert torch.equal(decoded == 0, dense == 0)
    torch.testing.assert_close(decoded, dense)


@formats
@pytest.mark.parametrize("shape", [(5, 12), (3, 5, 12), (2, 3, 5, 12), (0, 5, 12), (3, 0, 12)])
def test_copies_slices_and_checkpoints(format: ScaledRows, shape: tuple[int, ...]) -> None:
    weight = QuantizedTensor.quantize(random(*shape), format)
    dense = weight.dequantize()
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    for other in (copy.deepcopy(weight), weight.clone(), torch.load(file, weights_only=True), weight.to("cpu", torch.float32)):
        assert torch.equal(other.dequantize(), dense)
    half = weight[: shape[0] // 2]
    assert torch.equal(half.dequantize(), dense[: shape[0] // 2])
    flat = to_flat(KEY, weight)
    assert {tensor.shape for tensor in flat.values()} <= {torch.Size(shape), torch.Size(shape[:-1]), torch.Size([])}
    assert set(flat_keys(KEY, flat)) == set(flat)
    assert set(row_keys(KEY, format).values()) <= set(flat)
    again = from_flat(KEY, flat, dtype=torch.float32)
    assert again.format == format
    assert torch.equal(again.dequantize(), dense)


@formats
def test_bad_checkpoints_are_refused(format: ScaledRows) -> None:
    flat = to_flat(KEY, QuantizedTensor.quantize(random(3, 5, 12), format))
    scales = row_keys(KEY, format)["absmax"]
    with pytest.raises(ValueError, match=f"{scales} is missing"):
        from_flat(KEY, {KEY: flat[KEY]})
    with pytest.raises(ValueError, match=rf"{scales} is float32 \[3, 4\], expected float32 \[3, 5\]"):
        from_flat(KEY, flat | {scales: flat[scales][:, :4]})
    with pytest.raises(ValueError, match=r"has shape \[12\], expected two axes"):
        from_flat(KEY, flat | {KEY: flat[KEY][0, 0]})


@formats
def test_one_axis_is_refused(format: ScaledRows) -> None:
    with pytest.raises(ValueError, match="two axes"):
        QuantizedTensor.quantize(torch.ones(4), format)


@formats
def test_products_and_embeddings(format: ScaledRows) -> None:
    weight = QuantizedTensor.quantize(random(6, 20), format)
    dense, x, ids = weight.dequantize(), random(3, 20, seed=1), torch.tensor([[5, 0], [2, 2]])
    expected = (x.double() @ dense.double().T).float()
    torch.testing.assert_close(torch.nn.functional.linear(x, weight), expected)
    assert torch.equal(torch.nn.functional.embedding(ids, weight), dense[ids])


def test_the_rows_of_experts_are_those_that_the_op_reads() -> None:
    """Codes and scales as fused_moe takes them, against products with the decoded weights."""
    w13, w2, x = random(2, 6, 10), random(2, 10, 3, seed=1), random(4, 10, seed=2)
    weights, ids = torch.ones(4, 1), torch.tensor([[0], [1], [1], [0]], dtype=torch.int32)
    for format, name in ((Int8Rows(), "int8"), (Fp8Rows(), "fp8")):
        first, second = (QuantizedTensor.quantize(weight, format) for weight in (w13, w2))
        a, b = first.components, second.components
        got = ops.fused_moe(
            x, a["codes"], b["codes"], weights, ids, format=name, w13_scale=a["absmax"], w2_scale=b["absmax"]  # type: ignore[arg-type]
        )  # fmt: skip
        for t, expert in enumerate(ids[:, 0].tolist()):
            gate, up = (first.dequantize()[expert].double() @ x[t].double()).chunk(2)
            expected = second.dequantize()[expert].double() @ (torch.nn.functional.silu(gate) * up)
            torch.testing.assert_close(got[t].double(), expected, rtol=1e-5, atol=1e-5)
