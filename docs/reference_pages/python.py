"""Pages from signatures and docstrings: the parts of a backend, the conformance suite, quantized weights."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable

import q_core
from q_core import backend, testing
from q_core.formats import checkpoint, grouped_checkpoint, quantized_tensor
from q_core.specs import RECORDS
from q_core.testing import suite
from reference_pages.docstrings import signature_of, to_markdown

BACKEND: tuple[Callable[..., object], ...] = (
    backend.Backend,
    backend.Availability,
    backend.impl,
    backend.BackendError,
    backend.BackendConflictError,
    backend.NoBackendError,
)
TOOLS: tuple[Callable[..., object], ...] = (
    testing.disagreements,
    testing.disagreements_of,
    testing.Disagreement,
    testing.family_module,
    testing.installed_backends,
)
METHODS = ("quantize", "from_components", "empty", "prepack", "unpack", "dequantize")
"""Of QuantizedTensor; the rest are torch's."""


def backend_page() -> str:
    """What a backend is made of."""
    return _page("What a backend is made of", f"`q_core.backend`. {_text(backend)}", map(_described, BACKEND))


def conformance_page() -> str:
    """The conformance suite: what it is told, what it tests, and the tools it is made of."""
    tests = [f"### {name}\n\n{_applies(test)}{_text(test)}" for name, test in suite.STANDARD.items()]
    whole = [f"### {name}\n\n{_text(getattr(suite, name))}" for name in suite.__all__ if name.startswith("test_")][len(tests) :]
    parts = [_described(testing.Capabilities), "## The tests of an op", *tests, "## The tests of the whole", *whole]
    return _page("The conformance suite", _text(suite), [*parts, "## Tools", *(_described(tool, "###") for tool in TOOLS)])


def quantized_weights_page() -> str:
    """QuantizedTensor, the formats, and the keys of a checkpoint."""
    tensor = q_core.QuantizedTensor
    methods = [(name, getattr(tensor, name)) for name in METHODS]
    parts = [
        _described(tensor),
        *(f"### {name}\n\n{_code(signature_of(method))}{_text(method, '####')}" for name, method in methods),
    ]
    classes = (q_core.FourBit, q_core.Int8Rows, q_core.Fp8Rows, q_core.AffineGroups, q_core.SuperGroups)
    formats = [*map(_described, classes), "## Keys of a checkpoint", _text(checkpoint), _text(grouped_checkpoint)]
    return _page("Quantized weights", _text(quantized_tensor), [*parts, *formats])


def _page(title: str, introduction: str, parts: Iterable[str]) -> str:
    return "\n\n".join([f"# {title}", introduction, *parts]) + "\n"


def _described(thing: Callable[..., object], heading: str = "##") -> str:
    """A class or a function: its signature, if it has one of its own, and its docstring."""
    if thing is backend.impl:  # of its two overloads what each is for
        signature = "@impl\n@impl(accepts=predicate)"
    elif inspect.isclass(thing) and not dataclasses.is_dataclass(thing):
        signature = f"class {thing.__name__}({', '.join(base.__name__ for base in thing.__bases__)})"
    else:
        signature = signature_of(thing)
    return f"{heading} {thing.__name__}\n\n{_code(signature)}{_text(thing, heading + '#')}"


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n\n"


def _applies(test: Callable[..., None]) -> str:
    """The ops that a test is run for, where those aren't all."""
    condition = getattr(test, "applies", None)
    concerned = [op for op, record in RECORDS.items() if condition is None or condition(record)]
    return "" if len(concerned) == len(RECORDS) else f"Of {', '.join(f'`{op}`' for op in concerned)}.\n\n"


def _text(described: object, heading: str = "##") -> str:
    return to_markdown(inspect.getdoc(described) or "", _link, heading=heading)


def _link(target: str) -> str | None:
    name = target.rpartition(".")[2]
    return f"ops/{name}.md" if target.startswith("q_core.ops.") and name in RECORDS else None
