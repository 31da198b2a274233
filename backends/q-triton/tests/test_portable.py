"""What a compiler for another vendor's GPUs may lack is in no kernel.

No compiler for Intel's GPUs is at hand to show it (for NVIDIA's and AMD's there is: nox -s kernels-aot), so the sources are read.
"""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

(_PACKAGE,) = importlib.util.find_spec("q_triton").submodule_search_locations  # type: ignore[union-attr, misc]
KERNELS = sorted(Path(_PACKAGE, "kernels").glob("*.py"))

IMPORTED = ("__future__", "triton", "triton.language", "q_triton.kernels")
"""What kernels may import: nothing below triton.language, where the vendors' libraries are."""

VENDORS = ("extra", "inline_asm_elementwise", "map_elementwise")
"""Names of triton.language that hold, or take, one vendor's instructions."""

HARDWARE = ("make_tensor_descriptor", "load_tensor_descriptor", "store_tensor_descriptor", "dot_scaled")
"""Names that stand for hardware of some targets and are emulated on others, if at all."""

ORDERED = ("atomic_xchg", "atomic_cas", "debug_barrier")
"""Names by which programs wait for each other, which is for none of our kernels."""

HINTS = ("warp_specialize", "disallow_acc_multi_buffer", "flatten")
"""Arguments of loops that are for one architecture."""


GUARDED = {("flash", "tl.float8e4nv")}
"""What a module has in a branch that is compiled for none but the targets that can do it: HAS_E4M3, elsewhere integers do the same."""


def faults(source: str) -> Iterator[str]:
    """What isn't portable in a module of kernels, a line each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _of_import(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tl":
            name = node.attr
            if name in (*VENDORS, *HARDWARE, *ORDERED) or name.startswith(("float8", "_")):
                yield f"line {node.lineno}: tl.{name}"
        elif isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {word.arg}=" for word in node.keywords if word.arg in HINTS)
        elif isinstance(node, ast.Name) and node.id == "libdevice":
            yield f"line {node.lineno}: libdevice"


def _of_import(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for module in modules:
        if module not in IMPORTED and not module.startswith("q_triton.kernels."):
            yield f"line {node.lineno}: import of {module or 'a relative module'}"
    if isinstance(node, ast.ImportFrom) and node.module in ("triton", "triton.language"):
        yield f"line {node.lineno}: names of {node.module}, expected `import triton.language as tl`"
    if isinstance(node, ast.Import):
        yield from (
            f"line {node.lineno}: {name.name} as {name.asname}, expected tl"
            for name in node.names
            if name.name == "triton.language" and name.asname != "tl"
        )


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_are_portable(path: Path) -> None:
    found = [fault for fault in faults(path.read_text()) if (path.stem, fault.partition(": ")[2]) not in GUARDED]
    assert not found


def test_there_are_kernels() -> None:
    assert len(KERNELS) > 3


@pytest.mark.parametrize(
    "line",
    [
        "from triton.language.extra import libdevice",
        "from triton.language.extra.cuda import libdevice as library",
        "import triton.language.extra.hip.libdevice",
        "from triton import language",
        "from triton.language import dot",
        "import triton.language",
        "import triton.language as language",
        "from triton.experimental import gluon",
        "import torch",
        "from . import codes",
        "tl.inline_asm_elementwise('mov', '', [], tl.int32, True, 1)",
        "x = tl.extra.cuda.libdevice.tanh(x)",
        "x = tl.extra.libdevice.tanh(x)",
        "x = libdevice.tanh(x)",
        "y = x.to(tl.float8e4nv)",
        "y = x.to(tl.float8e5)",
        "d = tl.make_tensor_descriptor(x, [1], [1], [1])",
        "d = tl._experimental_make_tensor_descriptor(x)",
        "y = tl.dot_scaled(a, s, 'e2m1', b, t, 'e2m1')",
        "tl.atomic_cas(x, 0, 1)",
        "for k in tl.range(0, K, warp_specialize=True): pass",
    ],
)
def test_each_of_these_is_found(line: str) -> None:
    assert list(faults(textwrap.dedent(line)))


@pytest.mark.parametrize(
    "line",
    [
        "import triton\nimport triton.language as tl",
        "from q_triton.kernels.codes import nibble",
        "from __future__ import annotations",
        "x = tl.load(p, mask, other=0.0).to(tl.float32)",
        "n = tl.atomic_add(counts, 1)",
        "for k in tl.range(0, K, num_stages=2): pass",
    ],
)
def test_none_of_these_is(line: str) -> None:
    assert not list(faults(line))
