"""What there is to run on a GPU, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAMILIES = ("quantize", "gemm", "int8", "optim", "attention", "moe", "norm")
TESTS = ("ops", "graphs", "streams", "large", "models")


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the steps run.

    Attributes:
        python: with the packages installed.
        device: torch's name of the device.
        backend: which is to serve it.
        output: folder of the results.
        scratch: folder of what nobody needs afterwards.
        small: tiny sizes everywhere, as Triton's interpreter needs them.
    """

    python: str
    device: str
    backend: str
    output: Path
    scratch: Path
    small: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A command of a step.

    Attributes:
        name: of the step and its part.
        arguments: of Python.
        seconds: what it may take.
        together: it may run beside its neighbours, as what is no measurement may.
    """

    name: str
    arguments: Sequence[str]
    seconds: float
    together: bool = field(default=False, kw_only=True)


def _doctor(setting: Setting, part: str) -> Iterator[Job]:
    yield Job("doctor", ["-m", "q_core.cli", "doctor", "--device", setting.device.partition(":")[0]], 120)


def _conformance(setting: Setting, part: str) -> Iterator[Job]:
    """An op each, side by side: most of their time goes into compiling kernels."""
    for op in [part] if part else _ops():
        command = ["-m", "q_core.cli", "conformance", "--backend", setting.backend, "--device", setting.device, "--op", op]
        yield Job(f"conformance:{op}", [*command, *(["--examples", "4"] if setting.small else [])], 540, together=True)


def _ops() -> list[str]:
    """The ops of the GPU backends, by the sources' names: what runs the plan needn't have them installed."""
    hooks = (ROOT / "packages/q-core/src/q_core/hookspecs.py").read_text().splitlines()
    ops = [line.removeprefix("def ").partition("(")[0] for line in hooks if line.startswith("def ")]
    return [op for op in ops if op not in _OF_THE_REFERENCE]


_OF_THE_REFERENCE = ("prepack_weight", "unpack_weight")
"""Copies, where there is no private layout."""


def _tests(setting: Setting, part: str) -> Iterator[Job]:
    for name in [part] if part else TESTS:
        file = f"integration_tests/gpu/test_{name}.py"
        yield Job(f"tests:{name}", ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", file], 580)


def _demo(setting: Setting, part: str) -> Iterator[Job]:
    command = ["-m", "demo", "--device", setting.device, "--output", str(setting.scratch / "demo")]
    yield Job("demo", [*command, *(["--smoke"] if setting.small else [])], 580)


def _bench(setting: Setting, part: str) -> Iterator[Job]:
    for family in [part] if part else FAMILIES:
        files = ["--output", str(setting.output / "bench.json"), "--page", str(setting.output / "bench.md")]
        command = ["-m", "benchmarks.gpu", "--device", setting.device, "--family", family, *files]
        yield Job(f"bench:{family}", [*command, *(["--small"] if setting.small else [])], 580)


def _tune(setting: Setting, part: str) -> Iterator[Job]:
    yield Job("tune", ["-m", "q_triton.tune"], 580)


STEPS: dict[str, Callable[[Setting, str], Iterator[Job]]] = {
    "doctor": _doctor,
    "conformance": _conformance,
    "tests": _tests,
    "demo": _demo,
    "bench": _bench,
    "tune": _tune,
}
"""Each yields its jobs, all of them or those of a part: ``conformance:gemm_4bit``, ``tests:graphs``, ``bench:moe``."""

USUAL = tuple(step for step in STEPS if step != "tune")
"""Tuning changes what the other steps show, so it is done when it is asked for."""


def jobs(steps: Sequence[str], setting: Setting) -> list[Job]:
    """The jobs of some steps.

    Raises:
        ValueError: there is no such step.
    """
    found: list[Job] = []
    for step in steps:
        name, _, part = step.partition(":")
        if name not in STEPS:
            raise ValueError(
                f"step {step!r} is unknown, expected of: {', '.join(STEPS)}, each with a part after a colon if you like"
            )
        found += STEPS[name](setting, part)
    return found
