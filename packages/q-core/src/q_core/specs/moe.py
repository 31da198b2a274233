"""Records of the moe family."""

from __future__ import annotations

import torch
from torch import Tensor

from q_core.experts import EXPERT_FORMATS, FOUR_BIT_FORMATS, ROW_FORMATS
from q_core.gradients import moe as gradients
from q_core.operand import Operand
from q_core.record import OpRecord
from q_core.samples import moe as samples
from q_core.specs import bounds, check
from q_core.specs.quantize import check_4bit_format

SCORINGS = ("softmax", "sigmoid")


def intermediate_size_of(w2: Tensor, format: str) -> int:
    """N, as the shape of w2 shows it."""
    if format in FOUR_BIT_FORMATS or w2.dim() != 3:
        check.wrong_value("fused_moe", "intermediate_size", None, "N, which packed experts don't show")
    return w2.shape[2]


def check_route_topk(logits_TE: Tensor, k: int, renormalize: bool, scoring: str) -> None:
    op = "route_topk"
    check.one_device(op, ("logits_TE",), logits_TE)
    check.floating(op, "logits_TE", logits_TE)
    if logits_TE.dim() != 2:
        check.wrong_shape(op, "logits_TE", check.shape_of(logits_TE), "[T, E]")
    if not 1 <= k <= logits_TE.shape[1]:
        check.wrong_value(op, "k", k, f"1…{logits_TE.shape[1]}, the number of experts")
    if scoring not in SCORINGS:
        check.wrong_value(op, "scoring", scoring, "one of " + ", ".join(map(repr, SCORINGS)))


def _check_experts(
    op: str, argument: str, weight: Tensor, scale: Tensor | None, x_dtype: torch.dtype, E: int, rows: int, columns: int,
    format: str, blocksize: int,
) -> None:  # fmt: skip
    if format in FOUR_BIT_FORMATS:
        dtype, shape = torch.uint8, [E, check.ceil_div(rows * columns, 2)]
        scale_shape = [E, check.ceil_div(rows * columns, blocksize)]
    else:
        dtype = {"dense": x_dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[format]
        shape, scale_shape = [E, rows, columns], [E, rows]
    if weight.dtype != dtype:
        check.wrong_dtype(op, argument, weight.dtype, f"{check.short(dtype)} for experts held as {format!r}")
    if check.shape_of(weight) != shape:
        check.wrong_shape(op, argument, check.shape_of(weight), f"{shape} for experts [{rows}, {columns}] held as {format!r}")
    if (scale is not None) != (format != "dense"):
        expected = "None" if format == "dense" else f"float32 {scale_shape}"
        check.wrong_value(op, f"{argument}_scale", None if scale is None else "given", f"{expected} for experts held as {format!r}")
    if scale is not None:
        check.exact_dtype(op, f"{argument}_scale", scale, torch.float32)
        if check.shape_of(scale) != scale_shape:
            check.wrong_shape(op, f"{argument}_scale", check.shape_of(scale), str(scale_shape))


def check_fused_moe(
    x_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    format: str,
    intermediate_size: int,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    blocksize: int,
) -> None:
    op = "fused_moe"
    names = ("x_TK", "w13", "w2", "topk_weights", "topk_ids", "w13_scale", "w2_scale")
    check.one_device(op, names, x_TK, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale)
    check.floating(op, "x_TK", x_TK)
    if x_TK.dim() != 2:
        check.wrong_shape(op, "x_TK", check.shape_of(x_TK), "[T, K]")
    T, K = x_TK.shape
    if format not in EXPERT_FORMATS:
        check.wrong_value(op, "format", format, "one of " + ", ".join(map(repr, EXPERT_FORMATS)))
    if format in FOUR_BIT_FORMATS:
        check_4bit_format(op, blocksize, format)
    if intermediate_size < 1:
        check.wrong_value(op, "intermediate_size", intermediate_size, "1 or more")
    if w13.dim() != (2 if format in FOUR_BIT_FORMATS else 3):
        check.wrong_shape(op, "w13", check.shape_of(w13), "[E, bytes]" if format in FOUR_BIT_FORMATS else "[E, 2N, K]")
    E, N = w13.shape[0], intermediate_size
    _check_experts(op, "w13", w13, w13_scale, x_TK.dtype, E, 2 * N, K, format, blocksize)
    _check_experts(op, "w2", w2, w2_scale, x_TK.dtype, E, K, N, format, blocksize)
    check.exact_dtype(op, "topk_weights", topk_weights, torch.float32)
    check.exact_dtype(op, "topk_ids", topk_ids, torch.int32)
    if topk_weights.dim() != 2 or topk_weights.shape[0] != T:
        check.wrong_shape(op, "topk_weights", check.shape_of(topk_weights), f"[{T}, k], one row a token")
    if topk_ids.shape != topk_weights.shape:
        check.wrong_shape(op, "topk_ids", check.shape_of(topk_ids), f"topk_weights' {check.shape_of(topk_weights)}")


def fake_route_topk(logits_TE: Tensor, k: int, renormalize: bool, scoring: str) -> tuple[Tensor, Tensor]:
    check_route_topk(logits_TE, k, renormalize, scoring)
    shape = (logits_TE.shape[0], k)
    return logits_TE.new_empty(shape, dtype=torch.float32), logits_TE.new_empty(shape, dtype=torch.int32)


def fake_fused_moe(
    x_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    format: str,
    intermediate_size: int,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    blocksize: int,
) -> Tensor:
    check_fused_moe(x_TK, w13, w2, topk_weights, topk_ids, format, intermediate_size, w13_scale, w2_scale, blocksize)
    return x_TK.new_empty(x_TK.shape)


def _experts(rows: str, columns: str) -> tuple[dict[str, Operand], dict[str, Operand]]:
    """The experts' weights [rows, columns] and their scales, by the format that they are held in."""
    four_bit = Operand((torch.uint8,), f"E, ceil({rows} * {columns} / 2)")
    blocks = Operand((torch.float32,), f"E, ceil({rows} * {columns} / blocksize)")
    weights = {
        "dense": Operand(("x_TK",), f"E, {rows}, {columns}"),
        "int8": Operand((torch.int8,), f"E, {rows}, {columns}"),
        "fp8": Operand((torch.float8_e4m3fn,), f"E, {rows}, {columns}"),
        **dict.fromkeys(FOUR_BIT_FORMATS, four_bit),
    }
    scales = dict.fromkeys(ROW_FORMATS, Operand((torch.float32,), f"E, {rows}")) | dict.fromkeys(FOUR_BIT_FORMATS, blocks)
    return weights, scales


W13, W13_SCALE = _experts("2N", "K")
W2, W2_SCALE = _experts("K", "N")

RECORDS = (
    OpRecord(
        name="route_topk",
        family="moe",
        check=check_route_topk,
        fake=fake_route_topk,
        operands={
            "logits_TE": Operand(check.FLOATS, "T, E"),
        },
        outputs={
            "weights": Operand((torch.float32,), "T, k"),
            "ids": Operand((torch.int32,), "T, k"),
        },
        samples=samples.route_topk,
        bound=bounds.route_topk,
        neutral={"scoring": "softmax"},
        gradient=gradients.route_topk,
    ),
    OpRecord(
        name="fused_moe",
        family="moe",
        check=check_fused_moe,
        fake=fake_fused_moe,
        operands={
            "x_TK": Operand(check.FLOATS, "T, K"),
            "w13": W13,
            "w2": W2,
            "topk_weights": Operand((torch.float32,), "T, k"),
            "topk_ids": Operand((torch.int32,), "T, k"),
            "w13_scale": W13_SCALE,
            "w2_scale": W2_SCALE,
        },
        outputs={"output": Operand(("x_TK",), "T, K")},
        sizes={"intermediate_size": "N"},
        samples=samples.fused_moe,
        bound=bounds.fused_moe,
        gradient=gradients.fused_moe,
        autocast=("x_TK", "w13", "w2"),
    ),
)
