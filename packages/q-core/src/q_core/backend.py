"""What a backend says of itself, and how it marks its implementations.

A backend is one :class:`Backend` object behind an entry point of the group ``q.backends``::

    [project.entry-points."q.backends"]
    acme = "acme_q.plugin:backend"

    # acme_q/plugin.py, cheap to import: no driver, no kernels
    backend = Backend(
        name="acme", device_types=("npu",), surface_version=1, priority=100,
        probe=probe, families=("acme_q.quantize", "acme_q.gemm"),
    )

    # acme_q/gemm.py, imported only where the probe said yes
    @impl(accepts=lambda quant_type: None if quant_type == "nf4" else f"quant_type {quant_type!r}, only nf4")
    def gemm_4bit(x_TK, packed, absmax, blocksize, quant_type, shape, bias): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import pluggy

from q_core.hookspecs import PROJECT

ENTRY_POINT_GROUP = "q.backends"

SURFACE_VERSION = 1
"""Version of the op surface that this q-core defines."""

REFERENCE_PRIORITY = -1
"""The reference comes after every backend, whose priorities are 0 or more."""

Function = TypeVar("Function", bound=Callable[..., Any])
Accepts = Callable[..., str | None]

_hookimpl = pluggy.HookimplMarker(PROJECT)


class BackendError(RuntimeError):
    """A backend breaks the contract; the message names backend, op and argument."""


class BackendConflictError(BackendError):
    """Two backends of equal priority serve the same op on the same device type."""


class NoBackendError(BackendError):
    """No implementation accepts a call; the message says why each declined."""


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can work in this process.

    Attributes:
        available: whether it can.
        reason: by what (a driver, a version), or why not; ``q-core doctor`` prints it.
    """

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend's description of itself.

    Attributes:
        name: unique name, a Python identifier (``q_cpu``); ``Q_BACKENDS`` and ``use_backends`` select by it.
        device_types: torch device types it serves (``("cpu",)``); ``None`` for all of them. That of a device behind ``PrivateUse1`` is the
            name which ``torch.utils.rename_privateuse1_backend`` gave it.
        surface_version: version of the op surface it was written for; one newer than q-core's is refused.
        priority: higher is asked first; two backends of equal priority may not serve the same op on one device type.
        probe: tells whether it can work here. Called once, when an op is first needed; may import drivers then.
        families: modules that hold the implementations, imported only after the probe said yes.
        summary: a line for ``q-core doctor``.
        layouts: private weight layouts that its ``prepack_weight`` makes and its ``unpack_weight`` undoes, each
            ``<name of the backend>.<name>``.
    """

    name: str
    device_types: tuple[str, ...] | None
    surface_version: int
    priority: int
    probe: Callable[[], Availability]
    families: tuple[str, ...] = ()
    summary: str = ""
    layouts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise BackendError(f"backend name {self.name!r} is not a Python identifier, such as 'q_cpu'")
        if self.priority <= REFERENCE_PRIORITY and self.name != "reference":
            raise BackendError(f"backend {self.name!r} has priority {self.priority}; backends have 0 or more")
        for field in ("device_types", "families", "layouts"):
            if isinstance(getattr(self, field), str):
                raise BackendError(f"backend {self.name!r} has {field} {getattr(self, field)!r}, expected a tuple of strings")
        if self.device_types is not None and not self.device_types:
            raise BackendError(f"backend {self.name!r} has no device_types, expected some, such as ('cpu',), or None for all")
        for layout in self.layouts:
            if not layout.startswith(f"{self.name}."):
                raise BackendError(f"backend {self.name!r} has a layout {layout!r}; its layouts are named '{self.name}.<name>'")


@overload
def impl(function: Function) -> Function: ...
@overload
def impl(*, accepts: Accepts | None = None) -> Callable[[Function], Function]: ...
def impl(function: Function | None = None, *, accepts: Accepts | None = None) -> Function | Callable[[Function], Function]:
    """Mark a function as the implementation of the op of the same name.

    The function takes the hook's arguments by the hook's names, in any order, and without defaults. It may leave out arguments that
    have a neutral value ("May be left out" on the op's page); a call with another value then goes to the next backend.

    Args:
        accepts: capability predicate, a function of any of the op's arguments (by name). It returns ``None`` if the
            implementation can serve the call, or the reason why not, in words. It sees meta tensors when explained,
            so it may ask for shapes, strides, dtypes and settings, not for values. Without one every call is accepted.
    """

    def mark(f: Function) -> Function:
        f.q_accepts = accepts  # type: ignore[attr-defined]
        return _hookimpl(f)

    return mark if function is None else mark(function)
