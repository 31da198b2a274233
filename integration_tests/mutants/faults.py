"""The faults: what real kernels get wrong, each a change of one place in the source of ``integration_tests/third_party/acme-q``.

A fault is written as text before and after, so that it reads like the diff of the mistake; one whose text is no longer there is an error.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """A mistake in one op.

    Attributes:
        op: the op whose tests must fail.
        module: where, of the backend's package.
        what: the mistake, in words.
        before: source text, which occurs once.
        after: what it becomes.
    """

    op: str
    module: str
    what: str
    before: str
    after: str


def _quantize(what: str, before: str, after: str) -> Fault:
    return Fault("quantize_blockwise", "quantize", what, before, after)


def _gemm(what: str, before: str, after: str) -> Fault:
    return Fault("gemm_4bit", "gemm", what, before, after)


def _attention(what: str, before: str, after: str) -> Fault:
    return Fault("paged_attention", "attention", what, before, after)


_CODES = "    return tensor_of(codes.reshape(A.shape), torch.uint8), tensor_of(absmax, torch.float32)"
_PRODUCT = "    return tensor_of(out, x_TK.dtype).reshape(*x_TK.shape[:-1], N)"

FAULTS = (
    _quantize("a tie goes to the upper code", 'side="left"', 'side="right"'),
    _quantize("midpoints are the entries themselves: rounds down", "(book[:-1] + book[1:]) / np.float32(2)", "book[1:]"),
    _quantize(
        "divides by absmax where the rule multiplies by its reciprocal",
        "values * (np.float32(1) / per_element)",
        "values / per_element",
    ),
    _quantize(
        "multiplies by the reciprocal of a subnormal absmax, which overflows", "per_element < SMALLEST_NORMAL", "per_element < 0"
    ),
    _quantize(
        "a last block of one element is left out",
        "np.arange(0, values.size, blocksize)",
        "np.arange(0, max(values.size - 1, min(values.size, 1)), blocksize)",
    ),
    _quantize("a NaN is dropped from its block's maximum", "np.maximum.reduceat", "np.fmax.reduceat"),
    _quantize("absmax without abs", "np.abs(values)", "values"),
    _quantize(
        "the blocksize is ignored", "starts = np.arange(0, values.size, blocksize)", "starts = np.arange(0, values.size, 64)"
    ),
    _quantize("a block with infinity gets codes of NaN", "np.isfinite(per_element) & (per_element > 0)", "per_element > 0"),
    _quantize("a block of zeros gets the code of a small number", "] = 0\n", "] = 1e-3\n"),
    _quantize("the code book is ignored", "book = float_array(code)", "book = np.linspace(-1, 1, code.numel(), dtype=np.float32)"),
    _quantize("the input is scaled in place", _CODES, "    values *= 2\n" + _CODES),
    _quantize("codes of another dtype", "torch.uint8)", "torch.int16)"),
    _quantize(
        "codes with gaps between them",
        "tensor_of(codes.reshape(A.shape), torch.uint8)",
        "tensor_of(np.repeat(codes, 2).reshape(*A.shape, 2), torch.uint8)[..., 0]",
    ),
    _quantize("absmax rounded to bfloat16", "tensor_of(absmax, torch.float32)", "tensor_of(absmax, torch.bfloat16).float()"),
    _quantize(
        "strides are ignored: reads the storage in order", "float_array(A)", "A.as_strided((A.numel(),), (1,)).float().numpy()"
    ),
    _gemm("the low nibble first", "(byte >> 4, byte & 15)", "(byte & 15, byte >> 4)"),
    _gemm("the bias is forgotten", "out += float_array(bias)", "pass"),
    _gemm("the quant_type is ignored", "pairs(quant_type)[", 'pairs("nf4")['),
    _gemm(
        "the last element takes the scale of the first block",
        "    x = float_array(x_TK)",
        "    weight_NK[-1:, -1:] = (values * scales[:1])[-1:]\n    x = float_array(x_TK)",
    ),
    _gemm(
        "an odd last element is left out",
        "    x = float_array(x_TK)",
        "    weight_NK.reshape(-1)[N * K - N * K % 2 :] = 0\n    x = float_array(x_TK)",
    ),
    _gemm("the blocksize is ignored", "reshape(-1), blocksize)", "reshape(-1), 64)"),
    _gemm("the weight is read column by column", "(values * scales).reshape(N, K)", "(values * scales).reshape(K, N).T"),
    _gemm(
        "sums in 16 bits",
        "x.astype(np.float64) @ weight_NK.astype(np.float64).T",
        "(x.astype(np.float16) @ weight_NK.astype(np.float16).T).astype(np.float64)",
    ),
    _gemm("activations rounded to bfloat16", "float_array(x_TK)", "float_array(x_TK.bfloat16())"),
    _gemm(
        "a weight rounded to bfloat16",
        "weight_NK.astype(np.float64).T",
        "float_array(tensor_of(weight_NK, x_TK.dtype).bfloat16()).T",
    ),
    _gemm(
        "a last bit of chance, as from atomics",
        _PRODUCT,
        "    out *= 1 + 2e-7 * np.random.default_rng().standard_normal(out.shape)\n" + _PRODUCT,
    ),
    _gemm(
        "a last bit that depends on the threads",
        _PRODUCT,
        "    import torch\n\n    out *= 1 + 2e-7 * (torch.get_num_threads() - 1)\n" + _PRODUCT,
    ),
    _gemm(
        "one output buffer for all calls of a shape",
        _PRODUCT,
        "    result = tensor_of(out, x_TK.dtype).reshape(*x_TK.shape[:-1], N)\n"
        "    return pairs.__dict__.setdefault((result.shape, result.dtype), result).copy_(result)",
    ),
    _gemm("an output in column order", _PRODUCT, _PRODUCT + ".movedim(-1, 0).contiguous().movedim(0, -1)"),
    _gemm("NaN is replaced by zero", "x = float_array(x_TK)", "x = np.nan_to_num(float_array(x_TK))"),
    _gemm("the output is float32 whatever x is", "tensor_of(out, x_TK.dtype)", "tensor_of(out, absmax.dtype)"),
    _gemm(
        "a float16 call is declined with no reason in words",
        'return decline_dtype("x_TK", x_TK.dtype)',
        'return "" if x_TK.dtype.itemsize == 2 else None',
    ),
    _attention("the causal mask is off by one", "seq_len - n + np.arange(n) if causal", "seq_len - n + np.arange(n) + 1 if causal"),
    _attention("causal is ignored", "if causal else np.full(n, seq_len - 1)", "if True else np.full(n, seq_len - 1)"),
    _attention(
        "positions count from the first query, not from the last", "seq_len - n + np.arange(n) if causal", "np.arange(n) if causal"
    ),
    _attention("the scale is ignored", ") * scale", ") * D**-0.5"),
    _attention(
        "the last slot of a partial block is left out",
        "used = min(S, seq_len - first)",
        "used = max(1, min(S, seq_len - first) - (first + S > seq_len))",
    ),
    _attention(
        "keys and values change places", "for cache in (k_cache_BGSD, v_cache_BGSD)", "for cache in (v_cache_BGSD, k_cache_BGSD)"
    ),
    _attention("the running sum is not rescaled", "self._sum * shrink", "self._sum"),
    _attention(
        "query heads are interleaved over the kv heads",
        ".reshape(n, G, H // G, D).transpose(1, 0, 2, 3)",
        ".reshape(n, H // G, G, D).transpose(2, 0, 1, 3)",
    ),
    _attention("the block table is read in the cache's order", ".to(torch.int64)", ".to(torch.int64).sort().values"),
    _attention(
        "the block table is read beyond a request's last block",
        "block_tables[request, : -(-seq_len // S)]",
        "block_tables[request]",
    ),
    _attention("results are written into the queries", "out = np.zeros(q.shape)", "out = q"),
    _attention(
        "a request without queries ends the batch",
        "if rows.start < rows.stop:",
        "if rows.start == rows.stop:\n                break\n            else:",
    ),
    _attention("scores in 16 bits", ") * scale", ").astype(np.float16) * np.float16(scale)"),
)
