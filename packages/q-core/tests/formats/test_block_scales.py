"""Scales in a byte: every code against its definition, and decoding to exactly what the ops made."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q_core import ops, use_backends
from q_core.formats.block_scales import E4M3Scales, E8M0Scales
from q_core.formats.four_bit import FourBit
from q_core.formats.quantized_tensor import QuantizedTensor, resolve

TYPES = ["mxfp4", "nvfp4"]


def test_every_e8m0_code() -> None:
    decoded = E8M0Scales().decode({"absmax": torch.arange(256, dtype=torch.uint8)}).double().numpy()
    np.testing.assert_array_equal(decoded[:253], 6 * 2.0 ** (np.arange(253) - 127))
    assert np.isnan(decoded[253:]).all(), "two are beyond float32, and 255 is E8M0's NaN"


def test_every_e4m3_code() -> None:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10)) * np.where(codes < 128, 1, -1)
    decoded = E4M3Scales().decode({"absmax": torch.arange(256, dtype=torch.uint8), "tensor_scale": torch.tensor(0.25)})
    finite = codes & 127 != 127
    np.testing.assert_array_equal(decoded.double().numpy()[finite], 6 * 0.25 * values[finite])
    assert decoded[~torch.from_numpy(finite)].isnan().all()


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "whoever serves"])
@settings(max_examples=40, deadline=None)
@given(
    quant_type=st.sampled_from(TYPES),
    numel=st.integers(0, 300),
    exponents=st.tuples(st.integers(-45, 37), st.integers(-45, 37)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_a_byte_holds_all_of_a_scale(
    reference: bool, quant_type: str, numel: int, exponents: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """From the smallest subnormals to the largest numbers, in one tensor or in many; zeros too."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.empty(numel, dtype=torch.float64).uniform_(min(exponents), max(exponents) + 1, generator=generator)
    signs = torch.randint(-1, 2, (numel,), generator=generator)
    dense = (signs * 10.0**magnitudes).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    format = FourBit.of(quant_type)  # type: ignore[arg-type]
    with use_backends("reference") if reference else contextlib.nullcontext():
        packed, absmax = ops.quantize_4bit(dense, blocksize=format.blocksize, quant_type=quant_type)  # type: ignore[arg-type]
        weight = QuantizedTensor.quantize(dense, format)
        parts = resolve(weight)
        expected = ops.dequantize_4bit(packed, absmax, shape=(numel,), blocksize=format.blocksize, quant_type=quant_type)  # type: ignore[arg-type]
        assert torch.equal(parts["packed"], packed)
        assert torch.equal(parts["absmax"][absmax > 0], absmax[absmax > 0])
        assert torch.equal(weight.dequantize(), expected.to(dtype))
    assert weight.components["absmax"].dtype == torch.uint8
    assert weight.stored_bytes == -(-numel // 2) + -(-numel // format.blocksize) + (4 if quant_type == "nvfp4" else 0)


@pytest.mark.parametrize("quant_type", TYPES)
def test_what_is_not_finite_poisons_its_block(quant_type: str) -> None:
    dense = torch.randn(3, 64)
    dense[0, 0], dense[2, 63] = float("inf"), float("nan")
    format = FourBit.of(quant_type)  # type: ignore[arg-type]
    parts = format.resolve(format.quantize(dense))
    poisoned = parts["absmax"].isnan()
    assert poisoned[0] and poisoned[-1]


@pytest.mark.parametrize("quant_type", TYPES)
def test_in_float32_they_are_the_same(quant_type: str) -> None:
    """As shards and prepacked weights hold them; what decodes them once keeps every bit."""
    format = FourBit.of(quant_type)  # type: ignore[arg-type]
    weight = QuantizedTensor.quantize(torch.randn(6, 64), format)
    wide = format.resolved_format
    assert wide.float32_scales and not wide.derives and wide.resolved_format == wide
    rows = weight[2:4]
    assert rows.format == wide
    assert torch.equal(rows.dequantize(), weight.dequantize()[2:4])
    decoded = QuantizedTensor.from_components(resolve(weight), wide, shape=weight.shape, dtype=weight.dtype)
    assert torch.equal(decoded.dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match=r"absmax.*expected torch.uint8"):
        QuantizedTensor.from_components(
            weight.components | {"absmax": decoded.components["absmax"]}, format, shape=weight.shape, dtype=weight.dtype
        )


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (FourBit.of("mxfp4"), 4.25),
        (FourBit.of("nvfp4"), 4.5),
        (FourBit.of("int4"), 4.127),
        (FourBit.of("nf4", double_quant=False), 4.5),
    ],
    ids=str,
)
def test_bits_a_weight(format: FourBit, bits: float) -> None:
    weight = QuantizedTensor.empty((1024, 1024), format, dtype=torch.bfloat16, device="meta")
    assert weight.stored_bytes * 8 / weight.numel() == pytest.approx(bits, abs=1e-3)
