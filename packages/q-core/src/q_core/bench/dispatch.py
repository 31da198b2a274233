"""The cost of a call over its bare kernel: an op whose kernel does nothing, through each layer and in each mode of autograd.

The targets are for an op of seven arguments, ``int8_gemm``; each more costs 0.1 to 0.3 µs in torch's dispatcher, as ``gemm_4bit`` with
nine shows. *bound* is ``q_core.bound(op)``; *public* validates its arguments first. The bare kernel is the backend's function itself.
Where bitsandbytes is installed, its op of the same purpose gets a kernel that does nothing, too, and is measured in the same run. A
machine that does something else at the same time measures too much and never too little, so the best of several repeats counts.
"""

from __future__ import annotations

import contextlib
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from q_core.backend import Availability, Backend, impl
from q_core.dispatch import bound
from q_core.layouts import CANONICAL
from q_core.ops import gemm_4bit as public_gemm_4bit
from q_core.ops import int8_gemm as public_int8_gemm
from q_core.testing.fakes import family_module, installed_backends

CALLS = 250
"""Calls a measurement: short ones, of which some fall between what else the machine does."""

N, K, BLOCKSIZE = 8, 64, 64

MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "recording": contextlib.nullcontext,
}

TARGETS_US = {
    ("bound", "inference_mode"): 3.0,
    ("public", "inference_mode"): 5.0,
    ("bound", "no_grad"): 8.0,
    ("public", "no_grad"): 8.0,
    ("bound", "recording"): 12.0,
    ("public", "recording"): 12.0,
}
"""Microseconds over the bare kernel, by layer and mode, for seven arguments."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One way to call, in one mode.

    Attributes:
        subject: library and op.
        layer: "bound" or "public".
        mode: "inference_mode", "no_grad" or "recording".
        microseconds: a call, less one of the bare kernel in the same mode.
        target: what it may be, where that is said.
    """

    subject: str
    layer: str
    mode: str
    microseconds: float
    target: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """All measurements of a run, and the versions that they are of."""

    torch: str
    bitsandbytes: str | None
    measurements: tuple[Measurement, ...]

    def missed(self) -> list[Measurement]:
        """Measurements above their target."""
        return [m for m in self.measurements if m.target is not None and m.microseconds > m.target]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            "microseconds a call over the bare kernel (target)",
            f"{'':<32}" + "".join(f"{mode:>22}" for mode in MODES),
        ]
        for subject, layer in dict.fromkeys((m.subject, m.layer) for m in self.measurements):
            cells = []
            for mode in MODES:
                (m,) = (m for m in self.measurements if (m.subject, m.layer, m.mode) == (subject, layer, mode))
                target = "" if m.target is None else f" (≤ {m.target:g}{', missed' if m.microseconds > m.target else ''})"
                cells.append(f"{f'{m.microseconds:.1f}{target}':>22}")
            lines.append(f"{f'{subject}, {layer}':<32}" + "".join(cells))
        if self.bitsandbytes is None:
            lines.append("bitsandbytes is not installed: nothing to compare with")
        return "\n".join(lines)


def measure(*, repeats: int = 80) -> Report:
    """Measure this process.

    Args:
        repeats: measurements of each, of which the best counts.
    """
    measurements = list(_ours(repeats))
    version = None
    if find_spec("bitsandbytes") is not None:
        version, theirs = _theirs(repeats)
        measurements += theirs
    return Report(torch.__version__, version, tuple(measurements))


def _best(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds of a call."""
    call()
    return min(timeit.repeat(call, number=CALLS, repeat=repeats)) / CALLS * 1e6


def _over_bare(
    subject: str,
    layers: Mapping[str, Callable[[], Any]],
    bare: Callable[[], Any],
    repeats: int,
    targets: Mapping[tuple[str, str], float] = MappingProxyType({}),
) -> Iterator[Measurement]:
    for mode, context in MODES.items():
        with context():
            floor = _best(bare, repeats)
            for layer, call in layers.items():
                yield Measurement(subject, layer, mode, max(0.0, _best(call, repeats) - floor), targets.get((layer, mode)))


def _empty_kernel(x_TK: Tensor) -> Tensor:
    """What any kernel must do: allocate its output."""
    return x_TK.new_empty(1, N)


def _ours(repeats: int) -> Iterator[Measurement]:
    a, b = torch.zeros(1, K, dtype=torch.int8), torch.zeros(N, K, dtype=torch.int8)
    a_scale, b_scale = torch.ones(1, requires_grad=True), torch.ones(N)
    x, packed = torch.zeros(1, K, requires_grad=True), torch.zeros(N * K // 2, dtype=torch.uint8)
    absmax, shape = torch.zeros(N * K // BLOCKSIZE), (N, K)

    @impl(accepts=lambda dtype: None if dtype is torch.float32 else f"dtype {dtype}, only float32")
    def int8_gemm(a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _empty_kernel(a_scale)

    @impl(accepts=lambda quant_type: None if quant_type == "nf4" else f"quant_type {quant_type!r}, only nf4")
    def gemm_4bit(
        x_TK: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], bias: Tensor | None
    ) -> Tensor:
        return _empty_kernel(x_TK)

    with family_module("q_core_bench_kernels", int8_gemm, gemm_4bit) as family:
        backend = Backend(
            name="nothing", device_types=("cpu",), surface_version=1, priority=1,
            probe=lambda: Availability(True, "does nothing"), families=(family,),
        )  # fmt: skip
        with installed_backends(backend):
            op = bound("int8_gemm")
            yield from _over_bare(
                "q-core int8_gemm",
                {
                    "bound": lambda: op(a, b, a_scale, b_scale, None, torch.float32, CANONICAL),
                    "public": lambda: public_int8_gemm(a, b, a_scale, b_scale),
                },
                lambda: int8_gemm(a, b, a_scale, b_scale, None, torch.float32),
                repeats,
                TARGETS_US,
            )
            op_4bit = bound("gemm_4bit")
            yield from _over_bare(
                "q-core gemm_4bit",
                {
                    "bound": lambda: op_4bit(x, packed, absmax, BLOCKSIZE, "nf4", shape, None, "native", CANONICAL),
                    "public": lambda: public_gemm_4bit(x, packed, absmax, shape=shape),
                },
                lambda: gemm_4bit(x, packed, absmax, BLOCKSIZE, "nf4", shape, None),
                repeats,
            )


def _theirs(repeats: int) -> tuple[str, list[Measurement]]:
    """The same of ``bitsandbytes.matmul_4bit``, and of the torch op below it."""
    import bitsandbytes

    weight, state = bitsandbytes.functional.quantize_4bit(torch.zeros(N, K), blocksize=BLOCKSIZE, quant_type="nf4")
    x = torch.zeros(1, K, requires_grad=True)
    op = torch.ops.bitsandbytes.gemm_4bit.default

    def nothing(A: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        return _empty_kernel(A)

    library = torch.library.Library("bitsandbytes", "IMPL")
    try:
        library.impl("gemm_4bit", nothing, "CPU")
        layers = {
            "bound": lambda: op(x, weight, state.shape, state.absmax, state.blocksize, state.quant_type),
            "public": lambda: bitsandbytes.matmul_4bit(  # type: ignore[attr-defined]  # it exports by import alone
                x, weight, quant_state=state
            ),
        }
        measured = _over_bare(
            "bitsandbytes gemm_4bit",
            layers,
            lambda: nothing(x, weight, state.shape, state.absmax, state.blocksize, state.quant_type),
            repeats,
        )
        return bitsandbytes.__version__, list(measured)
    finally:
        library._destroy()
