"""torch's threads: the same bits on any number of them, torch.set_num_threads obeyed, no second pool."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import ALL_STATES, RULES
from q_cpu import _native, attention, gemm, int8, norm, openmp, quantize
from q_cpu.runtime import native

SIGNED, UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)


def every_kernel() -> Iterator[Tensor]:
    """Outputs of all kernels on inputs large enough to be shared out, of sizes that divide by nothing."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(517, 1031, generator=generator)
    codes, absmax = quantize.quantize_blockwise(A, SIGNED, 256)
    yield from (codes, absmax, quantize.dequantize_blockwise(codes, absmax, SIGNED, 256, torch.bfloat16))
    packed, absmax = quantize.quantize_4bit(A, 64, "nf4")
    yield from (packed, absmax, quantize.dequantize_4bit(packed, absmax, 64, "nf4", A.shape, torch.float16))
    yield from quantize.quantize_4bit(A, 16, "nvfp4")
    q, scale, outliers = quantize.quantize_int8_rowwise(A, 3.0)
    yield from (q, scale, outliers)
    x = torch.randn(70, 1031, generator=generator)
    yield gemm.gemm_4bit(x, packed, absmax, 64, "nf4", A.shape, None, "native")
    yield gemm.gemm(x[:3], A, None)
    N, K = 516, 1024  # rows that begin with a byte and a block
    for few in (x[:3, :K], x[:40, :K].bfloat16()):
        yield gemm.gemm_4bit(few, packed[: N * K // 2], absmax[: N * K // 64], 64, "nf4", (N, K), None, "native")
    yield gemm.gemm_4bit(x, packed, absmax, 64, "nf4", A.shape, None, "int8")
    x8, x_scale, _ = quantize.quantize_int8_rowwise(x, 0.0)
    for tokens in (4, 70):
        yield int8.int8_gemm(x8[:tokens], q, x_scale[:tokens], scale, None, torch.float32)
        yield int8.gemm_int8_weight(x[:tokens].bfloat16(), q, scale, None)

    for name in ("ademamix", "lamb", "lars"):  # the one with the most states, and those with norms
        params = [A.clone(), x.clone()]
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        kept = [params if state in RULES[name].names(0.9) else [] for state in ALL_STATES]
        codes = [[torch.zeros(p.shape, dtype=torch.uint8) for p in held] for held in kept]
        scales = [[torch.zeros(-(-p.numel() // 256)) for p in held] for held in kept]
        settings = (0.1, 0.9, 0.99, 0.999, 1.0, 1e-8, 0.1, 0.0, False, 0.1, 2)
        native.optimizer_step_8bit(name, params, grads, *codes, *scales, [], SIGNED, UNSIGNED, *settings, 256)
        moments = [[torch.zeros(p.shape) for p in held] for held in kept]
        native.optimizer_step_32bit(name, params, grads, *moments, [], *settings)
        for tensors in (params, *codes, *scales, *moments):
            yield from tensors

    yield norm.rms_norm(A, A[0], 1e-6)
    yield from norm.add_rms_norm(A, A.flip(0), A[0], 1e-6)
    yield norm.silu_and_mul(A[:, :1030])
    heads = A[:512, :1024].unflatten(1, (16, 64))
    yield from norm.rotary_embedding(
        heads, heads[:, :4], torch.arange(512), A[:, :32].contiguous(), A[:, 32:64].contiguous(), False
    )
    yield from attention_outputs(heads.bfloat16())


def attention_outputs(heads: Tensor) -> Iterator[Tensor]:
    """A cache, and attention over it: a long sequence that decodes, whose keys are shared out, and one that is prefilled."""
    k_cache, v_cache = (torch.zeros(200, 4, 16, 64, dtype=heads.dtype) for _ in range(2))
    keys = heads[:, :4].repeat(6, 1, 1)
    attention.write_kv(keys, keys.flip(0), k_cache, v_cache, torch.arange(len(keys)), None, None)
    yield from (k_cache, v_cache.clone())
    tables = torch.arange(200, dtype=torch.int32).view(1, 200).repeat(2, 1)
    start, lengths = torch.tensor([0, 1, 301], dtype=torch.int32), torch.tensor([3001, 400], dtype=torch.int32)
    yield attention.paged_attention(
        heads[:301], k_cache, v_cache, tables, start, lengths, 300, 3001, 0.125, True, None, None, None, None, None
    )
    attention.copy_kv_blocks(k_cache, v_cache, torch.stack((torch.arange(200), torch.arange(200).flip(0)), 1))
    yield v_cache


def test_the_same_bits_on_any_number_of_threads(isa, threads):
    threads(1)
    alone = list(every_kernel())
    for count in (2, 3, 7):
        threads(count)
        for shared, single in zip(every_kernel(), alone, strict=True):
            assert torch.equal(shared, single)


@pytest.fixture
def counted() -> Iterator[list[int]]:
    """What torch.get_num_threads answered to the native module."""
    answers: list[int] = []

    def get_num_threads() -> int:
        answers.append(torch.get_num_threads())
        return answers[-1]

    address = openmp.gomp_parallel_address()
    native.configure_threads(address, get_num_threads)
    yield answers
    native.configure_threads(address, torch.get_num_threads)


def test_set_num_threads_is_obeyed_at_every_call(counted, threads):
    A = torch.randn(1 << 20)
    for count in (1, 2, 1, 3):
        threads(count)
        quantize.quantize_4bit(A, 64, "nf4")
        assert counted[-1] == count


def test_set_num_threads_is_obeyed_from_other_python_threads(counted, threads):
    A = torch.randn(1 << 20)
    threads(2)
    found: list[Tensor] = []

    def work() -> None:
        found.append(quantize.quantize_4bit(A, 64, "nf4")[0])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counted == [2, 2, 2, 2]
    for packed in found:
        assert torch.equal(packed, quantize.quantize_4bit(A, 64, "nf4")[0])


def test_small_work_wakes_no_thread(counted):
    quantize.quantize_4bit(torch.randn(1000), 64, "nf4")
    assert counted == []


def run(code: str, **environment: str) -> str:
    """The output of a fresh interpreter."""
    completed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc to count threads and libraries")
def test_there_is_no_second_pool():
    code = """
import os, re, torch
torch.set_num_threads(3)
x = torch.randn(1 << 20)
(x * 2 + x.exp()).sum()  # torch's pool is up now
def count(): return len(os.listdir("/proc/self/task"))
before = count()
from q_cpu import quantize
quantize.quantize_4bit(x, 64, "nf4")
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib(gomp|iomp|omp)", line)}
print(before >= 3, count() - before, len(runtimes))
"""
    assert run(code).split() == ["True", "0", "1"]


def test_the_extension_links_no_openmp():
    assert _native.__file__ is not None
    binary = Path(_native.__file__).read_bytes()
    for name in (b"libgomp", b"libiomp", b"libomp", b"libtorch", b"libc10"):
        assert name not in binary


def test_the_gil_is_released(threads):
    """Another Python thread makes progress while a kernel runs."""
    threads(1)
    A = torch.randn(1 << 23)
    ticks, done = 0, threading.Event()

    def work() -> None:
        for _ in range(3):
            quantize.quantize_4bit(A, 64, "nf4")
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10.0)  # so that the interpreter itself takes the lock from no one
    try:
        worker = threading.Thread(target=work)
        worker.start()
        while not done.wait(0.001):
            ticks += 1
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert ticks >= 3


def test_without_a_runtime_the_calling_thread_works_and_says_so(counted, caplog, monkeypatch: pytest.MonkeyPatch):
    from q_cpu import runtime

    monkeypatch.setattr(openmp, "gomp_parallel_address", lambda: None)
    with caplog.at_level(logging.WARNING, logger="q.cpu"):
        shares = runtime._share_threads()
    assert not shares
    assert "calling thread only" in caplog.text
    monkeypatch.setattr(runtime, "_shares_threads", shares)
    assert runtime.description().endswith("1 thread: found no OpenMP runtime of torch to share")
    packed, _ = quantize.quantize_4bit(torch.randn(1 << 20), 64, "nf4")
    assert packed.numel() == 1 << 19
