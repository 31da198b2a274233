"""int4, mxfp4 and nvfp4 against their specifications, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from q_core import ops, use_backends
from q_core.formats.codebooks import FOUR_BIT_BOOKS

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(autouse=True)
def reference_only():  # type: ignore[no-untyped-def]
    with use_backends("reference"):
        yield


def codes_of(packed: torch.Tensor) -> np.ndarray:
    flat = packed.numpy()
    return np.stack((flat >> 4, flat & 15), 1).reshape(-1)


def weights(blocks: int, blocksize: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-20, 20, blocks)[torch.randperm(blocks, generator=generator)]
    return torch.randn(blocks, blocksize, generator=generator) * scales[:, None]


def test_int4_is_integers_in_sevenths() -> None:
    A = weights(200, 64)
    packed, absmax = ops.quantize_4bit(A, quant_type="int4")
    A64, scale = A.double().numpy(), absmax.double().numpy()[:, None] / 7
    np.testing.assert_array_equal(absmax.numpy(), A.abs().amax(1).numpy())
    integers = codes_of(packed).reshape(200, 64).astype(int) - 8
    assert abs(integers).max() == 7
    assert (abs(A64 - integers * scale) <= scale / 2 * (1 + 1e-6)).all(), "the nearest integer"
    decoded = ops.dequantize_4bit(packed, absmax, shape=A.shape, quant_type="int4")
    np.testing.assert_allclose(decoded.double().numpy(), integers * scale, rtol=3e-7)


def test_mxfp4_scales_are_powers_of_two_and_decoding_is_exact() -> None:
    A = weights(400, 32)
    A[3] = 0.0
    A[4, 0], A[5, 0] = 6.0, 6.0000005
    A[4, 1:] = A[5, 1:] = 1.0
    packed, absmax = ops.quantize_4bit(A, blocksize=32, quant_type="mxfp4")
    scale = absmax.double().numpy() / 6
    assert scale[3] == 0 and scale[4] == 1 and scale[5] == 2
    exponents = np.log2(scale[scale > 0])
    assert (exponents == np.round(exponents)).all()
    largest = A.double().abs().amax(1).numpy()
    assert (largest <= 6 * scale).all() and ((largest > 3 * scale) | (scale == 0)).all(), "the smallest that clamps nothing"
    values = E2M1[codes_of(packed)].reshape(400, 32) * scale[:, None]
    decoded = ops.dequantize_4bit(packed, absmax, shape=A.shape, blocksize=32, quant_type="mxfp4")
    np.testing.assert_array_equal(decoded.double().numpy(), values)
    nearest = np.abs(A.double().numpy()[..., None] - E2M1 * scale[:, None, None]).min(-1)
    np.testing.assert_allclose(np.abs(A.double().numpy() - values), nearest, rtol=1e-6)


def test_mxfp4_at_the_ends_of_float32() -> None:
    A = torch.zeros(3, 32)
    A[0, 0], A[1, 0], A[2, 0] = 3.4e38, 1e-44, torch.finfo(torch.float32).smallest_normal
    packed, absmax = ops.quantize_4bit(A, blocksize=32, quant_type="mxfp4")
    assert absmax.isfinite().all()
    assert absmax.tolist() == [6 * 2.0**125, 6 * 2.0**-127, 6 * 2.0**-127]
    decoded = ops.dequantize_4bit(packed, absmax, shape=A.shape, blocksize=32, quant_type="mxfp4")
    assert decoded[0, 0] == 6 * 2.0**125 and not decoded[:, 1:].any()


def test_nvfp4_scales_are_e4m3_times_one_for_the_tensor() -> None:
    A = weights(300, 16).clamp(-1e4, 1e4)
    A[7] = 0.0
    packed, absmax = ops.quantize_4bit(A, blocksize=16, quant_type="nvfp4")
    tensor_scale = np.float32(A.abs().max()) / np.float32(2688)
    block_scale = absmax.double().numpy() / 6 / np.float64(tensor_scale)
    rounded = torch.from_numpy(block_scale).float().to(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_allclose(block_scale, rounded, rtol=3e-7)
    assert block_scale.max() == pytest.approx(448) and absmax[7] == 0 and block_scale[block_scale > 0].min() >= 2**-9 * (1 - 1e-6)
    values = E2M1[codes_of(packed)].reshape(300, 16) * absmax.double().numpy()[:, None] / 6
    nearest = np.abs(A.double().numpy()[..., None] - E2M1 * absmax.double().numpy()[:, None, None] / 6).min(-1)
    tiny = absmax.double().numpy()[:, None] * 1e-6
    assert (np.abs(A.double().numpy() - values) <= nearest + tiny).all()


@pytest.mark.parametrize("quant_type", FOUR_BIT_BOOKS)
def test_zero_is_zero_and_a_non_finite_value_poisons_its_block(quant_type: str) -> None:
    blocksize = FOUR_BIT_BOOKS[quant_type].blocksizes[0]
    A = torch.randn(3, blocksize)
    A[1, ::2] = 0.0
    A[2, 3] = float("inf")
    packed, absmax = ops.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type)  # type: ignore[arg-type]
    decoded = ops.dequantize_4bit(packed, absmax, shape=A.shape, blocksize=blocksize, quant_type=quant_type)  # type: ignore[arg-type]
    assert decoded[2].isnan().all() and decoded[:2].isfinite().all()
    assert not decoded[1, ::2].any()


@pytest.mark.parametrize(
    ("quant_type", "blocksize", "expected"), [("mxfp4", 64, "32"), ("nvfp4", 32, "16"), ("nf4", 16, "32 or 64")]
)
def test_blocksizes_belong_to_types(quant_type: str, blocksize: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"blocksize is {blocksize}, expected {expected}"):
        ops.quantize_4bit(torch.ones(64), blocksize=blocksize, quant_type=quant_type)  # type: ignore[arg-type]
