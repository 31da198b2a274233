"""Build of the native module: the kernel sources once an ISA level, the rest once.

Everything else about the distribution is in pyproject.toml.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext


@dataclass(frozen=True, slots=True)
class Level:
    """An ISA level: its C++ namespace and name, how people write it, and the compiler's flags."""

    name: str
    display: str
    flags: tuple[str, ...] = ()


AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi", "-mbmi2",
    "-mprefer-vector-width=512",
)  # fmt: skip

LEVELS = [Level("baseline", "baseline")]
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS += [Level("avx2", "AVX2", AVX2), Level("avx512", "AVX-512", (*AVX2, *AVX512))]

# Rounding is specified step by step, so no contraction; errno and trapping keep loops from being vectorized and change no result.
# Integer sums wrap around: on its way, and at K = 131,072 in the end, a dot product of int8 may leave int32.
KERNEL_FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # the last two: gcc 12 warns of its own AVX-512 headers
)  # fmt: skip

KERNELS = Path("csrc/kernels")
BINDINGS = Path("csrc/bindings")
ONCE = [KERNELS / "code_book.cpp", KERNELS / "levels.cpp"]
LEVEL_SOURCES = [str(path) for path in sorted(KERNELS.glob("*.cpp")) if path not in ONCE]
SOURCES = [str(path) for path in (*ONCE, *sorted(BINDINGS.glob("*.cpp")))]
HEADERS = [str(path) for directory in (KERNELS, BINDINGS) for path in sorted(directory.glob("*.h"))]


class BuildLevels(build_ext):
    """``build_ext`` that first compiles the kernels of each level and links them into the extension."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        for level in LEVELS:
            ext.extra_objects += self.compiler.compile(
                LEVEL_SOURCES,
                output_dir=str(Path(self.build_temp) / level.name),
                macros=[
                    ("Q_CPU_LEVEL", level.name),
                    ("Q_CPU_LEVEL_NAME", f'"{level.name}"'),
                    ("Q_CPU_LEVEL_DISPLAY", f'"{level.display}"'),
                ],
                extra_postargs=[*KERNEL_FLAGS, *level.flags],
                depends=HEADERS,
            )
        super().build_extension(ext)


if __name__ == "__main__":  # others read the levels and the flags
    setup(
        ext_modules=[
            Pybind11Extension(
                "q_cpu._native",
                SOURCES,
                cxx_std=17,
                include_dirs=[str(KERNELS)],
                extra_compile_args=["-O2", "-Wall", "-Wextra"],
                depends=[*LEVEL_SOURCES, *HEADERS],
            )
        ],
        cmdclass={"build_ext": BuildLevels},
    )
