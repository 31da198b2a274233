"""From entry points to an ordered list of implementations for an op and a device type.

pluggy validates and holds what backends registered; it is never on a call's path.  Each backend is loaded on its own: one that fails is
kept with its traceback, for ``q-core doctor``, and breaks no other.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from types import SimpleNamespace
from typing import Any, Literal

import pluggy

from q_core import hookspecs
from q_core.backend import (
    ENTRY_POINT_GROUP,
    SURFACE_VERSION,
    Accepts,
    Availability,
    Backend,
    BackendConflictError,
    BackendError,
)
from q_core.environment import FallbackPolicy, read_environment
from q_core.reference import backend as reference_backend
from q_core.specs import RECORDS

logger = logging.getLogger("q")

State = Literal["available", "unavailable", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One backend's function for one op."""

    backend: Backend
    op: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    accepts: Accepts | None


@dataclass(frozen=True, slots=True)
class LoadedBackend:
    """A backend as found in this process.

    Attributes:
        name: the backend's own name, or its entry point's where it couldn't be loaded.
        distribution: name and version of the installed distribution.
        state: "available"; "unavailable" (its probe said no); "refused" (it breaks the contract); "failed" (it raised).
        reason: why, in words.
        backend: its description, where there is one.
        implementations: by op; empty unless available.
        traceback: of the exception, where there was one.
    """

    name: str
    distribution: str
    state: State
    reason: str
    backend: Backend | None = None
    implementations: dict[str, Implementation] = field(default_factory=dict)
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a backend comes from: a name, a distribution, and a way to load it."""

    name: str
    distribution: str
    load: Callable[[], object]


def installed_sources() -> list[Source]:
    """The reference, and every entry point of the group ``q.backends``."""
    sources = [Source("reference", f"q-core {_version('q-core')}", lambda: reference_backend)]
    for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        dist = entry_point.dist
        sources.append(Source(entry_point.name, f"{dist.name} {dist.version}" if dist else "", entry_point.load))
    return sources


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _implementations(backend: Backend) -> Iterator[Implementation]:
    """Import a backend's families and collect what they mark with ``@impl``."""
    for module_name in backend.families:
        module = importlib.import_module(module_name)
        for name, function in vars(module).items():
            # A family may import another's function to call it: only a module's own ones are registered.
            if getattr(function, "__module__", None) != module_name:
                continue
            options = getattr(function, f"{hookspecs.PROJECT}_impl", None)
            if not isinstance(options, dict):
                if name in RECORDS:
                    raise BackendError(
                        f"{backend.name}: {module_name}.{name} has the name of an op; mark it with @impl, or rename it."
                    )
                continue
            if name not in RECORDS:
                raise BackendError(f"{backend.name}: {module_name}.{name} is not an op of the surface: {', '.join(RECORDS)}.")
            yield _validated(backend, name, function, options)


def _validated(backend: Backend, op: str, function: Callable[..., Any], options: dict[str, Any]) -> Implementation:
    """Refuse what pluggy would accept and the trampolines could not call."""
    where = f"{backend.name}: {op} ({function.__module__}.{function.__qualname__})"
    if options.get("wrapper") or options.get("hookwrapper"):
        raise BackendError(f"{where} is a hook wrapper; wrappers are not part of the contract.")
    record = RECORDS[op]
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            raise BackendError(f"{where}: parameter {parameter} must be a plain name: no default, no *args, not keyword-only.")
        if parameter.name not in record.arguments:
            raise BackendError(f"{where}: {parameter.name!r} is not an argument of the op: {', '.join(record.arguments)}.")
    for argument in record.arguments:
        if argument not in parameters and argument not in record.neutral:
            raise BackendError(f"{where} leaves out {argument!r}, which has no neutral value.")
    accepts: Accepts | None = getattr(function, "q_accepts", None)
    for argument in inspect.signature(accepts).parameters if accepts else ():
        if argument not in record.arguments:
            raise BackendError(f"{where}: its predicate asks for {argument!r}, which is not an argument of the op.")
    return Implementation(backend, op, function, tuple(parameters), accepts)


class Registry:
    """All backends of this process and the order in which they are asked."""

    def __init__(self, sources: Iterable[Source], *, selected: Iterable[str] | None, fallback: FallbackPolicy) -> None:
        self.fallback = fallback
        self.plugins = pluggy.PluginManager(hookspecs.PROJECT)
        self.plugins.add_hookspecs(hookspecs)
        self.backends: list[LoadedBackend] = []
        for source in sources:
            loaded = self._load(source)
            self.backends.append(loaded)
            if loaded.traceback:
                logger.warning("backend %s %s: %s (see `q-core doctor`)", loaded.name, loaded.state, loaded.reason)
        self.selected: frozenset[str] | None = None
        if selected is not None:
            self.selected = self.check_names(selected)

    def _load(self, source: Source) -> LoadedBackend:
        backend: Backend | None = None
        try:
            found = source.load()
            if not isinstance(found, Backend):
                raise BackendError(f"entry point {source.name!r} gives {type(found).__name__}, expected a q_core.backend.Backend")
            backend = found
            if any(other.name == backend.name for other in self.backends):
                raise BackendError(f"a backend named {backend.name!r} is there already")
            if backend.surface_version > SURFACE_VERSION:
                raise BackendError(
                    f"written for surface version {backend.surface_version}, this q-core has {SURFACE_VERSION}: update q-core"
                )
            availability = backend.probe()
            if not isinstance(availability, Availability):
                raise BackendError(f"its probe gives {availability!r}, expected a q_core.backend.Availability")
            if not availability:
                return LoadedBackend(backend.name, source.distribution, "unavailable", availability.reason, backend)
            implementations = {implementation.op: implementation for implementation in _implementations(backend)}
            functions = {op: implementation.function for op, implementation in implementations.items()}
            self.plugins.register(SimpleNamespace(**functions), name=backend.name)
            return LoadedBackend(backend.name, source.distribution, "available", availability.reason, backend, implementations)
        except Exception as error:
            state: State = "refused" if isinstance(error, (BackendError, pluggy.PluginValidationError)) else "failed"
            name = backend.name if backend else source.name
            reason = f"{type(error).__name__}: {error}" if state == "failed" else str(error)
            return LoadedBackend(name, source.distribution, state, reason, backend, traceback=traceback.format_exc())

    def check_names(self, names: Iterable[str]) -> frozenset[str]:
        """Names of backends that are available.

        Raises:
            ValueError: one is not installed or not available; the message says why.
        """
        by_name = {loaded.name: loaded for loaded in self.backends}
        chosen = frozenset(names)
        for name in sorted(chosen):
            if name not in by_name:
                raise ValueError(f"backend {name!r} is not installed, expected one of: {', '.join(sorted(by_name))}.")
            if by_name[name].state != "available":
                raise ValueError(f"backend {name!r} is {by_name[name].state}: {by_name[name].reason}")
        return chosen

    def layouts(self) -> list[str]:
        """The private weight layouts of the backends that may serve."""
        return [
            layout
            for loaded in self.backends
            if loaded.state == "available" and loaded.backend is not None
            if self.selected is None or loaded.name in self.selected
            for layout in loaded.backend.layouts
        ]

    def chain(self, op: str, device_type: str) -> list[Implementation]:
        """Who is asked, in order.

        Raises:
            BackendConflictError: two backends of equal priority serve the op on this device type.
        """
        chain = [
            loaded.implementations[op]
            for loaded in self.backends
            if op in loaded.implementations
            and (self.selected is None or loaded.name in self.selected)
            and loaded.backend is not None
            and (loaded.backend.device_types is None or device_type in loaded.backend.device_types)
        ]
        chain.sort(key=lambda implementation: -implementation.backend.priority)
        for first, second in itertools.pairwise(chain):
            if first.backend.priority == second.backend.priority:
                raise BackendConflictError(
                    f"{op} on {device_type}: backends {first.backend.name!r} and {second.backend.name!r} both have priority "
                    f"{first.backend.priority}; choose one with Q_BACKENDS or use_backends, or uninstall one."
                )
        return chain


_lock = threading.RLock()
_registry: Registry | None = None


def registry() -> Registry:
    """The process's registry, loaded when first asked for."""
    global _registry
    if _registry is None:
        with _lock:
            if _registry is None:
                environment = read_environment()
                _registry = Registry(installed_sources(), selected=environment.backends, fallback=environment.fallback)
    return _registry


def set_registry(replacement: Registry | None) -> Registry | None:
    """Put another registry in place and return the one before; ``None`` means to load anew when asked for."""
    global _registry
    with _lock:
        previous, _registry = _registry, replacement
    return previous
