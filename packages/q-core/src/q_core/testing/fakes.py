"""Backends made up for a test, installed as if by entry points, for as long as a context stands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from q_core import dispatch, registry
from q_core.backend import Backend
from q_core.environment import FallbackPolicy
from q_core.reference import backend as reference_backend


@contextlib.contextmanager
def family_module(name: str, *functions: Callable[..., Any]) -> Iterator[str]:
    """A module of implementations, importable by name while the context stands."""
    module = ModuleType(name)
    for function in functions:
        function.__module__ = name
        setattr(module, function.__name__, function)
    sys.modules[name] = module
    try:
        yield name
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def installed_backends(
    *backends: Backend | Callable[[], object],
    reference: bool = True,
    selected: tuple[str, ...] | None = None,
    fallback: FallbackPolicy = "allow",
) -> Iterator[registry.Registry]:
    """Let exactly these backends be installed, in the whole process.

    Args:
        *backends: backends, or functions that load one (or raise, as a broken distribution's entry point does).
        reference: whether the reference is there too.
        selected: as ``Q_BACKENDS``.
        fallback: as ``Q_FALLBACK``.
    """
    sources = [registry.Source("reference", "q-core", lambda: reference_backend)] if reference else []
    for i, backend in enumerate(backends):
        load = backend if not isinstance(backend, Backend) else (lambda b=backend: b)
        name = backend.name if isinstance(backend, Backend) else f"entry_{i}"
        sources.append(registry.Source(name, "made up", load))
    made = registry.Registry(sources, selected=selected, fallback=fallback)
    with dispatch.replaced_registry(made):
        yield made
