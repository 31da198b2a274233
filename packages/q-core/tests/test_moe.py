"""Routing and experts against transformers' own Mixtral block, and against one token and expert after the other in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from q_core import ops, use_backends
from q_core.experts import EXPERT_FORMATS, FOUR_BIT_FORMATS
from q_core.formats.codebooks import FOUR_BIT_BOOKS

T, E, TOP, K, N = 7, 6, 2, 40, 12


@pytest.fixture(autouse=True)
def reference_only():  # type: ignore[no-untyped-def]
    with use_backends("reference"):
        yield


def test_as_transformers_mixtral() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=K, intermediate_size=N, num_local_experts=E, num_experts_per_tok=TOP, hidden_act="silu")
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, T, K)
    expected = block(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    weights, ids = ops.route_topk(x[0] @ block.gate.weight.detach().T, k=TOP)
    with torch.no_grad():
        got = ops.fused_moe(x[0], block.experts.gate_up_proj, block.experts.down_proj, weights, ids)
    torch.testing.assert_close(got, expected.detach().view(T, K))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_routing(scoring: str, renormalize: bool) -> None:
    logits = torch.randn(20, E, generator=torch.Generator().manual_seed(0))
    weights, ids = ops.route_topk(logits, k=3, renormalize=renormalize, scoring=scoring)  # type: ignore[arg-type]
    assert weights.dtype is torch.float32 and ids.dtype is torch.int32
    for t in range(20):
        order = sorted(range(E), key=lambda e, t=t: (-float(logits[t, e]), e))[:3]  # type: ignore[misc]
        assert ids[t].tolist() == order
        score = logits[t].double().softmax(0) if scoring == "softmax" else logits[t].double().sigmoid()
        chosen = score[order]
        torch.testing.assert_close(weights[t], (chosen / chosen.sum() if renormalize else chosen).float())


def test_equal_logits_go_to_the_lower_id_and_nan_stays_visible() -> None:
    weights, ids = ops.route_topk(torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, float("nan"), 1.0, 2.0]]), k=2)
    assert ids[0].tolist() == [1, 2]
    assert weights[1].isnan().all() and ((ids[1] >= 0) & (ids[1] < 4)).all()


def experts(format: str) -> tuple[dict[str, object], list[Tensor], list[Tensor]]:
    """Arguments of the op, and each expert's weights decoded."""
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(E, rows, columns, generator=generator) for rows, columns in ((2 * N, K), (K, N))]
    arguments: dict[str, object] = {"format": format, "intermediate_size": N}
    decoded = []
    for name, weight in zip(("w13", "w2"), dense, strict=True):
        if format == "dense":
            arguments[name] = weight
            decoded.append(list(weight.double()))
        elif format in FOUR_BIT_FORMATS:
            blocksize = FOUR_BIT_BOOKS[format].blocksizes[0]
            held = [ops.quantize_4bit(w, blocksize=blocksize, quant_type=format) for w in weight]  # type: ignore[arg-type]
            arguments[name], arguments[f"{name}_scale"] = (torch.stack(t) for t in zip(*held, strict=True))
            arguments["blocksize"] = blocksize
            decoded.append([
                ops.dequantize_4bit(*h, shape=w.shape, blocksize=blocksize, quant_type=format).double()  # type: ignore[arg-type]
                for h, w in zip(held, weight, strict=True)
            ])  # fmt: skip
        else:
            absmax = weight.abs().amax(-1)
            peak, dtype = (127, torch.int8) if format == "int8" else (448, torch.float8_e4m3fn)
            scaled = weight * (peak / absmax)[..., None]
            codes = (scaled.round() if format == "int8" else scaled).to(dtype)
            arguments[name], arguments[f"{name}_scale"] = codes, absmax
            decoded.append(list(codes.double() * (absmax.double() / peak)[..., None]))
    return arguments, *decoded


def by_hand(x: Tensor, w13: list[Tensor], w2: list[Tensor], weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for weight, expert in zip(weights[t].double(), ids[t].tolist(), strict=True):
            if expert >= 0:
                gate, up = (w13[expert] @ x[t].double()).chunk(2)
                out[t] += weight * (w2[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_experts_one_after_the_other(format: str) -> None:
    arguments, w13, w2 = experts(format)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(1))
    weights, ids = ops.route_topk(torch.randn(T, E, generator=torch.Generator().manual_seed(2)), k=TOP)
    ids[3, 1] = -1
    got = ops.fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(got, by_hand(x, w13, w2, weights, ids).float(), rtol=1e-4, atol=1e-4)


def test_experts_that_are_not_chosen_have_no_influence() -> None:
    arguments, w13, w2 = experts("dense")
    x, weights, ids = torch.randn(2, K), torch.ones(2, 1), torch.tensor([[1], [4]], dtype=torch.int32)
    for name in ("w13", "w2"):
        poisoned = arguments[name].clone()  # type: ignore[attr-defined]
        poisoned[[0, 2, 3, 5]] = float("nan")
        arguments[name] = poisoned
    got = ops.fused_moe(x, topk_weights=weights, topk_ids=ids, **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(got, by_hand(x, w13, w2, weights, ids).float(), rtol=1e-4, atol=1e-4)


def test_trainable_experts_are_refused() -> None:
    arguments, _, _ = experts("dense")
    arguments["w2"] = arguments["w2"].requires_grad_()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="fused_moe has no gradient to its experts: freeze them"):
        ops.fused_moe(torch.randn(1, K), topk_weights=torch.ones(1, 1), topk_ids=torch.zeros(1, 1, dtype=torch.int32), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("format", "change", "error", "message"),
    [
        ("nf4", {"intermediate_size": None}, ValueError, "intermediate_size is None, expected N"),
        ("int8", {"w2_scale": None}, ValueError, r"w2_scale is None, expected float32 \[6, 40\] for experts held as 'int8'"),
        ("dense", {"w13_scale": torch.ones(6, 24)}, ValueError, "w13_scale is 'given', expected None for experts held as 'dense'"),
        ("fp8", {"w13": torch.zeros(6, 24, 40)}, TypeError, "w13 has dtype float32, expected float8_e4m3fn"),
        ("dense", {"w2": torch.zeros(6, 40, 13)}, ValueError, r"w2 has shape \[6, 40, 13\], expected \[6, 40, 12\]"),
        ("nf4", {"format": "int5"}, ValueError, "format is 'int5', expected one of 'dense'"),
    ],
)
def test_bad_experts(format: str, change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments, _, _ = experts(format)
    with pytest.raises(error, match=message):
        ops.fused_moe(
            torch.randn(1, K), topk_weights=torch.ones(1, 1), topk_ids=torch.zeros(1, 1, dtype=torch.int32), **(arguments | change)  # type: ignore[arg-type]
        )  # fmt: skip
