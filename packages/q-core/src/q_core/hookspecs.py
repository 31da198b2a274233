"""The op surface: one pluggy hook an op, and nothing else.

The annotated signature of a hook *is* the schema of the torch op ``q::<name>``; a backend implements a hook with
the same argument names (it may leave some out, see :func:`q_core.backend.impl`).  A line says what the op does; the full contract
(shapes, dtypes, errors, sources) is the docstring of the public function of the same name in :mod:`q_core.ops`, and what machines
need to know of it is its :class:`q_core.specs.OpRecord`.

No hook has default arguments: defaults and validation belong to :mod:`q_core.ops`.

Shape letters, here and everywhere: T tokens, N out features, K in features, H heads, G kv heads, D head dim, B kv blocks, S slots of a
block, R requests, E experts, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy
import torch
from torch import Tensor

PROJECT = "q"
hookspec = pluggy.HookspecMarker(PROJECT)


# --- quantize ---------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:  # type: ignore[empty-body]
    """Quantize flat blocks of ``A`` to the nearest entries of a code book: codes, absmax."""


@hookspec(firstresult=True)
def dequantize_blockwise(  # type: ignore[empty-body]
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    """Decode what ``quantize_blockwise`` made."""


@hookspec(firstresult=True)
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:  # type: ignore[empty-body]
    """Quantize flat blocks of ``A`` to a 4-bit format: packed codes, absmax."""


@hookspec(firstresult=True)
def dequantize_4bit(  # type: ignore[empty-body]
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Decode what ``quantize_4bit`` made."""


@hookspec(firstresult=True)
def quantize_int8_rowwise(A_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[empty-body]
    """Quantize rows to int8 with one scale a row, outlier columns set aside: codes, row absmax, outlier mask."""


# --- gemm -------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, layout: str) -> Tensor:  # type: ignore[empty-body]
    """Multiply activations with a dense weight."""


@hookspec(firstresult=True)
def gemm_4bit(  # type: ignore[empty-body]
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: Tensor | None,
    activations: str,
    layout: str,
) -> Tensor:
    """Multiply activations with a 4-bit weight."""


@hookspec(firstresult=True)
def int8_gemm(  # type: ignore[empty-body]
    a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, layout: str
) -> Tensor:
    """Multiply int8 rows with int8 rows, scales and bias fused."""


@hookspec(firstresult=True)
def gemm_int8_weight(  # type: ignore[empty-body]
    x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None, layout: str
) -> Tensor:
    """Multiply activations with an int8 weight that has one scale a row."""


@hookspec(firstresult=True)
def prepack_weight(  # type: ignore[empty-body]
    format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str
) -> list[Tensor]:
    """Bring a weight's tensors from the canonical layout into a backend's own."""


@hookspec(firstresult=True)
def unpack_weight(  # type: ignore[empty-body]
    format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str
) -> list[Tensor]:
    """Bring a weight's tensors from a backend's own layout back into the canonical one."""


# --- optim ------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def optimizer_step_8bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    state3: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    absmax3: Sequence[Tensor],
    skipped: Sequence[Tensor],
    code1: Tensor,
    code2: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    trust_coefficient: float,
    step: int,
    blocksize: int,
) -> None:
    """Update parameters with optimizer states held in 8 bits."""


@hookspec(firstresult=True)
def optimizer_step_32bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    state3: Sequence[Tensor],
    skipped: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    trust_coefficient: float,
    step: int,
) -> None:
    """Update parameters with optimizer states held in float32."""


# --- attention --------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def write_kv(
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    slot_mapping: Tensor,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
) -> None:
    """Write new keys and values into their slots of the paged cache."""


@hookspec(firstresult=True)
def paged_attention(  # type: ignore[empty-body]
    q_THD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
) -> Tensor:
    """Attend over a paged cache: prefill, chunked prefill, decode, or a mix in one batch."""


@hookspec(firstresult=True)
def copy_kv_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    """Copy blocks of a paged cache: for copy-on-write, swapping and transfer."""


# --- moe --------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def route_topk(logits_TE: Tensor, k: int, renormalize: bool, scoring: str) -> tuple[Tensor, Tensor]:  # type: ignore[empty-body]
    """Choose the k experts of each token: their weights and ids."""


@hookspec(firstresult=True)
def fused_moe(  # type: ignore[empty-body]
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
    """Run each token through its experts' gated MLPs and sum the results by weight."""


# --- norm -------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[empty-body]
    """Divide by the root mean square of the last axis, times a weight."""


@hookspec(firstresult=True)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # type: ignore[empty-body]
    """Add a residual, then ``rms_norm``: the normed sum and the sum."""


@hookspec(firstresult=True)
def rotary_embedding(  # type: ignore[empty-body]
    q_THD: Tensor, k_TGD: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions."""


@hookspec(firstresult=True)
def silu_and_mul(x: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Multiply SiLU of the first half of the last axis with its second half."""
