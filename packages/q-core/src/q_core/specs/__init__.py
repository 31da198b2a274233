"""The op records of the surface, by name."""

from __future__ import annotations

from q_core.record import OpRecord
from q_core.specs import attention, gemm, moe, norm, optim, quantize

RECORDS: dict[str, OpRecord] = {
    record.name: record for family in (quantize, gemm, optim, attention, moe, norm) for record in family.RECORDS
}


def record_of(op: str) -> OpRecord:
    """The record of an op by name.

    Raises:
        ValueError: there is no such op.
    """
    try:
        return RECORDS[op]
    except KeyError:
        raise ValueError(f"unknown op {op!r}, expected one of: {', '.join(RECORDS)}.") from None
