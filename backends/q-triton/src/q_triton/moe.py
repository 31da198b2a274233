"""Mixtures of experts. Contracts: :mod:`q_core.ops.moe`.

The pairs of a token and an expert are grouped by expert on the device, two launches of a grouped product follow, and one adds up what
each token's experts gave, in their order: nothing depends on a value on the host, and nothing on the order in which programs run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from q_core.backend import impl
from q_core.experts import FOUR_BIT_FORMATS
from q_core.formats.codebooks import book_tensor
from q_triton.kernels.grouped_gemm import grouped_gemm_kernel, sum_pairs_kernel
from q_triton.kernels.route import route_topk_kernel
from q_triton.kernels.sort_tokens import sort_pairs_kernel
from q_triton.launch import launch
from q_triton.shapes import ceil_div, power_of_two, with_contiguous_last_axis
from q_triton.tiles import Tile, Tiles, tile

MOST_EXPERTS = 8192
SCALE_FACTORS = {"int8": 1 / 127, "fp8": 1 / 448}
"""What the scale of a row, its absmax, is to be multiplied with for codes as large as these."""
UNSORTED_PAIRS = 64
"""Pairs up to which each program finds its own by itself."""
MOST_PAIRS = 1 << 16
"""Pairs that are worked on at once; more tokens follow in turns, so that what lies between the products stays within 64 Ki rows."""

ROUTE_TOPK = Tiles(
    "route_topk",
    (
        tile(BLOCK_T=8, warps=4, up_to=64),
        tile(BLOCK_T=4, warps=4, up_to=256),
        tile(BLOCK_T=1, warps=4, up_to=2048),
        tile(BLOCK_T=1, warps=8),
    ),
    size="experts",
)
SORT_PAIRS = Tiles("sort_pairs", (tile(BLOCK_P=256, up_to=256), tile(BLOCK_P=2048, warps=8)), size="pairs")
_PORTABLE = (
    tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=64, GROUP_T=8, PROGRAMS=512, warps=4, stages=2, up_to=12),
    tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=32, GROUP_T=8, PROGRAMS=256, warps=4, stages=2),
)
DENSE, CODES, FOUR_BIT = (
    Tiles(kernel, _PORTABLE, size="pairs an expert") for kernel in ("moe_gemm", "moe_gemm_codes", "moe_gemm_4bit")
)
"""PROGRAMS: how many there should be, by parts of K, where tiles and features give fewer."""
FLOAT32 = Tiles(
    "moe_gemm_float32",
    (
        tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=32, GROUP_T=8, PROGRAMS=512, warps=4, stages=2, up_to=12),
        tile(BLOCK_T=32, BLOCK_N=32, BLOCK_K=32, GROUP_T=8, PROGRAMS=1, warps=4, stages=2),
    ),
    size="pairs an expert",
)
"""The same for float32 activations, whose products are no matter of matrix instructions."""
UNALIGNED = Tiles("moe_gemm_unaligned", (tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=32, GROUP_T=8, PROGRAMS=1, warps=4),))
"""Where rows begin anywhere: elements are read one by one, and a large tile has no registers for so many addresses."""
TILES = {"dense": DENSE, "int8": CODES, "fp8": CODES, "4bit": FOUR_BIT}
SUM_PAIRS = Tiles("sum_pairs", (tile(BLOCK_R=2, BLOCK_K=512, up_to=2), tile(BLOCK_R=8, BLOCK_K=512)), size="results of a token")


def _accepts_logits(logits_TE: Tensor) -> str | None:
    E = logits_TE.shape[1]
    return f"{E} experts, at most {MOST_EXPERTS}" if E > MOST_EXPERTS else None


@impl(accepts=_accepts_logits)
def route_topk(logits_TE: Tensor, k: int, renormalize: bool, scoring: str) -> tuple[Tensor, Tensor]:
    """Choose the k experts of each token, and weigh them."""
    T, E = logits_TE.shape
    logits = with_contiguous_last_axis(logits_TE)
    weights = torch.empty(T, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(T, k, dtype=torch.int32, device=logits.device)
    chosen = ROUTE_TOPK.on(logits.device, E)
    launch(
        route_topk_kernel, (ceil_div(T, chosen.blocks["BLOCK_T"]),),
        Tile({**chosen.blocks, "BLOCK_E": power_of_two(E)}, chosen.warps, chosen.stages),
        logits=logits, weights=weights, ids=ids, T=T, E=E, logits_stride=logits.stride(0), k=k,
        SIGMOID=scoring == "sigmoid", RENORMALIZE=renormalize,
    )  # fmt: skip
    return weights, ids


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The pairs of some tokens and their experts: ids int32 [T, k] of E experts; for more than a few of them sorted, see sort_tokens."""

    ids: Tensor
    E: int
    order: Tensor | None = None
    starts: Tensor | None = None

    @property
    def number(self) -> int:
        return self.ids.numel()

    def tiles(self, BLOCK_T: int) -> int:
        """As many as there are numbers for."""
        if self.E == 0:
            return 0
        return self.number if self.order is None else self.number // BLOCK_T + self.E


@dataclass(frozen=True, slots=True)
class _Experts:
    """One weight [N, K] of each of E experts, and how it is held: FORMAT as in ``kernels.expert_weights``."""

    weight: Tensor
    scale: Tensor | None
    book: Tensor | None
    format: str
    blocksize: int


def _sorted(ids: Tensor, E: int) -> _Pairs:
    P = ids.numel()
    if P <= UNSORTED_PAIRS:
        return _Pairs(ids, E)
    order = torch.empty(P, dtype=torch.int32, device=ids.device)
    starts = torch.empty(E + 1, dtype=torch.int32, device=ids.device)
    launch(sort_pairs_kernel, (E,), SORT_PAIRS.on(ids.device, P), ids=ids, order=order, starts=starts, P=P, E=E)
    return _Pairs(ids, E, order, starts)


def _experts(weight: Tensor, scale: Tensor | None, format: str, blocksize: int) -> _Experts:
    weight = with_contiguous_last_axis(weight)
    scale = None if scale is None else with_contiguous_last_axis(scale)
    if format in FOUR_BIT_FORMATS:
        return _Experts(weight, scale, book_tensor(format, weight.device), "4bit", blocksize)
    return _Experts(weight.view(torch.uint8) if format == "fp8" else weight, scale, None, format, 0)


def _product(x: Tensor, experts: _Experts, pairs: _Pairs, N: int, pairs_of_row: int, gated: bool) -> Tensor:
    """Each pair's row of ``x`` through its expert: gated [1, P, N] of x's dtype, else float32 [S, P, N], to be summed over S parts of K."""
    P, K, weight, scale = pairs.number, x.shape[1], experts.weight, experts.scale
    four_bit, strides = experts.book is not None, weight.stride()[:-1]
    aligned = K % (32 if four_bit else 16) == 0 and not any(n % 16 for n in (weight.data_ptr(), *strides))
    tiles = (FLOAT32 if x.dtype is torch.float32 else TILES[experts.format]) if aligned else UNALIGNED
    chosen = tiles.on(x.device, ceil_div(P, max(1, pairs.E)))
    blocks = {**chosen.blocks, "BLOCK_P": UNSORTED_PAIRS, "BLOCK_E": power_of_two(pairs.E)}
    wanted, BLOCK_K = blocks.pop("PROGRAMS"), blocks["BLOCK_K"]
    numbers = pairs.tiles(blocks["BLOCK_T"])
    programs = numbers * ceil_div(N, blocks["BLOCK_N"] // (2 if gated else 1))
    # A part that is shorter than four blocks isn't worth its sum, and a gate needs the whole.
    S = 1 if gated else max(1, min(wanted // max(1, programs), K // (4 * BLOCK_K)))
    out = torch.empty(S, P, N, dtype=x.dtype if gated else torch.float32, device=x.device)
    launch(
        grouped_gemm_kernel, (programs, S), Tile(blocks, chosen.warps, chosen.stages),
        x=x, weight=weight, scale=scale, book=experts.book, out=out, ids=pairs.ids, order=pairs.order, starts=pairs.starts,
        tiles=numbers, P=P, E=pairs.E, N=N, K=K, part_blocks=ceil_div(ceil_div(K, BLOCK_K), S),
        pairs_of_row=pairs_of_row, x_stride=x.stride(0),
        expert_stride=strides[0], row_stride=strides[-1], scale_stride=0 if scale is None else scale.stride(0),
        scale_factor=SCALE_FACTORS.get(experts.format, 1.0),
        GATED=gated, SORTED=pairs.order is not None, FORMAT=experts.format, BLOCKSIZE=experts.blocksize,
        ALIGNED=four_bit and aligned, EVEN_K=K % BLOCK_K == 0,
    )  # fmt: skip
    return out


@impl
def fused_moe(
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
    """Run tokens through their experts: where they are few, each expert's weights are read once for all of its tokens."""
    (T, K), k, N = x_TK.shape, topk_ids.shape[1], intermediate_size
    x, weights, ids = x_TK.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    first, second = _experts(w13, w13_scale, format, blocksize), _experts(w2, w2_scale, format, blocksize)
    out = torch.empty(T, K, dtype=x.dtype, device=x.device)
    step = max(1, MOST_PAIRS // max(1, k))
    for start in range(0, T if K else 0, step):
        part = slice(start, start + step)
        _some_tokens(x[part], first, second, weights[part], ids[part], N, out[part])
    return out


def _some_tokens(x: Tensor, first: _Experts, second: _Experts, weights: Tensor, ids: Tensor, N: int, out: Tensor) -> None:
    (T, K), k = x.shape, ids.shape[1]
    pairs = _sorted(ids, first.weight.shape[0])
    hidden = _product(x, first, pairs, N, k, gated=True)[0]
    results = _product(hidden, second, pairs, K, 1, gated=False)
    S = results.shape[0]
    chosen = SUM_PAIRS.on(x.device, S * k)
    launch(
        sum_pairs_kernel, (T, ceil_div(K, chosen.blocks["BLOCK_K"])), chosen,
        results=results, weights=weights, ids=ids, out=out, T=T, E=pairs.E, K=K, S=S, k=k,
    )  # fmt: skip
