"""The native module. Private: :mod:`q_cpu.runtime` sets it up, the families' modules call it.

Every function checks every argument and raises ``TypeError`` or ``ValueError`` that names op, argument, got and expected. Tensors are
contiguous CPU tensors; of the norm family's ``x`` and ``residual``, and of all [T, H, D] and [T, G, D] that are read, only the last axis
has to be. Those named ``out``, ``total``, ``codes``, ``packed``, ``q``, ``absmax`` and ``outliers`` of a quantizing function are written
to, as are ``q_out``, ``k_out``, ``dst``, caches and scales of ``write_kv``, parameters and states. Caches of float8 come as uint8.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

def isa() -> str: ...
def isa_display() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def configure_threads(gomp_parallel: int | None, get_num_threads: Callable[[], int]) -> None: ...
def use_exchange_api(wanted: bool) -> bool: ...
def register_4bit(quant_type: str, values: Sequence[float], ordered: Sequence[int], scale: str) -> None: ...
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int, codes: Tensor, absmax: Tensor) -> None: ...
def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, out: Tensor) -> None: ...
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, packed: Tensor, absmax: Tensor) -> None: ...
def dequantize_4bit(packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, out: Tensor) -> None: ...
def quantize_int8_rowwise(A_TK: Tensor, threshold: float, q: Tensor, absmax: Tensor, outliers: Tensor) -> None: ...
def gemm(x_TK: Tensor, w_NK: Tensor, T: int, N: int, K: int, bias: Tensor | None, out: Tensor) -> None: ...
def gemm_4bit(
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    T: int,
    N: int,
    K: int,
    bias: Tensor | None,
    out: Tensor,
) -> None: ...
def int8_gemm(
    a_TK: Tensor,
    b_NK: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    T: int,
    N: int,
    K: int,
    bias: Tensor | None,
    out: Tensor,
) -> None: ...
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
) -> None: ...
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
) -> None: ...
def gemm_int8_weight(
    x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, T: int, N: int, K: int, bias: Tensor | None, out: Tensor
) -> None: ...
def gemm_4bit_int8(
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    T: int,
    N: int,
    K: int,
    bias: Tensor | None,
    out: Tensor,
) -> None: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, rows: int, K: int, out: Tensor) -> None: ...
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rows: int, K: int, total: Tensor, out: Tensor
) -> None: ...
def rotary_embedding(
    q_THD: Tensor,
    k_TGD: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    T: int,
    H: int,
    G: int,
    D: int,
    P: int,
    F: int,
    q_out: Tensor,
    k_out: Tensor,
) -> None: ...
def silu_and_mul(x: Tensor, rows: int, N: int, out: Tensor) -> None: ...
def write_kv(
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    slot_mapping: Tensor,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
    T: int,
    B: int,
    G: int,
    S: int,
    D: int,
) -> None: ...
def copy_kv_blocks(
    src: Tensor, dst: Tensor, pairs: Tensor, count: int, src_blocks: int, dst_blocks: int, block_bytes: int
) -> None: ...
def paged_attention(
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
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
    T: int,
    H: int,
    R: int,
    M: int,
    B: int,
    G: int,
    S: int,
    D: int,
    out: Tensor,
) -> None: ...
def route_topk(
    logits_TE: Tensor, T: int, E: int, k: int, sigmoid: bool, renormalize: bool, weights: Tensor, ids: Tensor
) -> None: ...
def fused_moe(
    x_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    format: str,
    T: int,
    K: int,
    N: int,
    E: int,
    k: int,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> None: ...
