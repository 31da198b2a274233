"""Who serves an op, and why the others don't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from q_core.backend import BackendError
from q_core.chain import decline_reason
from q_core.record import OpRecord
from q_core.registry import Implementation, LoadedBackend, registry
from q_core.samples.make import Make
from q_core.specs import record_of


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one backend says to a call: ``reason`` is why it declines, ``None`` if it accepts."""

    backend: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Who would serve a call, in the order in which backends are asked.

    Attributes:
        op: name of the op.
        device: torch device type.
        served_by: name of the backend, ``None`` if nobody serves it.
        verdicts: what each said, those after ``served_by`` included.
    """

    op: str
    device: str
    served_by: str | None
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: served by {self.served_by or 'nobody'}"]
        for verdict in self.verdicts:
            said = "accepts" if verdict.reason is None else f"declines: {verdict.reason}"
            lines.append(f"  {verdict.backend}: {said}")
        return "\n".join(lines)


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return [_to_meta(v) for v in value] if isinstance(value, list) else value


def _sample(record: OpRecord, dtype: torch.dtype) -> dict[str, Any]:
    call = next(record.samples(Make(), dtype))
    return {name: _to_meta(value) for name, value in call.items()}


def _why_absent(loaded: LoadedBackend, op: str, device_type: str) -> str:
    if loaded.state != "available" or loaded.backend is None:
        return f"{loaded.state}: {loaded.reason}"
    if op not in loaded.implementations:
        return f"it has no {op}"
    if loaded.backend.device_types is not None and device_type not in loaded.backend.device_types:
        return f"it serves {', '.join(loaded.backend.device_types)}, not {device_type}"
    return "it is not selected (Q_BACKENDS or use_backends)"


def _verdict(implementation: Implementation, record: OpRecord, call: dict[str, Any]) -> Verdict:
    backend = implementation.backend.name
    try:
        reason = decline_reason(implementation, record, call)
    except Exception as error:
        raise BackendError(
            f"{backend}: the predicate of {record.name} raised {type(error).__name__}: {error}; expected None or a reason in words. "
            "It may ask for shapes, strides, dtypes and settings, not for values."
        ) from error
    if reason is not None and not (isinstance(reason, str) and reason.strip()):
        raise BackendError(f"{backend}: the predicate of {record.name} returned {reason!r}, expected None or a reason in words.")
    return Verdict(backend, reason)


def explain(op: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, **arguments: Any) -> Explanation:
    """Tell who would serve an op and why each other backend declines.

    Args:
        op: name of the op.
        device: torch device type; need not be present.
        dtype: of the floating tensors of the call asked about.
        **arguments: any of the op's own arguments, in place of the sample's.

    Returns:
        The explanation; ``print`` it.

    Raises:
        ValueError: there is no such op, argument or device.
        BackendConflictError: two backends of equal priority serve the op there.
        BackendError: a predicate raised, or gave neither ``None`` nor a reason.
    """
    record = record_of(op)
    for name in arguments:
        if name not in record.arguments:
            raise ValueError(f"{op} has no argument {name!r}, expected one of: {', '.join(record.arguments)}.")
    try:
        device_type = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"explain: device is {device!r}, expected one that torch knows: {error}") from None
    call = _sample(record, dtype) | arguments
    chain = registry().chain(op, device_type)
    asked = [_verdict(implementation, record, call) for implementation in chain]
    in_chain = {verdict.backend for verdict in asked}
    absent = [
        Verdict(loaded.name, _why_absent(loaded, op, device_type)) for loaded in registry().backends if loaded.name not in in_chain
    ]
    served_by = next((verdict.backend for verdict in asked if verdict.reason is None), None)
    return Explanation(op, device_type, served_by, (*asked, *absent))
