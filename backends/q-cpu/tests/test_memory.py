"""What a call takes beside its arguments of tens of megabytes: a tile a thread.

A process is told to return memory at once, and the operating system says how much it had at most during a call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of a process's peak"),
    pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the address sanitizer keeps what is freed"),
]

MEASURE = """
import json, sys, torch
from q_core.formats.codebooks import dynamic_map
from q_cpu.runtime import native

torch.set_num_threads(1)
bf16, u8, i8, i32 = torch.bfloat16, torch.uint8, torch.int8, torch.int32
SIGNED, UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)
f = torch.zeros  # touches every page

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def taken(function, *arguments):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = kilobytes("VmRSS:")
    function(*arguments)
    return kilobytes("VmHWM:") - before

def quantized(n, blocksize):
    return f(n, dtype=u8), f(n // blocksize)

def measure(scale):
    n, T, K, N = 2**21 * scale, 1024 * scale, 4096, 32
    x, A, out = f(T, K, dtype=bf16), f(n), f(T, N, dtype=bf16)
    packed, absmax = f(n // 2, dtype=u8), f(n // 64)
    yield "quantize_blockwise", taken(native.quantize_blockwise, A, SIGNED, 256, *quantized(n, 256))
    yield "dequantize_blockwise", taken(native.dequantize_blockwise, *quantized(n, 256), SIGNED, 256, A)
    for quant_type, blocksize in (("nf4", 64), ("nvfp4", 16)):
        yield f"quantize_4bit {quant_type}", taken(native.quantize_4bit, A, blocksize, quant_type, packed, f(n // blocksize))
    yield "dequantize_4bit", taken(native.dequantize_4bit, packed, absmax, 64, "nf4", A)
    for threshold in (0.0, 6.0):
        rows = f(T, K, dtype=i8), f(T), f(K, dtype=torch.bool)
        yield f"quantize_int8_rowwise {threshold}", taken(native.quantize_int8_rowwise, x, threshold, *rows)
    nf4 = f(N * K // 2, dtype=u8), f(N * K // 64), 64, "nf4"
    yield "gemm", taken(native.gemm, x, f(N, K, dtype=bf16), T, N, K, None, out)
    yield "gemm_4bit", taken(native.gemm_4bit, x, *nf4, T, N, K, None, out)
    yield "gemm_4bit with int8 activations", taken(native.gemm_4bit_int8, x, *nf4, T, N, K, None, out)
    w = f(N, K, dtype=i8)
    yield "int8_gemm", taken(native.int8_gemm, f(T, K, dtype=i8), w, f(T), f(N), T, N, K, None, out)
    yield "gemm_int8_weight", taken(native.gemm_int8_weight, x, w, f(N), T, N, K, None, out)
    wide = f(32 * scale, 65536, dtype=bf16)  # of few tokens the weight is what is large
    yield "gemm, one token", taken(native.gemm, wide[:1], wide, 1, 32 * scale, 65536, None, f(32 * scale, dtype=bf16))
    one = f(1, 65536, dtype=bf16), packed, absmax, 64, "nf4", 1, n // 65536, 65536, None, f(n // 65536, dtype=bf16)
    yield "gemm_4bit, one token", taken(native.gemm_4bit, *one)

    rest = 0.1, 0.9, 0.99, 0.9, 1.0, 1e-8, 0.1, 0.0, False, 0.1, 1
    moments = [f(n)], [f(n)], []
    yield "optimizer_step_32bit", taken(native.optimizer_step_32bit, "lamb", [A], [f(n)], *moments, [], *rest)
    codes, scales = ([f(n, dtype=u8)], [f(n, dtype=u8)], []), ([f(n // 256)], [f(n // 256)], [])
    eight = [A], [f(n)], *codes, *scales, [], SIGNED, UNSIGNED, *rest, 256
    yield "optimizer_step_8bit", taken(native.optimizer_step_8bit, "lamb", *eight)

    weight, like = f(K, dtype=bf16), f(T, K, dtype=bf16)
    yield "rms_norm", taken(native.rms_norm, x, weight, 1e-6, T, K, like)
    yield "add_rms_norm", taken(native.add_rms_norm, x, x, weight, 1e-6, T, K, f(T, K, dtype=bf16), like)
    yield "silu_and_mul", taken(native.silu_and_mul, x, T, K // 2, f(T, K // 2, dtype=bf16))
    heads, angles = (f(T, 32, 128, dtype=bf16) for _ in range(2)), f(T, 64)
    q, k = heads
    rotary = q, k, torch.arange(T), angles, angles, False, T, 32, 32, 128, T, 64, like, f(T, K, dtype=bf16)
    yield "rotary_embedding", taken(native.rotary_embedding, *rotary)
    yield "route_topk", taken(native.route_topk, f(n // 64, 64), n // 64, 64, 8, False, True, f(n // 64, 8), f(n // 64, 8, dtype=i32))

    blocks = 128 * scale
    caches = [f(blocks, 2, 16, 128, dtype=bf16) for _ in range(2)]
    cache = 16 * blocks, blocks, 2, 16, 128
    new = [f(16 * blocks, 2, 128, dtype=bf16) for _ in range(2)]
    yield "write_kv", taken(native.write_kv, *new, *caches, torch.arange(16 * blocks), None, None, *cache)
    copied = torch.arange(blocks).view(-1, 1).repeat(1, 2)
    raw = [cache.view(u8) for cache in caches]
    yield "copy_kv_blocks", taken(native.copy_kv_blocks, *raw, copied, blocks, blocks, blocks, raw[0].nbytes // blocks)

    def attend(requests, queries, length):
        tables = torch.arange(blocks, dtype=i32).repeat(requests, 1)
        start, lengths = torch.arange(0, requests * queries + 1, queries, dtype=i32), torch.full((requests,), length, dtype=i32)
        tokens = requests * queries
        q, to = f(tokens, 32, 128, dtype=bf16), f(tokens, 32, 128, dtype=bf16)
        options = queries, length, 0.1, True, 0, 0.0, None, None, None
        sizes = tokens, 32, requests, blocks, blocks, 2, 16, 128
        return taken(native.paged_attention, q, *caches, tables, start, lengths, *options, *sizes, to)

    yield "paged_attention, decode", attend(64 * scale, 1, 2048)
    yield "paged_attention, prefill", attend(1, 128 * scale, 2048)

    for hidden, between in ((256, 128), (2048, 4096)):
        experts = f(4, 2 * between * hidden // 2, dtype=u8), f(4, hidden * between // 2, dtype=u8)
        scales = f(4, 2 * between * hidden // 64), f(4, hidden * between // 64)
        tokens = T if hidden == 256 else T // 4
        chosen = f(tokens, 2), torch.randint(0, 4, (tokens, 2), dtype=i32)
        x, out = f(tokens, hidden, dtype=bf16), f(tokens, hidden, dtype=bf16)
        sizes = tokens, hidden, between, 4, 2
        yield f"fused_moe of {between}", taken(native.fused_moe, x, *experts, *chosen, "nf4", *sizes, *scales, 64, out)

list(measure(1))  # what is set up once
print(json.dumps(dict(measure(4))))
"""

TILE = 6 * 1024  # KiB


def test_memory_is_a_tile_a_thread():
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    completed = subprocess.run(
        [sys.executable, "-c", MEASURE], env={**os.environ, **at_once}, capture_output=True, text=True, timeout=300, check=False
    )
    assert completed.returncode == 0, completed.stderr
    kilobytes = json.loads(completed.stdout)
    assert kilobytes["paged_attention, decode"] > 0  # whose states show that something is counted
    assert {op: taken for op, taken in kilobytes.items() if taken > TILE} == {}, "KiB, beside the arguments"
